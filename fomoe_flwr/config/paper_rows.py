"""The rows of the paper's tables 3 to 6, each a preset by its name: `paper=<name>`.

What rows have in common is `conf/paper/recipe.yaml`. The tables list the default routing, in which
router rows travel with their experts; with `-skip-token` at its end a name means the same row in
the paper's other mode, of which it shows plots only. Rows at full overlap are listed among those of
the fixed layout; a full replica cannot differ by layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

TOTAL_STEPS = 640
GLOBAL_SEQUENCES = 1024
_MICRO_BATCH = 8
_OUTER = {"local-adamw": "local_adamw", "diloco": "nesterov"}


@dataclass(frozen=True)
class PaperRow:
    """One cell of the tables: optimizer, layout, workers (M), local steps (K) and overlap (Oe)."""

    method: str
    kind: str
    num_workers: int
    local_steps: int
    overlap: int
    skip_token: bool = False

    @property
    def name(self) -> str:
        """Return the name of the preset, e.g. `diloco-random-m4-k64-oe2-skip-token`."""
        mode = "-skip-token" if self.skip_token else ""
        return (
            f"{self.method}-{self.kind}-m{self.num_workers}-k{self.local_steps}-oe{self.overlap}"
            + mode
        )

    def node(self) -> dict[str, Any]:
        """Return the row as a Hydra config that goes on from the recipe."""
        return {
            "defaults": [
                "recipe",
                {"override /outer": _OUTER[self.method]},
                {"override /layout": self.kind},
                "_self_",
            ],
            "preset": self.name,
            "rounds": TOTAL_STEPS // self.local_steps,
            "model": {"routing": "skip_token" if self.skip_token else "partitioned"},
            "layout": {"num_workers": self.num_workers, "overlap": self.overlap},
            "local": {
                "steps": self.local_steps,
                "batch_size": _MICRO_BATCH,
                "accumulate": GLOBAL_SEQUENCES // self.num_workers // _MICRO_BATCH,
            },
        }


def _overlaps(kind: str, num_workers: int) -> list[int]:
    powers = [2**i for i in range(num_workers.bit_length()) if 2**i <= num_workers]
    return powers if kind == "fixed" else powers[:-1]


ROWS = tuple(
    PaperRow(method, kind, workers, steps, overlap, skip_token)
    for skip_token, method, kind, steps, workers in product(
        (False, True), _OUTER, ("fixed", "random"), (32, 64, 128), (2, 4, 8)
    )
    for overlap in _overlaps(kind, workers)
)
"""Every row of the tables, then each of them with token skipping."""
