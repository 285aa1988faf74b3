"""A round's task and result as files of one machine, for the processes that share the work.

Numbers are in safetensors files, which all processes map into memory once; the rest is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fomoe_flwr.config import DataSettings, LocalSettings
from fomoe_flwr.data.source import NodeData
from fomoe_flwr.model.router_probe import RoutingCounts
from fomoe_flwr.worker.cache import CACHE
from fomoe_flwr.worker.error_feedback import Vectors
from fomoe_flwr.worker.round import RoundResult, RoundTask
from fomoe_flwr.worker.trainer import LocalReport

_TASK_FIELDS = (
    *("worker", "server_round", "residents", "keep_rounds", "fragment", "continues", "steps"),
)
_COUNTS = ("load", "ghosts", "all_ghost")


def write_task(task: RoundTask, data: NodeData, folder: Path) -> None:
    """Write a task and where its text comes from."""
    tensors = _vectors({"weights": (task.shared, task.experts), **task.moments})
    for name in ("pooled_share", "probe"):
        if (value := getattr(task, name)) is not None:
            tensors[name] = value.contiguous()
    save_file(tensors, folder / "task.safetensors")
    fields = {name: getattr(task, name) for name in _TASK_FIELDS} | {
        "settings": task.settings.to_dict(),
        "state_dir": str(task.state_dir),
        "moments": list(task.moments),
        "data": asdict(data),
    }
    (folder / "task.json").write_text(json.dumps(fields), encoding="utf-8")


def read_task(folder: Path) -> tuple[RoundTask, NodeData]:
    """Read what `write_task` wrote."""
    fields = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "task.safetensors")
    settings = CACHE.settings(fields["settings"])
    shared, experts = _pair(tensors, "weights")
    task = RoundTask(
        settings=settings,
        spec=CACHE.spec(settings),
        shared=shared,
        experts=experts,
        state_dir=Path(fields["state_dir"]),
        moments={name: _pair(tensors, name) for name in fields["moments"]},
        **{name: fields[name] for name in _TASK_FIELDS},
        pooled_share=tensors.get("pooled_share"),
        probe=tensors.get("probe"),
    )
    data = dict(fields["data"])
    data["data"] = DataSettings(**data["data"])
    data["local"] = LocalSettings(**data["local"])
    return task, NodeData(**data)


def write_result(result: RoundResult, folder: Path) -> None:
    """Write what a round gave."""
    routing = result.report.routing
    tensors = _vectors({"gradient": (result.shared, result.experts), **result.moments})
    tensors |= {name: getattr(routing, name).contiguous() for name in _COUNTS}
    if result.choices is not None:
        tensors["choices"] = result.choices.contiguous()
    save_file(tensors, folder / "result.safetensors")
    report = {key: value for key, value in vars(result.report).items() if key != "routing"}
    fields = {
        "report": report,
        "tokens": routing.tokens,
        "moments": list(result.moments),
        "inner_state_fresh": result.inner_state_fresh,
        "num_fresh_experts": result.num_fresh_experts,
    }
    (folder / "result.json").write_text(json.dumps(fields), encoding="utf-8")


def read_result(folder: Path) -> RoundResult:
    """Read what `write_result` wrote."""
    fields = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "result.safetensors")
    routing = RoutingCounts(tokens=fields["tokens"], **{name: tensors[name] for name in _COUNTS})
    shared, experts = _pair(tensors, "gradient")
    return RoundResult(
        shared=shared,
        experts=experts,
        moments={name: _pair(tensors, name) for name in fields["moments"]},
        report=LocalReport(**fields["report"], routing=routing),
        inner_state_fresh=fields["inner_state_fresh"],
        num_fresh_experts=fields["num_fresh_experts"],
        choices=tensors.get("choices"),
    )


def _vectors(pairs: Mapping[str, Vectors]) -> dict[str, Tensor]:
    return {
        f"{name}/{kind}": vector.contiguous()
        for name, pair in pairs.items()
        for kind, vector in zip(("shared", "experts"), pair, strict=True)
    }


def _pair(tensors: Mapping[str, Tensor], name: str) -> Vectors:
    return tensors[f"{name}/shared"], tensors[f"{name}/experts"]
