"""The lines of a cost sheet that are seconds."""

from __future__ import annotations

from fomoe_flwr.costs.case import Case
from fomoe_flwr.costs.duration import RoundSeconds
from fomoe_flwr.costs.memory import state_bytes
from fomoe_flwr.costs.sheet import Line, quotient


def time_lines(case: Case) -> list[Line]:
    """Return the time of a step, a round and a run, and of the same run by other methods."""
    steps = case.settings.local.steps
    ours = case.seconds(case.sent, steps, is_full=False)
    others = {
        "full_replica": (case.seconds(case.full_replica, steps, is_full=True), steps),
        "diloco": (case.seconds(case.diloco, steps, is_full=True), steps),
        "ddp": (case.seconds(case.diloco, 1, is_full=True), 1),
    }
    rounds = case.budget / case.round_tokens
    run = rounds * ours.total
    result = [
        _step(case, ours.site),
        _transfer(case, "down", ours),
        Line(
            "time/compute_seconds",
            ours.compute,
            "local_steps * step",
            {"local_steps": steps, "step": ours.compute / steps},
            "s",
        ),
        _transfer(case, "up", ours),
        Line(
            "time/round_seconds",
            ours.total,
            "down + compute + up - hidden",
            {"down": ours.down, "compute": ours.compute, "up": ours.up, "hidden": ours.hidden},
            "s",
        ),
        Line(
            "time/run_seconds",
            run,
            "tokens / tokens_per_round * round_seconds",
            {
                "tokens": case.budget,
                "tokens_per_round": case.round_tokens,
                "round_seconds": ours.total,
            },
            "s",
        ),
    ]
    for name, (seconds, taken) in others.items():
        theirs = rounds * steps / taken * seconds.total
        result += [
            Line(
                f"time/{name}_run_seconds",
                theirs,
                "tokens / tokens_between * seconds",
                {
                    "tokens": case.budget,
                    "tokens_between": case.round_tokens * taken // steps,
                    "seconds": seconds.total,
                },
                "s",
            ),
            Line(
                f"speedup/{name}",
                quotient(theirs, run),
                "theirs / ours",
                {"theirs": theirs, "ours": run},
                "x",
            ),
        ]
    return result


def _step(case: Case, worker: int) -> Line:
    costs = case.settings.costs
    if case.is_ring:
        worker = max(range(case.layout.num_workers), key=case.step_seconds)
    flops = case.flops(case.executed[worker]).train
    optimizer = " + state_bytes / (state_gb_per_second * 1e9)" if costs.state_gb_per_second else ""
    tokens = case.settings.tokens_per_worker_step
    return Line(
        "time/step_seconds",
        case.step_seconds(worker),
        "tokens * flops_per_token / (site_teraflops * 1e12 * mfu)" + optimizer,
        {
            "tokens": tokens,
            "flops_per_token": flops,
            "site_teraflops": costs.site_teraflops,
            "mfu": costs.mfu,
            "state_bytes": case.resident[worker] * state_bytes(case.settings),
            "state_gb_per_second": costs.state_gb_per_second,
        },
        "s",
    )


def _transfer(case: Case, way: str, ours: RoundSeconds) -> Line:
    """Write out the transfer of the site that ends last; a ring's counts as up."""
    costs, seconds = case.settings.costs, getattr(ours, way)
    key = f"time/{way}_seconds"
    if not seconds:
        return Line(key, seconds, unit="s")
    own = (
        case.sent.up_per_worker[ours.site] if way == "up" else case.sent.down_per_worker[ours.site]
    )
    mbps, latency = getattr(costs, f"{way}_mbps"), costs.latency_seconds
    if case.is_ring:
        mbps, latency = min(costs.up_mbps, costs.down_mbps), latency * case.ring_stages(False)
    elif costs.server_mbps and getattr(case.sent, way) / costs.server_mbps > own / mbps:
        own, mbps = getattr(case.sent, way), costs.server_mbps
    return Line(
        key,
        seconds,
        "latency + 8 * bytes / (mbps * 1e6)",
        {"latency": latency, "bytes": own, "mbps": mbps},
        "s",
    )
