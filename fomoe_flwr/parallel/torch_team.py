"""A team of several processes: torch's own FSDP2 or DDP around one worker's model.

Under DDP every process holds the worker's whole replica, ghosts left out as ever; under FSDP2 every
parameter, an expert stack [R, ...] too, is cut along its first axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fomoe_flwr.config import LocalSettings
from fomoe_flwr.errors import InputError
from fomoe_flwr.parallel.batch_split import BatchSplit
from fomoe_flwr.parallel.team import Team, to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fomoe_flwr.data.batches import Batches

_T = TypeVar("_T")


class TorchTeam(Team):
    """The processes of torch's default process group; `name` is `ddp` or `fsdp`."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._shell: Any = None
        self._is_last_pass = True
        self._shape: list[int] = []
        if name == "fsdp":
            self._mesh = init_device_mesh(device.type, (self.size,))

    def arrange(self, model: PreTrainedModel) -> None:
        """Cut the parameters of a model on the meta device: no process ever allocates them all."""
        if self.name != "fsdp":
            return
        if len({parameter.dtype for parameter in model.parameters()}) > 1:
            raise InputError(
                "local.parallel=fsdp must be ddp or none with local.precision=bfloat16_parameters: "
                f"{type(model).__name__} keeps some weights in fp32"
            )
        # Of a layer without residents there is nothing to cut.
        empty = {parameter for parameter in model.parameters() if not parameter.numel()}
        for layer in model.base_model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=self._mesh, ignored_params=empty)
        self._shell = fully_shard(_Shell(model), mesh=self._mesh, ignored_params=empty)

    def take(self, model: PreTrainedModel) -> None:
        """Put DDP around a model; FSDP2 already is."""
        self._shape = []
        if self.name == "ddp":
            self._shell = DistributedDataParallel(
                _Shell(model),
                # Weights are copied from the same file, and loss-free biases move alike.
                init_sync=False,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )

    def let_go(self) -> None:
        """Forget the model taken last."""
        self._shell = None

    def run(self, function: Callable[..., _T], model: PreTrainedModel, *arguments: object) -> _T:
        """Return `function(model, *arguments)`; gradients are averaged as backward goes.

        DDP does so in a step's last pass. FSDP2 does in every pass: to wait would take memory for
        whole gradients, and it was chosen because memory is short.
        """
        is_training = torch.is_grad_enabled()
        if self.name == "ddp":
            if not is_training:
                return function(model, *arguments)
            with nullcontext() if self._is_last_pass else self._shell.no_sync():
                result: _T = self._shell(function, *arguments)
            return result
        result = self._shell(function, *arguments)
        if not is_training:
            for module in self._shell.modules():
                if isinstance(module, FSDPModule):
                    # FSDP2 does so by itself only in a backward pass.
                    module.reshard()
        return result

    def passes(self, settings: LocalSettings) -> int:
        """Return the forward and backward passes of this process in a step."""
        return BatchSplit.of(settings, self.size).passes

    def micro_batches(
        self, batches: Batches, settings: LocalSettings, device: torch.device
    ) -> Iterator[tuple[Tensor, float]]:
        """Yield this process's windows and their weight; the first process reads for all.

        So a text or stream is read once, has one cursor, and may be anything that gives batches.
        """
        split = BatchSplit.of(settings, self.size)
        index, rows = split.place(self.rank)
        share = split.share(self.rank)
        for number in range(split.passes):
            windows = None
            if self.is_first:
                windows = torch.stack([batches.next_batch() for _ in range(split.together)])
            windows_here = self._from_first(windows, device)
            self._is_last_pass = number == split.passes - 1
            yield windows_here[index, rows], share

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over the processes."""
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def _from_first(self, tensor: Tensor | None, device: torch.device) -> Tensor:
        """Broadcast ids of the first process; all that belong to a model have one 3-d shape."""
        if not self._shape:
            # Read it once only: reading makes the host wait for the device.
            shape = torch.tensor(tensor.shape if tensor is not None else (0, 0, 0), device=device)
            dist.broadcast(shape, 0)
            self._shape = shape.tolist()
        if tensor is None:
            tensor = torch.empty(self._shape, dtype=torch.long, device=device)
        else:
            tensor = to_device(tensor, device)
        dist.broadcast(tensor, 0)
        return tensor


class _Shell(nn.Module):
    """A model whose forward pass is any function of it.

    Losses call parts of a model; the hooks of FSDP2 and DDP need one module around all of that.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Return `function(model, *arguments)`."""
        return function(self.model, *arguments)
