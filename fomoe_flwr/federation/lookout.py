"""The lookout: whom a running round waits for, for those who watch the run."""

from __future__ import annotations

import time
from typing import Any

from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.federation.strategy import FoMoEStrategy

_SOON_SECONDS = 1.0
"""What takes no longer is no waiting."""


class Lookout:
    """Looks at a strategy from another thread."""

    def __init__(self, strategy: FoMoEStrategy) -> None:
        self._strategy = strategy
        self._closed: RoundRecord | None = None
        self._since = time.monotonic()

    def close_round(self, record: RoundRecord) -> None:
        """Note that a round is over: from now on the next one waits for nodes."""
        self._closed, self._since = record, time.monotonic()

    def __call__(self) -> list[dict[str, Any]]:
        """List `worker`, what is waited `for` (`node` or `reply`) and `since` (Unix seconds)."""
        record, now = self._strategy.record, time.monotonic()
        try:
            if record is None or record is self._closed:
                missing = self._strategy.seats.missing_workers()
                found, what = dict.fromkeys(missing, self._since), "node"
            else:
                found, what = record.awaited, "reply"
        except RuntimeError:  # It changed while it was read: the next look will do.
            return []
        return [
            {"worker": worker, "for": what, "since": time.time() - (now - since)}
            for worker, since in found.items()
            if now - since > _SOON_SECONDS
        ]
