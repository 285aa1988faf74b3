"""Everything worth knowing about a run before it starts, line by line."""

from __future__ import annotations

from dataclasses import asdict

from fomoe_flwr.config import Settings
from fomoe_flwr.costs.activations import activation_bytes, received_bytes, step_of
from fomoe_flwr.costs.case import Case
from fomoe_flwr.costs.flops import skip_speedup_limit
from fomoe_flwr.costs.memory import (
    FILES_BYTES,
    memory_bytes,
    server_disk,
    server_memory,
    state_bytes,
)
from fomoe_flwr.costs.sheet import Line, Number, quotient
from fomoe_flwr.costs.traffic import num_buffers, predict_bytes, state_factor
from fomoe_flwr.costs.wall_clock import time_lines


def summary(settings: Settings) -> dict[str, Number | str]:
    """Return everything worth knowing before training, under the names that metrics use.

    Bytes are those of one round: sums over all workers, mean over a full cycle (`predict_bytes`).
    A ratio is what another method would send over what this run sends: `ratio/full_replica` for
    full replicas with the same outer step and fragments, `ratio/diloco` for DiLoCo and Photon (full
    replicas, weights only), `ratio/ddp` for data-parallel training (all gradients in every step).
    Warm rounds are left out. `.../worker...` is the largest worker. A round's time is that of the
    site that ends last. Raises SettingsError if no layout can be drawn.
    """
    return {line.key: line.value for line in lines(settings)}


def worker_parameters(settings: Settings) -> int:
    """Return the parameters that the largest worker holds, in the rounds in which it holds most."""
    case = Case(settings)
    return case.counts.total if settings.layout.warm_rounds else max(case.resident)


def lines(settings: Settings) -> list[Line]:
    """Return the cost sheet of a run; raise SettingsError if no layout can be drawn."""
    case = Case(settings)
    return [
        *_identity(case),
        *_parameters(case),
        *_traffic(case),
        *_memory(case),
        *_flops(case),
        *_batches(case),
        *time_lines(case),
    ]


def _identity(case: Case) -> list[Line]:
    fewest, most = case.layout.overlaps
    return [
        Line("model/name", case.settings.model.name),
        Line("model/routing", case.settings.model.routing),
        Line("layout/digest", case.layout.digest()),
        Line("layout/overlap_min", fewest),
        Line("layout/overlap_max", most),
    ]


def _parameters(case: Case) -> list[Line]:
    model, counts = case.settings.model, case.counts
    largest = max(range(case.layout.num_workers), key=lambda worker: case.resident[worker])
    residents = sum(map(len, case.layout.of_worker(largest)))
    expert_size = counts.per_expert_per_layer
    weights = expert_size - (model.hidden_size if model.routing == "partitioned" else 0)
    return [
        Line(
            "params/total",
            counts.total,
            "shared + expert",
            {"shared": counts.shared, "expert": counts.expert},
        ),
        Line(
            "params/active",
            counts.active,
            "total - layers * (experts - top_k) * expert_weights",
            {
                "total": counts.total,
                "layers": model.num_layers,
                "experts": model.num_experts,
                "top_k": model.top_k,
                "expert_weights": weights,
            },
        ),
        Line("params/shared", counts.shared),
        Line(
            "params/expert",
            counts.expert,
            "layers * experts * one_expert",
            {
                "layers": model.num_layers,
                "experts": model.num_experts,
                "one_expert": expert_size,
            },
        ),
        Line("params/router", counts.router),
        Line(
            "params/resident",
            case.resident[largest],
            "shared + residents * one_expert",
            {"shared": counts.shared, "residents": residents, "one_expert": expert_size},
        ),
    ]


