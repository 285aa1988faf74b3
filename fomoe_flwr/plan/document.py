"""What a plan is written down as: overrides for `fomoe run` and `flwr run`, lines for people."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from fomoe_flwr.costs import shown
from fomoe_flwr.layout import MOVING_KINDS
from fomoe_flwr.plan.candidate import Candidate
from fomoe_flwr.plan.search import Plan, penalty

MARK = "# Written by `fomoe plan`."
"""The first line of both files."""


def plan_overrides(plan: Plan, given: Sequence[str]) -> list[str]:
    """Return the overrides of the planned run: those given, and the plan's in their place."""
    chosen, layout = plan.chosen, plan.settings.layout
    standing = "fixed" if chosen.is_even else "weighted"
    words = {
        "layout.kind": layout.kind if layout.kind in MOVING_KINDS else standing,
        "layout.num_workers": len(chosen.sites),
        "layout.overlap": chosen.overlap,
        "layout.residents": [] if chosen.is_even else list(chosen.residents),
        "local.steps": chosen.local_steps,
        "local.batch_size": chosen.batch_size,
        "local.accumulate": chosen.accumulate,
        "rounds": chosen.rounds,
    }
    return [
        *(word for word in given if word.partition("=")[0] not in words),
        *(
            f"{key}={json.dumps(v, separators=(',', ':')).strip(chr(34))}"
            for key, v in words.items()
        ),
    ]


def plan_yaml(plan: Plan, overrides: Sequence[str]) -> str:
    """Write the plan as YAML: `overrides`, which `fomoe run FILE` takes, and who plays whom."""
    names = [
        f"#   worker {worker}: {site.name}, {held} experts of each layer"
        for worker, (site, held) in enumerate(
            zip(plan.chosen.sites, plan.chosen.residents, strict=True)
        )
    ]
    words = [f"  - {json.dumps(word)}" for word in overrides]
    return "\n".join([MARK, *names, "overrides:", *words, ""])


def plan_toml(overrides: Sequence[str]) -> str:
    """Write the same overrides as TOML, for `flwr run . --run-config FILE`."""
    return f"{MARK}\noverrides = {json.dumps(shlex.join(overrides))}\n"


def plan_json(plan: Plan, overrides: Sequence[str]) -> str:
    """Write choice and alternatives as one JSON object."""
    return json.dumps(
        {
            "overrides": list(overrides),
            "tokens": plan.tokens,
            "chosen": _numbers(plan.chosen),
            "alternatives": [
                {
                    "name": other.name,
                    "reason": other.reason,
                    **({"numbers": _numbers(other.candidate)} if other.candidate else {}),
                }
                for other in plan.alternatives
            ],
        },
        indent=2,
    )


def show_plan(plan: Plan) -> str:
    """Write the choice, what it rests on, and what was not chosen, for people."""
    chosen, bounds = plan.chosen, plan.bounds
    loss = penalty(chosen)
    quality = (
        "the paper has no number for these workers, overlap and local steps"
        if loss is None
        else f"the paper's 54M proxy had {loss:+.1%} perplexity against full replicas here"
    )
    rows = [
        f"plan: {len(chosen.sites)} workers, overlap {chosen.overlap}, "
        f"{chosen.local_steps} local steps, "
        + ("an even layout" if chosen.is_even else "experts by what delays least"),
        f"  {shown(plan.tokens)} tokens in {_span(chosen.seconds)}: {chosen.rounds} rounds of "
        f"{_span(chosen.round.total)}",
        f"  the last site of a round, {chosen.sites[chosen.round.site].name}: "
        f"{_span(chosen.round.down)} down, {_span(chosen.round.compute)} training, "
        f"{_span(chosen.round.up)} up",
        f"  {_size(chosen.bytes_per_round)} a round over all sites; batch a worker "
        f"{chosen.batch_size} x {chosen.accumulate}",
        f"  quality: {quality}; bounds: at most {bounds.max_local_steps} local steps, overlap at "
        + (f"least {bounds.min_overlap}" if bounds.min_overlap else "least half the workers or 4"),
        "sites:",
    ]
    for worker, site in enumerate(chosen.sites):
        rows.append(
            f"  worker {worker} {site.name:<16} {chosen.residents[worker]:>4} experts a layer, "
            f"{_size(chosen.memory_bytes[worker])} of {_size(site.memory_bytes)}"
        )
    rows.append("not chosen:")
    rows += [f"  {other.name}: {other.reason}" for other in plan.alternatives]
    return "\n".join(rows)


def _numbers(candidate: Candidate) -> dict[str, object]:
    return {
        "sites": [site.name for site in candidate.sites],
        "overlap": candidate.overlap,
        "local_steps": candidate.local_steps,
        "residents": list(candidate.residents),
        "rounds": candidate.rounds,
        "round_seconds": candidate.round.total,
        "seconds": candidate.seconds,
        "memory_bytes": list(candidate.memory_bytes),
        "bytes_per_round": candidate.bytes_per_round,
        "penalty": penalty(candidate),
    }


def _span(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def _size(num_bytes: float) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= length:
            return f"{num_bytes / length:.4g} {unit}"
    return f"{num_bytes / 1e3:.4g} kB"
