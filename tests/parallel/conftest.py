"""One team of two processes for all tests that do not end it: its start takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fomoe_flwr.worker.multi_gpu import WorkerTeam


@pytest.fixture(scope="package")
def team() -> Iterator[WorkerTeam]:
    """Return processes that train rounds."""
    # Imported here: on a machine for GPU tests there need be no library for text.
    from fomoe_flwr.worker.multi_gpu import WorkerTeam

    made = WorkerTeam()
    yield made
    made.close()
