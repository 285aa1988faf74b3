"""Replies: read and checked before anything of them is used.

A reply counts as a whole or not at all. So all checks are made here, and folding cannot fail.
"""

from __future__ import annotations

from flwr.app import Message
from torch import Tensor

from fomoe_flwr.aggregation.round_means import Reply, RoundMeans
from fomoe_flwr.config import Settings
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.out_task import OutTask
from fomoe_flwr.federation.routing_fields import choices_in, counts_in
from fomoe_flwr.federation.wire import WireError
from fomoe_flwr.model.homes import MEMORY, Home
from fomoe_flwr.model.state import StateSpec

REPORTED = ("loss", "tokens", "seconds", "ghost_fraction", "all_ghost_fraction", "grad_norm", "lr")
"""Metrics that a reply must carry. Others are optional, such as `balance_loss`."""


class ReplyReader:
    """Reads the replies of a run and checks them against its settings and its layouts.

    Decoded vectors lie in `home`.
    """

    def __init__(
        self, settings: Settings, spec: StateSpec, probe: Tensor | None, home: Home = MEMORY
    ) -> None:
        self.settings = settings
        self.home = home
        self.spec = spec
        self.probe = probe

    def read(self, message: Message, task: OutTask, means: RoundMeans) -> Reply:
        """Read a reply and check it against its task. Raises WireError."""
        if message.has_error():
            raise wire.error_in(message)
        content = message.content
        answered = wire.json_in(content, wire.TASK)
        expected = {
            "server_round": task.server_round,
            "worker": task.worker,
            "layout_digest": task.layout.digest(),
        }
        for key, value in expected.items():
            if answered.get(key) != value:
                raise WireError(f"answers {key}={answered.get(key)}, this round is {key}={value}")
        metrics = wire.metrics_in(content, REPORTED)
        most = task.steps * self.settings.tokens_per_worker_step
        if not 0 < metrics["tokens"] <= most:
            raise WireError(
                f"metric tokens={metrics['tokens']:g} must be > 0 and <= {most}, "
                "what the settings give a worker in a round"
            )
        counts = counts_in(answered, self.spec.num_layers, self.spec.num_experts)
        most *= self.settings.model.top_k
        if bool((counts.load.sum(1) > most).any()):
            raise WireError(
                f"routing counts of a layer add up to more than {most}, what the settings give a "
                "worker in a round"
            )
        choices = None
        if self.probe is not None:
            choices = choices_in(
                answered,
                self.spec.num_layers,
                self.probe.numel(),
                self.settings.model.top_k,
                self.spec.num_experts,
            )
        residents = task.layout.of_worker(task.worker)
        vectors = {
            name: wire.vectors_in(
                content,
                name,
                self.settings.wire.codecs_up,
                (mean.spec.shared_size, mean.spec.experts_size(residents)),
                self.home.scratch,
            )
            for name, mean in means.by_name.items()
        }
        return Reply(residents, metrics, counts, choices, vectors)
