"""What is synchronised when: fragments of the model, and the moments of Adam.

A round ends with one synchronisation. With `outer.fragments` = F > 1 it carries one F-th of the
model, in rotation (Streaming DiLoCo, arXiv 2501.18512), so a key is synchronised every F rounds.
LocalAdamW carries both Adam moments with the parameters; DES-LOC (arXiv 2505.22549) carries them
every `first_moment_every` and `second_moment_every` synchronisations of their fragment. No torch.
"""

from __future__ import annotations

from fomoe_flwr.config import OuterSettings, Settings
from fomoe_flwr.parameters.keys import has_layer, layer_of

PSEUDO_GRADIENT = "pseudo_gradient"
"""Name of the vectors that every reply carries: global minus local weights."""
FIRST_MOMENT, SECOND_MOMENT = "exp_avg", "exp_avg_sq"
MOMENTS = (FIRST_MOMENT, SECOND_MOMENT)
"""Names of Adam's moments, torch's own."""


def sync_step(settings: Settings, server_round: int) -> int:
    """Return how many steps of the run lie before the synchronisation point of a round."""
    return server_round * settings.local.steps


def snapshot_step(settings: Settings, server_round: int) -> int:
    """Return how many steps lie before what a worker sends for a round is taken.

    The last round of a run has no delay, so that no step is thrown away.
    """
    delay = settings.outer.delay_steps if 0 < server_round < settings.rounds else 0
    return sync_step(settings, server_round) - delay


def fragment_of_round(outer: OuterSettings, server_round: int) -> int:
    """Return the fragment that the round synchronises at its end; rounds count from 1."""
    return (server_round - 1) % outer.fragments


def fragment_rows(key: str, num_rows: int, fragment: int, num_fragments: int) -> tuple[int, int]:
    """Return the rows [start, stop) of a state key that belong to a fragment.

    Layers are dealt out in turn, whole; keys outside the layers (embedding, final norm, head) are
    cut along their first axis, so that no fragment carries a whole embedding.
    """
    if not has_layer(key):
        return num_rows * fragment // num_fragments, num_rows * (fragment + 1) // num_fragments
    return (0, num_rows) if layer_of(key) % num_fragments == fragment else (0, 0)


def moments_of_round(outer: OuterSettings, server_round: int) -> tuple[str, ...]:
    """Return the moments that workers send with the parameters at the end of the round."""
    if outer.name == "local_adamw":
        return MOMENTS
    if outer.name != "des_loc":
        return ()
    turn = (server_round - 1) // outer.fragments + 1
    periods = (outer.first_moment_every, outer.second_moment_every)
    return tuple(m for m, every in zip(MOMENTS, periods, strict=True) if turn % every == 0)
