"""The worker's side of the protocol: what a node does with a query and with a task."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict

from fomoe_flwr import __version__
from fomoe_flwr.config import Settings
from fomoe_flwr.costs import parameter_counts
from fomoe_flwr.data.cache import cache_dir, cached_at
from fomoe_flwr.data.inventory import check_worker_text
from fomoe_flwr.data.source import NodeData
from fomoe_flwr.data.tokenizer import tokenizer_digest
from fomoe_flwr.federation import wire
from fomoe_flwr.federation.routing_fields import choices_fields, counts_fields
from fomoe_flwr.federation.task_header import TaskHeader
from fomoe_flwr.federation.wire import WireError
from fomoe_flwr.files import save_text
from fomoe_flwr.model.state import StateSpec
from fomoe_flwr.parallel.choice import num_processes
from fomoe_flwr.parameters.fragments import PSEUDO_GRADIENT, snapshot_step, sync_step
from fomoe_flwr.worker.cache import CACHE
from fomoe_flwr.worker.delay import DELAYED, take_delayed_steps
from fomoe_flwr.worker.device import capacity_gib, check_worker_memory, pick_device
from fomoe_flwr.worker.multi_gpu import NODE_PROCESSES, num_node_processes
from fomoe_flwr.worker.round import RoundResult, RoundTask, run_round


def answer_query(content: RecordDict, context: Context) -> RecordDict:
    """Prepare for a run and say which worker this node plays.

    The node stores the run's tokenizer and tokenises its own text.
    """
    setup = wire.json_in(content, wire.SETUP)
    if setup.get("version") != __version__:
        raise WireError(
            f"the server runs fomoe-flwr {setup.get('version')}, this node {__version__}: "
            "install the same version"
        )
    settings = CACHE.settings(_with_node_overrides(setup["settings"], context))
    _check_spec(settings, str(setup.get("spec_digest")))
    if settings.layout.overlap == settings.layout.num_workers:  # Then this node's share is known.
        device = pick_device(settings.local.device)
        count = num_processes(settings, device.type, torch.cuda.device_count())
        check_worker_memory(settings, parameter_counts(settings.model).total, device, count)
    text = str(setup["tokenizer"])
    if _kept_tokenizer(tokenizer_digest(text)) is None:
        path = _tokenizer_path(tokenizer_digest(text))
        with cached_at(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_text(text, path)
    worker = int(context.node_config.get("partition-id", -1))
    if 0 <= worker < settings.layout.num_workers:
        CACHE.batches(_node_data(settings, worker, text, context), 0)
    answer: dict[str, Any] = {"worker": worker}
    if settings.layout.capacity_reported:
        granted = context.node_config.get("capacity-gib")
        device = pick_device(settings.local.device)
        answer["capacity_gib"] = capacity_gib(granted, settings.layout.capacity_share, device)
    return RecordDict({wire.SETUP: wire.json_record(answer)})


def answer_task(content: RecordDict, context: Context) -> RecordDict:
    """Train one round and return the pseudo-gradient with its metrics."""
    started = time.perf_counter()
    header = TaskHeader.read(content)
    settings = CACHE.settings(_with_node_overrides(header.settings, context))
    spec = _check_spec(settings, header.spec_digest)
    header.check_ranges(settings)
    carried = spec.fragment(header.fragment, settings.outer.fragments)
    vectors = {
        name: wire.vectors_in(
            content,
            name,
            settings.wire.codecs_down,
            (which.shared_size, which.experts_size(header.residents)),
        )
        for name, which in (
            (wire.WEIGHTS, carried),
            *((name, carried.parameters()) for name in header.moments),
        )
    }
    # Decoded vectors are copies: where the caller has dropped the message, this frees its bytes.
    del content
    shared, experts = vectors.pop(wire.WEIGHTS)
    text = _tokenizer_text(header.tokenizer_digest)
    data = _node_data(settings, header.worker, text, context)
    state_dir = _state_dir(context, header)
    check_worker_text(state_dir, settings.data)
    task = RoundTask(
        settings=settings,
        spec=spec,
        worker=header.worker,
        server_round=header.server_round,
        residents=header.residents,
        shared=shared,
        experts=experts,
        state_dir=state_dir,
        keep_rounds=header.keep_rounds,
        fragment=header.fragment,
        moments=vectors,
        pooled_share=None if header.pooled_share is None else torch.tensor(header.pooled_share),
        probe=torch.tensor(header.probe) if header.probe else None,
        continues=header.continues,
        steps=header.steps,
    )
    count = num_node_processes(task)
    if count > 1:
        result = NODE_PROCESSES.run_round(task, data, count)
    else:
        open_batches = partial(CACHE.batches, data)
        result = run_round(task, open_batches)
        if snapshot_step(settings, task.server_round) < sync_step(settings, task.server_round):
            where = (settings, task.state_dir, task.server_round, open_batches)
            DELAYED.put_off(partial(take_delayed_steps, *where))
    in_steps = result.report.seconds - result.seconds_before
    overhead = time.perf_counter() - started - in_steps
    return _reply(header, task, result, overhead)


def _reply(
    header: TaskHeader, task: RoundTask, result: RoundResult, overhead_seconds: float
) -> RecordDict:
    report = result.report
    metrics = {
        "loss": report.loss,
        "last_loss": report.last_loss,
        "balance_loss": report.balance_loss,
        "grad_norm": report.grad_norm,
        "lr": report.lr,
        "tokens": report.tokens,
        "seconds": report.seconds,
        "overhead_seconds": overhead_seconds,
        "ghost_fraction": report.routing.ghost_fraction,
        "all_ghost_fraction": report.routing.all_ghost_fraction,
        "fresh_state": int(result.inner_state_fresh),
        "fresh_experts": result.num_fresh_experts,
    }
    answered = {
        **counts_fields(report.routing),
        "server_round": header.server_round,
        "worker": header.worker,
        "layout_digest": header.layout_digest,
    }
    if result.choices is not None:
        answered |= choices_fields(result.choices)
    content = RecordDict(
        {wire.METRICS: wire.metrics_record(metrics), wire.TASK: wire.json_record(answered)}
    )
    gradient = (result.shared, result.experts)
    for name, (shared, experts) in {PSEUDO_GRADIENT: gradient, **result.moments}.items():
        arrays = wire.encode_pair(shared, experts, task.settings.wire.codecs_up, task.seed)
        content[name] = wire.arrays_of(*arrays)
    return content


def _check_spec(settings: Settings, digest: str) -> StateSpec:
    spec = CACHE.spec(settings)
    if spec.digest() != digest:
        raise WireError(
            f"this node builds model {settings.model.name} with state spec {spec.digest()}, the "
            f"server with {digest}: install the same versions of fomoe-flwr and transformers"
        )
    return spec


def _with_node_overrides(fields: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Let the node's configuration override the run's device and data; the caller checks both."""
    node = context.node_config
    if not all(isinstance(fields.get(section), dict) for section in ("local", "data")):
        raise WireError("settings need the sections local and data")
    local, data = dict(fields["local"]), dict(fields["data"])
    if device := node.get("device"):
        local["device"] = str(device)
    if _has_own_data(context):
        data["path"] = str(node.get("data-path", ""))
        data["dataset"] = str(node.get("dataset", ""))
        data["dataset_config"] = str(node.get("dataset-config", ""))
        data["dataset_revision"] = str(node.get("dataset-revision", ""))
    return {**fields, "local": local, "data": data}


