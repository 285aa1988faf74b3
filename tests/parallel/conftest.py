"""One team of two processes for all tests that do not end it: its start takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fomoe_flwr.worker.multi_gpu import NodeProcesses


@pytest.fixture(scope="package")
def team() -> Iterator[NodeProcesses]:
    """Return processes that train rounds."""
    # Imported here: on a machine for GPU tests there need be no library for text.
    from fomoe_flwr.worker.multi_gpu import NodeProcesses

    made = NodeProcesses()
    yield made
    made.close()
