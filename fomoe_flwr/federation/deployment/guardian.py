"""The guardian: a small process that ends what a starter leaves behind when it is killed.

The starter holds the only writing end of the guardian's stdin. That pipe closes when the starter
ends, however it ends. The guardian then ends the starter's wards: all processes that have its mark
in their environment, which children inherit. It reads other processes' environments, as Linux and
macOS let it for processes of the same user.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fomoe_flwr.federation.deployment.process_family import end_family

WARD = "FOMOE_STARTER"
"""Environment variable that tells by which starter a process was started."""


class Guardian:
    """A guardian process of this process; `ward` is what its wards need in their environment."""

    def __init__(self) -> None:
        mark = secrets.token_hex(8)
        self.ward = {WARD: mark}
        own = {name: value for name, value in os.environ.items() if name != WARD}
        own["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fomoe_flwr.federation.deployment.guardian", mark],
            env=own,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Whoever ends the starter's group shall not end the guardian.
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """End the guardian: its wards need it no more."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def guarded_children() -> Iterator[None]:
    """Make wards of all processes that this one starts meanwhile."""
    guardian, before = Guardian(), os.environ.get(WARD)
    os.environ |= guardian.ward
    try:
        yield
    finally:
        os.environ.pop(WARD)
        if before is not None:
            os.environ[WARD] = before
        guardian.dismiss()


def _guard(mark: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    end_family(mark, WARD)


if __name__ == "__main__":
    _guard(sys.argv[1])
