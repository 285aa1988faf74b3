"""The search: which sites, how many holders, how many steps between synchronisations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fomoe_flwr.config import Settings, SettingsError
from fomoe_flwr.costs import as_diloco
from fomoe_flwr.plan.candidate import Candidate, Model, Unfit, Work, fit
from fomoe_flwr.plan.sites import NamedSite, Sites

PENALTY = {
    (32, 2): {1: 111.45, 2: 105.03},
    (32, 4): {1: 121.42, 2: 112.00, 4: 103.91},
    (32, 8): {1: 135.74, 2: 122.49, 4: 114.69, 8: 106.30},
    (64, 2): {1: 112.38, 2: 104.70},
    (64, 4): {1: 130.79, 2: 119.53, 4: 104.47},
    (64, 8): {1: 141.48, 2: 132.39, 4: 121.36, 8: 112.99},
    (128, 2): {1: 120.71, 2: 106.91},
    (128, 4): {1: 143.72, 2: 123.50, 4: 111.89},
    (128, 8): {1: 181.07, 2: 156.84, 4: 138.88, 8: 159.71},
}
"""Perplexity of the paper's 54M proxy by (local steps, workers) and overlap (LocalAdamW, fixed)."""


@dataclass(frozen=True)
class Bounds:
    """What a plan must keep to. Time alone would always ask for more local steps, less overlap."""

    max_local_steps: int = 64
    """The paper's proxy loses much more at 128 than at 32 and 64."""
    min_overlap: int = 0
    """0 means `default_overlap`."""
    headroom: float = 0.2
    """Share of a site's memory that training state must leave free, for activations."""
    batch: int = 0
    """Sequences of a step over all workers; 0 means those of the settings."""

    def check(self) -> None:
        """Raise SettingsError for a bound out of range."""
        for flag, value, is_good, text in (
            ("--max-local-steps", self.max_local_steps, self.max_local_steps >= 1, ">= 1"),
            ("--min-overlap", self.min_overlap, self.min_overlap >= 0, ">= 0"),
            ("--headroom", self.headroom, 0 <= self.headroom < 1, ">= 0 and < 1"),
            ("--batch", self.batch, self.batch >= 0, ">= 0"),
        ):
            if not is_good:
                raise SettingsError(f"{flag}={value} is out of range: it must be {text}")


@dataclass(frozen=True)
class Alternative:
    """What was not chosen, and why."""

    name: str
    reason: str
    candidate: Candidate | None = None


@dataclass(frozen=True)
class Plan:
    """The choice, what it was chosen from, and the settings and bounds that it answers."""

    chosen: Candidate
    alternatives: tuple[Alternative, ...]
    settings: Settings
    bounds: Bounds
    tokens: float


def default_overlap(num_workers: int) -> int:
    """Return the fewest holders whose cost in perplexity the paper puts at about 8 %.

    Half of the workers in its tables, which end at eight workers; from there on the four that it
    recommends.
    """
    return min(4, math.ceil(num_workers / 2))


def penalty(candidate: Candidate) -> float | None:
    """Return how much perplexity the paper's proxy loses to full replicas, None where unknown."""
    workers = len(candidate.sites)
    row = PENALTY.get((candidate.local_steps, workers), {})
    return row[candidate.overlap] / row[workers] - 1 if candidate.overlap in row else None


