"""A round's task and result as files of one machine, for the processes that share the work.

Numbers are in safetensors files, which all processes map into memory once; the rest is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fomoe_flwr.config import DataSettings, LocalSettings, Settings
from fomoe_flwr.data.source import NodeData
from fomoe_flwr.model.router_probe import RoutingCounts
from fomoe_flwr.model.state import Entry, StateSpec
from fomoe_flwr.worker.cache import CACHE
from fomoe_flwr.worker.error_feedback import Vectors
from fomoe_flwr.worker.round import RoundResult, RoundTask
from fomoe_flwr.worker.trainer import LocalReport

_COUNTS = ("load", "ghosts", "all_ghost")


def write_task(task: RoundTask, data: NodeData, folder: Path) -> None:
    """Write a task and where its text comes from."""
    tensors = _vectors({"weights": (task.shared, task.experts), **task.moments})
    for name, value in (("pooled_share", task.pooled_share), ("probe", task.probe)):
        if value is not None:
            tensors[name] = value.contiguous()
    save_file(tensors, folder / "task.safetensors")
    fields = {
        "settings": task.settings.to_dict(),
        "worker": task.worker,
        "server_round": task.server_round,
        "residents": [list(layer) for layer in task.residents],
        "state_dir": str(task.state_dir),
        "keep_rounds": list(task.keep_rounds),
        "part": None if task.part is None else asdict(task.part),
        "moments": list(task.moments),
        "data": asdict(data),
    }
    (folder / "task.json").write_text(json.dumps(fields), encoding="utf-8")


def read_task(folder: Path) -> tuple[RoundTask, NodeData]:
    """Read what `write_task` wrote."""
    fields = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "task.safetensors")
    settings: Settings = CACHE.settings(fields["settings"])
    vectors = {name: _pair(tensors, name) for name in ("weights", *fields["moments"])}
    shared, experts = vectors.pop("weights")
    task = RoundTask(
        settings=settings,
        spec=CACHE.spec(settings),
        worker=fields["worker"],
        server_round=fields["server_round"],
        residents=fields["residents"],
        shared=shared,
        experts=experts,
        state_dir=Path(fields["state_dir"]),
        keep_rounds=fields["keep_rounds"],
        part=None if fields["part"] is None else _spec(fields["part"]),
        moments=vectors,
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


def _spec(fields: Mapping[str, Any]) -> StateSpec:
    def entries(kind: str) -> tuple[Entry, ...]:
        return tuple(Entry(**{**e, "shape": tuple(e["shape"])}) for e in fields[kind])

    return StateSpec(
        entries("shared"), entries("expert"), fields["num_layers"], fields["num_experts"]
    )
