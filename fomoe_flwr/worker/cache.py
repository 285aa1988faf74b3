"""What a process keeps from round to round, so that a worker does not pay for it again.

Settings that were checked, specs that were built, text that was opened, and one model whose weights
the next round overwrites. Every entry is a function of its key alone, so results are the same, bit
by bit, with the cache and without. Many runs may share a process; old entries make room for new.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fomoe_flwr.config import Settings, settings_from_dict
from fomoe_flwr.data.batches import Batches
from fomoe_flwr.data.corpus import signature
from fomoe_flwr.data.source import NodeData, NodeText
from fomoe_flwr.data.tokenizer import tokenizer_digest
from fomoe_flwr.model.execution import Execution
from fomoe_flwr.model.families import transformers_config
from fomoe_flwr.model.residency import Residents, build_model, fill_slots
from fomoe_flwr.model.state import StateSpec, cast_parameters
from fomoe_flwr.parallel.team import ALONE, Team
from fomoe_flwr.worker.training_model import TrainingModel

MOST_ENTRIES = 4
"""Settings, specs and texts that are kept; models are large, of them there is one."""

_T = TypeVar("_T")


class WorkerCache:
    """Makes what a round needs, or hands out what an earlier round made.

    What it hands out is shared: only the model may be changed, by one round at a time.
    """

    def __init__(self) -> None:
        self._settings: _Latest[Settings] = _Latest()
        self._specs: _Latest[tuple[PreTrainedConfig, StateSpec]] = _Latest()
        self._texts: _Latest[NodeText] = _Latest()
        self._models: dict[str, TrainingModel] = {}

    def clear(self) -> None:
        """Forget everything."""
        for kept in (self._settings, self._specs, self._texts):
            kept.clear()
        self.drop_model()

    def drop_model(self) -> None:
        """Give back the memory of the model that waits for the next round."""
        for model in self._models.values():
            model.close()
        self._models.clear()

    def settings(self, fields: Mapping[str, Any]) -> Settings:
        """Return the settings that travelled as JSON, checked. Raises SettingsError."""
        key = json.dumps(fields, sort_keys=True)
        return self._settings.get(key, lambda: settings_from_dict(fields))

    def spec(self, settings: Settings) -> StateSpec:
        """Return the spec of the settings' model."""
        return self._spec(settings)[1]

    def batches(self, data: NodeData, position: int) -> Batches:
        """Open a worker's batches at batch `position` of the run. Raises DataError."""
        if data.data.dataset:
            return data.batches(position)
        tokenizer = tokenizer_digest(data.tokenizer_json)
        key = repr((data.data, signature(data.data), tokenizer, data.num_parts, data.seed))
        return data.batches(position, self._texts.get(key, data.read))

    @contextmanager
    def model(
        self,
        settings: Settings,
        residents: Residents,
        device: torch.device,
        team: Team = ALONE,
    ) -> Iterator[TrainingModel]:
        """Lend a model of these residents, prepared for its execution, with weights of any value.

        The model is split among the team; a process belongs to one team at most.

        A model of the same shapes is used again. If a round failed, its model is not used again:
        nobody knows what the round left in it.
        """
        counts = [len(layer) for layer in residents]
        # `local` and `balance` belong to the key too: they change the model and its passes.
        of_model = settings.model, settings.data.sequence_length, settings.execution
        of_passes = settings.local, settings.balance
        key = repr((of_model, of_passes, counts, device, team.name))
        training = self._models.pop(key, None)
        # Drop the old model first: memory holds only one.
        self.drop_model()
        if training is None:
            team.let_go()
            config = self._spec(settings)[0]

            def arrange(built: PreTrainedModel) -> None:
                # Cast before the model is split: shards cannot change their type.
                cast_parameters(built, settings.local.precision)
                team.arrange(built)

            model = build_model(
                settings.model, config, residents, device=device, empty=True, arrange=arrange
            )
            execution = Execution.choose(settings, device, team.size)
            execution.prepare(model)
            team.take(model)
            training = TrainingModel(model, settings, team, execution)
        else:
            fill_slots(training.model, residents)
        yield training
        training.model.zero_grad(set_to_none=True)
        self._models = {key: training}

    def _spec(self, settings: Settings) -> tuple[PreTrainedConfig, StateSpec]:
        def make() -> tuple[PreTrainedConfig, StateSpec]:
            config = transformers_config(settings.model, settings.data.sequence_length)
            return config, StateSpec.of(settings.model, config)

        return self._specs.get(repr((settings.model, settings.data.sequence_length)), make)


class _Latest(Generic[_T]):
    """The values that were asked for last, by key."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _T] = OrderedDict()

    def get(self, key: str, make: Callable[[], _T]) -> _T:
        value = self._kept.pop(key) if key in self._kept else make()
        self._kept[key] = value
        while len(self._kept) > MOST_ENTRIES:
            self._kept.popitem(last=False)
        return value

    def clear(self) -> None:
        self._kept.clear()


CACHE = WorkerCache()
"""This process's own."""
