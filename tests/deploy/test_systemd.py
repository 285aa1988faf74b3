"""The units: started by a systemd, from the installation to the end of a run.

What it is about is in a table: every line is one thing that people need of these files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from systemd_machine import SystemdMachine, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.flower,
    pytest.mark.skipif(bool(missing()), reason=f"needs {', '.join(missing())}"),
]

ROUNDS = 20
RUN = "/var/lib/fomoe/runs/first"
SECOND = {"berlin": "paris"}
UNITS = (
    "fomoe-superlink",
    "fomoe-superexec",
    "fomoe-supernode@berlin",
    "fomoe-worker@berlin",
    "fomoe-run@first",
)
MOST_EXPOSED = 1.5


@dataclass
class Ended:
    """A run on two nodes, through a reboot."""

    machine: SystemdMachine
    before: int
    status: str
    lines: list[dict[str, Any]]
    journal: str
    probes: dict[str, str]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    # FOMOE_SYSTEMD_ROOT keeps the machine after the tests, to look at.
    own = os.environ.get("FOMOE_SYSTEMD_ROOT")
    folder = Path(own) if own else tmp_path_factory.mktemp("systemd")
    machine, log = SystemdMachine(folder / "root"), folder / "console.log"
    machine.make()
    try:
        machine.boot(log)
        yield _train(machine, log)
    finally:
        machine.off()


def _train(machine: SystemdMachine, log: Path) -> Ended:
    machine.follow("Server")
    machine.follow("Node")
    machine.follow("Node", SECOND)
    change = "sed -i 's/^PORT=.*/PORT=9095/; s/partition-id=0/partition-id=1/' /etc/fomoe/paris.env"
    machine.run(f"{change}; systemctl restart fomoe-supernode@paris")
    machine.follow("Run")
    machine.wait(lambda: _rounds(machine) >= 3, 180)
    probes = {name: machine.run(script, check=False) for name, (script, _) in PROBES.items()}
    machine.reboot(log)
    before = _rounds(machine)
    machine.wait(lambda: _state(machine) != "active", 400)
    return Ended(
        machine,
        before,
        machine.run(f"/opt/fomoe/bin/fomoe status {RUN}"),
        [json.loads(line) for line in machine.run(f"cat {RUN}/metrics.jsonl").splitlines()],
        machine.run("journalctl --no-pager --output=cat --boot --unit=fomoe-run@first"),
        probes,
    )


def _rounds(machine: SystemdMachine) -> int:
    return len(machine.run(f"cat {RUN}/metrics.jsonl 2>/dev/null || true").splitlines())


def _state(machine: SystemdMachine) -> str:
    return machine.run("systemctl is-active fomoe-run@first", check=False)


def _process(unit: str) -> str:
    return f"/proc/$(systemctl show --value --property=MainPID {unit})"


PROBES = {
    "all units go": (
        f"systemctl is-active {' '.join(UNITS)} | sort | uniq -c | xargs",
        f"{len(UNITS)} active",
    ),
    "none runs as root": ("ps -o user= -C fomoe,flower-superlin | sort -u", "fomoe"),
    "no verdict against the units": (
        f"systemd-analyze verify {' '.join(f'{unit}.service' for unit in UNITS)}",
        "",
    ),
    "keys are root's own": (
        "stat -c '%U %a' /etc/fomoe/berlin /etc/fomoe/server.key",
        "root 600\n" * 2,
    ),
    "fomoe cannot read keys": (
        "runuser -u fomoe -- cat /etc/fomoe/server.key >/dev/null 2>&1 || echo refused",
        "refused",
    ),
    "a unit sees its own credentials only": (
        f"ls {_process('fomoe-superexec')}/root/run/credentials/*",
        "ca.crt\nsuperexec.secret",
    ),
    "the system is not written": (
        f"nsenter -m -t $(basename {_process('fomoe-worker@berlin')}) touch /etc/x 2>/dev/null "
        "|| echo refused",
        "refused",
    ),
    "a temporary folder of its own": (
        rf"grep -cE '/systemd-private-\S+ /tmp ' {_process('fomoe-superexec')}/mountinfo",
        "1",
    ),
    "no device but the harmless": (
        f"ls {_process('fomoe-worker@berlin')}/root/dev | grep -cE 'console|tun|vd|sd|nvidia'",
        "0",
    ),
    "the cache is where caches are": ("ls -d /var/cache/fomoe/fomoe", "/var/cache/fomoe/fomoe"),
    "no source folder is left": ("ls /mnt/checkout | wc -l", "0"),
}


@pytest.mark.parametrize("probe", PROBES)
def test_a_unit_sees_what_it_needs_and_no_more(probe: str, ended: Ended) -> None:
    assert ended.probes[probe] == PROBES[probe][1].strip()


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_a_unit_little_exposed(unit: str, ended: Ended) -> None:
    said = ended.machine.run(f"systemd-analyze --no-pager security {unit}.service | tail -1")
    found = re.search(r"exposure level for .*: ([\d.]+)", said)
    assert found, said
    assert float(found[1]) <= MOST_EXPOSED


def test_a_run_goes_on_after_a_reboot_and_ends(ended: Ended) -> None:
    assert 3 <= ended.before < ROUNDS
    assert f"resuming {RUN} after round {ended.before}" in ended.journal
    assert f"completed, round {ROUNDS} of {ROUNDS}" in ended.status
    assert [line["round"] for line in ended.lines] == [*range(1, ROUNDS + 1)]
    state = "systemctl show --property=Result,ExecMainStatus fomoe-run@first | sort | xargs"
    assert ended.machine.run(state) == "ExecMainStatus=0 Result=success"


def test_both_nodes_trained_before_and_after(ended: Ended) -> None:
    assert [line["round/workers_ok"] for line in ended.lines] == [2] * ROUNDS


def test_the_tasks_of_a_node_are_done_by_its_warm_worker(ended: Ended) -> None:
    for node in ("berlin", "paris"):
        log = ended.machine.run(f"journalctl --no-pager --output=cat --unit=fomoe-worker@{node}")
        assert log.count("train: done") >= ROUNDS


def test_a_run_that_is_completed_is_left_alone(ended: Ended) -> None:
    before = ended.machine.run(f"stat -c %Y {RUN}/summary.json")
    ended.machine.run("systemctl start fomoe-run@first")
    ended.machine.wait(lambda: _state(ended.machine) == "inactive", 60)
    said = ended.machine.run("journalctl --no-pager --output=cat --unit=fomoe-run@first | tail -3")
    assert f"{RUN} is completed: nothing to do" in said
    assert ended.machine.run(f"stat -c %Y {RUN}/summary.json") == before


def test_a_run_with_other_settings_is_refused_with_the_reason(ended: Ended) -> None:
    ended.machine.run(
        "sed -i 's/rounds=20/local.lr=0.5/' /etc/fomoe/first.yaml; systemctl start fomoe-run@first"
    )
    ended.machine.wait(lambda: _state(ended.machine) == "failed", 60)
    said = ended.machine.run("journalctl --no-pager --output=cat --unit=fomoe-run@first | tail -5")
    assert "holds a run with other settings: local.lr=0.5 (there " in said
