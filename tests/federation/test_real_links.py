"""Two sites with TLS and warm workers, one of them behind a link that fails. Real processes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from lossy_link import LossyLink

from fomoe_flwr.cli.main import main
from fomoe_flwr.federation.deployment.loopback import Loopback
from fomoe_flwr.run.directory import RunDirectory

pytestmark = [pytest.mark.flower, pytest.mark.slow]

BAD = 1
SLOW = 40_000.0
"""Bytes a second: the upload of the tiny model takes some 10 seconds."""


class Sites(Loopback):
    """A loopback federation whose second node reaches the SuperLink through a lossy link."""

    bad_link: LossyLink | None = None

    def _node_command(self, index: int) -> list[str]:
        command = super()._node_command(index)
        if index == BAD:
            if self.bad_link is None:
                host, _, port = self.address.partition(":")
                self.bad_link = LossyLink((host, int(port)))
            command[command.index("--superlink") + 1] = f"127.0.0.1:{self.bad_link.port}"
        return command


class Trial:
    """A run on two sites."""

    def __init__(self, folder: Path, text: Path) -> None:
        self.sites = Sites(folder / "federation", ["", ""])
        self.run = RunDirectory(folder / "run")
        self.words = [
            *("preset=tiny", "layout.num_workers=2", "layout.overlap=2", "local.threads=1"),
            *(f"data.path={text}", f"output_dir={self.run.path}", "layout.rehome_after=0"),
        ]
        self.statuses: list[int] = []
        self._stop = threading.Event()
        self._keeper = threading.Thread(target=self.sites.keep, args=[self._stop])

    @property
    def link(self) -> LossyLink:
        assert self.sites.bad_link is not None
        return self.sites.bad_link

    def begin(self, *words: str) -> threading.Thread:
        command = ["federation", "submit", str(self.sites.folder), *self.words, *words]
        submission = threading.Thread(target=lambda: self.statuses.append(main(command)))
        submission.start()
        return submission

    def keep(self) -> None:
        self._keeper.start()

    def rows(self) -> list[dict[str, Any]]:
        return self.run.read_metrics()

    def wait_for(self, condition: Callable[[], object], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def wait_for_upload(self) -> None:
        """Wait until the bad node has sent a good part of a reply."""
        before = self.link.sent_bytes
        self.wait_for(lambda: self.link.sent_bytes > before + 2 * SLOW)

    def kill_bad_node(self) -> None:
        """Kill its SuperNode and all that belongs to it."""
        family = [psutil.Process(self.sites.pids()[f"node-{BAD}"])]
        family += family[0].children(recursive=True)
        for process in family:
            os.kill(process.pid, signal.SIGKILL)

    def end(self) -> None:
        self._stop.set()
        if self._keeper.is_alive():
            self._keeper.join()
        self.sites.end()
        if self.sites.bad_link is not None:
            self.sites.bad_link.close()


@pytest.fixture
def trial(tmp_path: Path, small_text: Path) -> Iterator[Trial]:
    made = Trial(tmp_path, small_text)
    made.sites.up()
    yield made
    made.end()


@pytest.mark.parametrize(("grace", "timeout", "most"), [(10, 90, 40), (0, 60, 70)])
def test_a_site_that_dies_in_its_upload_does_not_hold_the_round(
    grace: int, timeout: int, most: float, trial: Trial
) -> None:
    limits = [f"federation.grace_seconds={grace}", f"federation.round_timeout_seconds={timeout}"]
    submission = trial.begin(*limits, "rounds=3")
    trial.wait_for(lambda: len(trial.rows()) == 1)
    trial.link.bytes_per_second = SLOW
    trial.wait_for_upload()
    trial.kill_bad_node()
    submission.join(timeout=400)
    rows = trial.rows()
    print([(row["round/participants"], row["round/seconds"]) for row in rows])
    assert trial.statuses == [0]
    assert rows[0]["round/participants"] == [0, 1]
    assert rows[1]["round/participants"] == [0]
    assert rows[1]["round/seconds"] <= most


def test_a_site_that_was_killed_takes_part_again_as_soon_as_it_is_back(trial: Trial) -> None:
    trial.keep()
    limits = ["federation.grace_seconds=15", "federation.round_timeout_seconds=90", "rounds=12"]
    submission = trial.begin(*limits)
    trial.wait_for(lambda: len(trial.rows()) == 2)
    trial.kill_bad_node()
    submission.join(timeout=600)
    assert trial.statuses == [0]
    took_part = [BAD in row["round/participants"] for row in trial.rows()]
    print(took_part)
    log = (trial.sites.folder / "logs" / f"node-{BAD}.log").read_text(errors="replace")
    assert log.count("SuperNode ID") == 2
    missed = took_part.index(False)
    assert True in took_part[missed:]
    back = missed + took_part[missed:].index(True)
    assert all(took_part[back:])


def test_a_reply_counts_although_the_network_was_away_for_longer_than_a_minute(
    trial: Trial,
) -> None:
    submission = trial.begin("rounds=3", "federation.round_timeout_seconds=240")
    trial.wait_for(lambda: len(trial.rows()) == 1)
    trial.link.bytes_per_second = SLOW
    trial.wait_for_upload()
    trial.link.cut()
    cut_at = time.monotonic()
    time.sleep(75)
    trial.link.bytes_per_second = 0
    trial.link.mend()
    submission.join(timeout=500)
    print(time.monotonic() - cut_at, [row["round/seconds"] for row in trial.rows()])
    assert trial.statuses == [0]
    assert [row["round/participants"] for row in trial.rows()] == [[0, 1]] * 3