def _traffic(case: Case) -> list[Line]:
    settings, sent = case.settings, case.sent
    both = sent.up + sent.down
    full, diloco = (s.up + s.down for s in (case.full_replica, case.diloco))
    steps, workers = settings.local.steps, case.layout.num_workers
    return [
        _bytes(case, "up"),
        _bytes(case, "down"),
        *(
            Line(
                f"bytes/{way}_per_{unit}",
                getattr(sent, way) / number,
                f"bytes_{way} / {unit}s",
                {f"bytes_{way}": getattr(sent, way), f"{unit}s": number},
                "B",
            )
            for unit, number in (("step", steps), ("token", case.round_tokens))
            for way in ("up", "down")
        ),
        *(
            Line(
                f"bytes/{name}_per_round",
                both_ways,
                "workers * one_worker",
                {"workers": workers, "one_worker": both_ways // workers},
                "B",
            )
            for name, both_ways in (("full_replica", full), ("diloco", diloco))
        ),
        # Gradients up and their mean down: as much as a round of DiLoCo.
        Line("bytes/ddp_per_step", diloco, unit="B"),
        *(
            Line(
                f"ratio/{name}",
                quotient(other, both),
                "theirs / (up + down)" if both else "",
                {"theirs": other, "up": sent.up, "down": sent.down},
                "x",
            )
            for name, other in (("full_replica", full), ("diloco", diloco))
        ),
        Line(
            "ratio/ddp",
            quotient(diloco * steps, both),
            "local_steps * one_step / (up + down)" if both else "",
            {"local_steps": steps, "one_step": diloco, "up": sent.up, "down": sent.down},
            "x",
        ),
    ]


def _bytes(case: Case, way: str) -> Line:
    settings, total = case.settings, getattr(case.sent, way)
    key = f"bytes/{way}_per_round"
    if case.is_ring:
        workers = case.layout.num_workers
        terms: dict[str, Number] = {"workers": workers, "ring_bytes": total // workers}
        return Line(key, total, "workers * ring_bytes", terms, "B")
    if way == "down" and settings.outer.fragments > 1 and case.sent.up != case.sent.down:
        # Workers whose residents moved get their whole slices.
        return Line(key, total, unit="B")
    states, fragments = state_factor(settings.outer), settings.outer.fragments
    held, buffers = sum(case.resident), _held_buffers(case)
    terms = {
        "states": states,
        "held": held,
        "buffers": buffers,
        "bytes_per_element": total * fragments / (states * held + buffers),
        "fragments": fragments,
    }
    formula = "(states * held + buffers) * bytes_per_element / fragments"
    return Line(key, total, formula, terms, "B")


def _held_buffers(case: Case) -> int:
    buffers = num_buffers(case.settings.model)
    if case.settings.model.routing == "skip_token":
        return buffers * case.layout.num_workers
    return (
        buffers
        // case.layout.num_experts
        // case.layout.num_layers
        * sum(len(experts) for layer in case.layout.residents for experts in layer)
    )


def _memory(case: Case) -> list[Line]:
    state, resident = state_bytes(case.settings), max(case.resident)
    star = predict_bytes(case.settings, case.layout) if case.is_ring else case.sent
    server = server_memory(case.settings, star)
    disk = server_disk(case.settings, server, max(case.resident))
    return [
        Line(
            "memory/worker_bytes",
            round(state * resident),
            "bytes_per_parameter * resident",
            {"bytes_per_parameter": state, "resident": resident},
            "B",
        ),
        *_peak_memory(case),
        Line(
            "memory/full_replica_bytes",
            round(state * case.counts.total),
            "bytes_per_parameter * total",
            {"bytes_per_parameter": state, "total": case.counts.total},
            "B",
        ),
        Line(
            "memory/server_bytes",
            server.total,
            "state + outer_state + means + message",
            asdict(server),
            "B",
        ),
        Line(
            "memory/server_files_bytes",
            server.in_files,
            "message + slabs",
            {"message": server.message, "slabs": FILES_BYTES},
            "B",
        ),
        Line(
            "disk/server_bytes",
            disk.total,
            "state + checkpoints + means + messages",
            asdict(disk),
            "B",
        ),
    ]


def _peak_memory(case: Case) -> list[Line]:
    """Return the most that a worker takes: on a GPU, unless `local.device=cpu`.

    Without it where another training state is assumed, `costs.bytes_per_parameter`.
    """
    settings, local = case.settings, case.settings.local
    if settings.costs.bytes_per_parameter:
        return []
    device = "cpu" if local.device == "cpu" else "cuda"
    most: dict[str, Number] = {}
    # Workers are many, kinds of them few.
    for resident, executed in dict.fromkeys(zip(case.resident, case.executed, strict=True)):
        step = step_of(settings, executed / settings.model.top_k, device)
        terms: dict[str, Number] = {
            "state": memory_bytes(resident, local.optimizer, local.precision),
            "activations": activation_bytes(settings.model, local.optimizer, resident, step),
            "received": received_bytes(resident, device),
        }
        most = max(most, terms, key=lambda terms: sum(terms.values()))
    total = round(sum(most.values()))
    formula = "state + activations + received"
    return [Line("memory/worker_peak_bytes", total, formula, most, "B")]


def _flops(case: Case) -> list[Line]:
    model, whole = case.settings.model, case.whole_flops
    share = case.mean_executed / model.top_k
    return [
        Line(
            "flops/train_per_token",
            whole.train,
            "3 * (projections + scores + router + experts + head)",
            {
                "projections": whole.projections,
                "scores": whole.scores,
                "router": whole.router,
                "experts": whole.experts,
                "head": whole.head,
            },
            "FLOP",
        ),
        Line(
            "flops/worker_train_per_token",
            case.flops(case.mean_executed).train,
            "train - 3 * (1 - resident_share) * experts",
            {"train": whole.train, "resident_share": share, "experts": whole.experts},
            "FLOP",
        ),
        Line(
            "flops/expert_share",
            whole.expert_share,
            "experts / forward",
            {"experts": whole.experts, "forward": whole.forward},
        ),
        Line(
            "skip/resident_share",
            share,
            "executed / top_k",
            {"executed": case.mean_executed, "top_k": model.top_k},
        ),
        Line(
            "skip/speedup_limit",
            skip_speedup_limit(whole.expert_share, share),
            "1 / (1 - expert_share * (1 - resident_share))",
            {"expert_share": whole.expert_share, "resident_share": share},
            "x",
        ),
    ]


def _batches(case: Case) -> list[Line]:
    local, model = case.settings.local, case.settings.model
    step_tokens = case.layout.num_workers * case.settings.tokens_per_worker_step
    return [
        Line(
            "batch/shared_tokens",
            step_tokens,
            "workers * batch_size * accumulate * sequence_length",
            {
                "workers": case.layout.num_workers,
                "batch_size": local.batch_size,
                "accumulate": local.accumulate,
                "sequence_length": case.settings.data.sequence_length,
            },
        ),
        # All workers together run `executed` experts for every token, spread over all experts.
        Line(
            "batch/expert_tokens",
            step_tokens * case.mean_executed / model.num_experts,
            "shared_tokens * executed / experts",
            {
                "shared_tokens": step_tokens,
                "executed": case.mean_executed,
                "experts": model.num_experts,
            },
        ),
    ]