def make_plan(settings: Settings, sites: Sites, bounds: Bounds) -> Plan:
    """Search for the plan that reaches the token budget soonest.

    Sites are left out one at a time, each time the one that the others wait for. Raises
    SettingsError, saying what would fit, if nothing does.
    """
    bounds.check()
    local = settings.local
    batch = bounds.batch or local.batch_size * local.accumulate * settings.layout.num_workers
    step_tokens = batch * settings.data.sequence_length
    tokens = settings.costs.tokens or settings.rounds * local.steps * step_tokens
    model = Model(settings, bounds.headroom)
    found: list[Candidate] = []
    alternatives: list[Alternative] = []
    left = list(sites.sites)
    while left:
        fitting: list[Candidate] = []
        for overlap in range(1, len(left) + 1):
            least = bounds.min_overlap or default_overlap(len(left))
            name = f"{_sites(left, sites)}, overlap {overlap}"
            if overlap < min(least, len(left)):
                alternatives.append(Alternative(name, f"below the least overlap of {least}"))
                continue
            for steps in _steps(bounds.max_local_steps):
                result = fit(
                    model, left, overlap, steps, batch, tokens, sites.server_bits_per_second
                )
                if isinstance(result, Unfit):
                    alternatives.append(Alternative(name, result.reason))
                    break
                fitting.append(result)
        found += fitting
        work = Work(bounds.max_local_steps, step_tokens // len(left))
        left.remove(_hindrance(model, left, bool(fitting), work))
    if not found:
        raise SettingsError(_explain(model, sites, bounds))
    chosen = min(found, key=lambda each: (each.seconds, -each.overlap, each.local_steps))
    slower = [
        Alternative(
            f"{_sites(each.sites, sites)}, overlap {each.overlap}, {each.local_steps} local steps",
            f"{each.seconds / chosen.seconds:.2f}x the time",
            each,
        )
        for each in _telling(found, chosen)
    ]
    others = _baselines(settings, sites, bounds, batch, tokens, chosen)
    return Plan(chosen, (*slower, *others, *alternatives), settings, bounds, tokens)


def _steps(most: int) -> list[int]:
    """Return powers of two up to the bound, and the bound."""
    powers = [2**n for n in range(3, 20) if 2**n < most]
    return [*powers, most]


def _hindrance(model: Model, left: Sequence[NamedSite], is_fitting: bool, work: Work) -> NamedSite:
    """Return the site to leave out next: the smallest if nothing fits, else the slowest."""
    if not is_fitting:
        return min(left, key=lambda site: (model.room(site), site.memory_bytes))
    return max(left, key=lambda site: model.site_seconds(site, 1, work))


def _telling(found: Iterable[Candidate], chosen: Candidate) -> list[Candidate]:
    """Return the best of each other (sites, overlap), and the chosen one at other local steps."""
    best: dict[tuple[tuple[NamedSite, ...], int], Candidate] = {}
    same = []
    for each in found:
        place = each.sites, each.overlap
        if place == (chosen.sites, chosen.overlap):
            same.append(each)
        elif place not in best or each.seconds < best[place].seconds:
            best[place] = each
    return sorted(
        [*best.values(), *(each for each in same if each is not chosen)],
        key=lambda each: each.seconds,
    )


def _baselines(
    settings: Settings,
    sites: Sites,
    bounds: Bounds,
    batch: int,
    tokens: float,
    chosen: Candidate,
) -> list[Alternative]:
    """Reckon full replicas on all sites, synchronised as often as chosen and at every step."""
    full = Model(as_diloco(settings), bounds.headroom)
    everything, result = settings.model.num_experts, []
    needed = full.memory(everything) / (1 - bounds.headroom)
    small = [site.name for site in sites.sites if site.memory_bytes < needed]
    roomy = _with_memory(sites.sites, needed)
    for name, steps in (("DiLoCo or Photon", chosen.local_steps), ("data-parallel", 1)):
        replica = fit(full, roomy, len(roomy), steps, batch, tokens, sites.server_bits_per_second)
        assert isinstance(replica, Candidate)
        time = f"{replica.seconds / chosen.seconds:.2f}x the time"
        if small:
            time = (
                f"a full replica takes {needed / 2**30:.4g} GiB with headroom, more than "
                f"{', '.join(small)} have; if it fitted: {time}"
            )
        result.append(Alternative(f"{name} on all sites", time, replica))
    return result


def _with_memory(sites: Sequence[NamedSite], needed: float) -> list[NamedSite]:
    """Return the sites as if each had the memory for a full replica."""
    return [replace(site, memory_bytes=max(site.memory_bytes, 2 * needed)) for site in sites]


def _explain(model: Model, sites: Sites, bounds: Bounds) -> str:
    """Say what would fit where nothing does."""
    largest = max(site.memory_bytes for site in sites.sites)
    free, gib = 1 - bounds.headroom, 2**30
    alone = model.memory(1) / free / gib
    number, experts = len(sites.sites), model.settings.model.num_experts
    least = min(bounds.min_overlap or default_overlap(number), number)
    each = model.memory(math.ceil(experts * least / number)) / free / gib
    return (
        f"the model fits on no choice of the {number} sites: {each:.4g} GiB at each of them would "
        f"hold it at overlap {least} (the largest has {largest / gib:.4g} GiB, "
        f"{bounds.headroom:.0%} left for activations); the shared parameters and one expert of "
        f"each layer take {alone:.4g} GiB. Use more sites or memory, --min-overlap or --headroom "
        "lower, fewer bytes of training state (costs.bytes_per_parameter), or a smaller model"
    )


def _sites(chosen: Sequence[NamedSite], sites: Sites) -> str:
    if len(chosen) == len(sites.sites):
        return f"all {len(chosen)} sites"
    missing = [site.name for site in sites.sites if site not in chosen]
    return f"{len(chosen)} sites (without {', '.join(missing)})"