def _has_own_data(context: Context) -> bool:
    return bool(context.node_config.get("data-path") or context.node_config.get("dataset"))


def _node_data(settings: Settings, worker: int, text: str, context: Context) -> NodeData:
    """Open the worker's text: the node's own text if it has any, else a part of the run's."""
    num_parts, part = settings.layout.num_workers, worker
    if _has_own_data(context):
        num_parts, part = 1, 0
    return NodeData(settings.data, settings.local, settings.seed, worker, part, num_parts, text)


def _tokenizer_path(digest: str) -> Path:
    return cache_dir() / "tokenizers" / f"{digest}.json"


def _tokenizer_text(digest: str) -> str:
    # The digest comes from the network and becomes a file name.
    if not re.fullmatch(r"[0-9a-f]{16,64}", digest):
        raise WireError(f"tokenizer digest {digest!r} is not a hex digest")
    text = _kept_tokenizer(digest)
    if text is None:
        raise WireError(f"this node has no tokenizer {digest[:12]}: it must be queried")
    return text


def _kept_tokenizer(digest: str) -> str | None:
    """Return a tokenizer that a query brought, None if it is not there or damaged."""
    try:
        text = _tokenizer_path(digest).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    return text if tokenizer_digest(text) == digest else None


def _state_dir(context: Context, header: TaskHeader) -> Path:
    """Return this worker's folder, in the `state-dir` of the node or run, else in the cache."""
    if not re.fullmatch(r"[0-9a-f]{8,64}", header.run_key):
        raise WireError(f"run key {header.run_key!r} is not a hex key")
    chosen = context.node_config.get("state-dir") or context.run_config.get("state-dir")
    root = Path(str(chosen)) if chosen else cache_dir() / "state"
    return root / header.run_key / f"worker-{header.worker:03d}"


ANSWERS = {"query": answer_query, "train": answer_task}
"""What a node does with a message of each kind."""
