"""The compose file: started under podman, from the image's build to the end of a run.

What it is about is in a table: every line is one thing that people need of these files.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from compose_project import BASE, ROOT, ComposeProject, free_port, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.flower,
    pytest.mark.skipif(bool(missing()), reason=f"needs {', '.join(missing())}"),
]

ROUNDS = 6
RUN = "/var/lib/fomoe/runs/first"


@dataclass
class Ended:
    """A run on two nodes, of which one was killed."""

    project: ComposeProject
    text: str
    lines: list[dict[str, object]]
    seen_at_kill: int
    status: str
    checks: dict[str, str]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    # FOMOE_COMPOSE_STORE keeps images from one run of the tests to the next.
    own = os.environ.get("FOMOE_COMPOSE_STORE")
    store = Path(own) if own else tmp_path_factory.mktemp("store")
    project = ComposeProject(tmp_path_factory.mktemp("compose") / "fomoetest", store)
    if not project.has(BASE):
        project.make_base()
    torch = os.environ.get("FOMOE_COMPOSE_TORCH", "torch")
    project.build(f"--build-arg=TORCH={torch}")
    pages = sorted((ROOT / "docs").glob("*.md"))
    text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
    (project.folder / "data" / "text.txt").write_text(text, encoding="utf-8")
    own_text = project.folder / "own"
    own_text.mkdir()
    (own_text / "text.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8"))
    (project.folder / ".env").write_text(
        f'PORT={free_port()}\nDATA_1=./own\nNODE_1=\'data-path="/data" device="cpu"\'\n'
    )
    try:
        yield _train(project)
    finally:
        project.down()
        if not own:
            project.run("podman", "rmi", "--all", "--force", check=False)


def _train(project: ComposeProject) -> Ended:
    project.compose("--profile=admin", "run", "--rm", "setup")
    project.compose("--profile=server", "up", "--detach")
    project.wait_until_healthy("superlink", "superexec")
    project.compose("--profile=admin", "run", "--rm", "register")
    project.compose("--profile=node", "up", "--detach")
    project.wait_until_healthy("supernode-0", "supernode-1")
    checks = {
        name: project.inside(service, "sh", "-c", command, check=False)
        for name, (service, command, _) in PROBES.items()
    }
    words = ["preset=tiny", "layout.num_workers=2", f"rounds={ROUNDS}", f"output_dir={RUN}"]
    words += ["data.path=/data", "federation.grace_seconds=5", "layout.rehome_after=1"]
    said: list[str] = []

    def submit() -> None:
        said.append(
            project.compose("--profile=admin", "run", "--rm", "submit", *words, seconds=600)
        )

    following = threading.Thread(target=submit)
    following.start()
    seen = _wait_for_rounds(project, 2)
    # As if it died by itself: `podman kill` tells podman that it shall stay down.
    os.kill(project.pid("supernode-1"), signal.SIGKILL)
    following.join(timeout=600)
    assert said, "the run did not end"
    return Ended(
        project=project,
        text=said[0],
        lines=_metrics(project),
        seen_at_kill=seen,
        status=project.inside("superexec", "fomoe", "status", RUN),
        checks=checks,
    )


def _metrics(project: ComposeProject) -> list[dict[str, object]]:
    text = project.inside("superexec", "cat", f"{RUN}/metrics.jsonl", check=False)
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def _wait_for_rounds(project: ComposeProject, count: int, seconds: float = 300) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if len(found := _metrics(project)) >= count:
            return len(found)
        time.sleep(1)
    raise RuntimeError(project.run("podman", "logs", "--tail=40", project.name("superexec")))


# What a container sees: {what: (service, command, what it prints)}.
PROBES = {
    "no service runs as root": ("superlink", "id -u", "10001\n"),
    "a node sees its own key alone": ("supernode-1", "ls /run/secrets", "ca.crt\nnode-1\n"),
    "the server's key is read by uid 10001": (
        "superlink",
        "head -n1 /run/secrets/server.key",
        "-----BEGIN PRIVATE KEY-----\n",
    ),
    "the SuperExec sees no server key": (
        "superexec",
        "ls /run/secrets",
        "ca.crt\nsuperexec.secret\n",
    ),
    "the system is read-only": (
        "supernode-0",
        "touch /opt/fomoe/x 2>/dev/null || echo refused",
        "refused\n",
    ),
    "no capabilities": ("supernode-0", "grep CapBnd /proc/1/status", "CapBnd:\t0000000000000000\n"),
    "no new privileges": ("superexec", "grep NoNewPrivs /proc/1/status", "NoNewPrivs:\t1\n"),
    "text is not written": (
        "supernode-0",
        "touch /data/x 2>/dev/null || echo refused",
        "refused\n",
    ),
    "a node has its own text if it is told": (
        "supernode-1",
        "tr '\\0' '\\n' </proc/1/cmdline | grep -o 'data-path.*'; ls /data",
        'data-path="/data" device="cpu"\ntext.txt\n',
    ),
    "a node without words shares the run's text": (
        "supernode-0",
        "grep -c data-path /proc/1/cmdline; ls /data",
        "0\ntext.txt\n",
    ),
    "no credentials or history in the image": (
        "superlink",
        "ls -d /opt/fomoe/.git /opt/fomoe/tests /opt/fomoe/deploy/compose/credentials "
        "2>/dev/null || true",
        "",
    ),
}


@pytest.mark.parametrize("probe", PROBES)
def test_a_container_sees_what_it_needs_and_no_more(probe: str, ended: Ended) -> None:
    assert ended.checks[probe] == PROBES[probe][2]


def test_a_run_is_submitted_and_ends_though_a_node_was_killed(ended: Ended) -> None:
    assert "finished:completed" in ended.text
    assert f"completed, round {ROUNDS} of {ROUNDS}" in ended.status
    assert len(ended.lines) == ROUNDS
    assert ended.seen_at_kill < ROUNDS


def test_both_nodes_trained_before_the_kill_and_one_was_missed_after(ended: Ended) -> None:
    counted = [line["round/workers_ok"] for line in ended.lines]
    assert counted[: ended.seen_at_kill] == [2] * ended.seen_at_kill
    assert 1 in counted[ended.seen_at_kill :]


def test_a_node_that_died_is_started_again_and_let_in(ended: Ended) -> None:
    assert ended.project.containers("supernode-1") == {ended.project.name("supernode-1"): "running"}
    ended.project.wait_until_healthy("supernode-1")


def test_the_tasks_of_a_node_are_done_by_a_warm_worker(ended: Ended) -> None:
    log = ended.project.inside("supernode-0", "cat", "/var/lib/fomoe/worker/worker.log")
    assert log.count("train: done") >= ROUNDS - 1


def test_a_second_setup_keeps_the_credentials(ended: Ended) -> None:
    before = (ended.project.folder / "credentials" / "ca.crt").read_bytes()
    said = ended.project.compose("--profile=admin", "run", "--rm", "setup", check=False)
    assert "ca.key" in said
    assert (ended.project.folder / "credentials" / "ca.crt").read_bytes() == before
