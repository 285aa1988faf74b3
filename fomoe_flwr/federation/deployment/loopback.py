"""A secure federation on one machine: SuperLink, SuperExec and SuperNodes, kept alive.

It differs from a federation of several hosts (docs/deploy.md) only in its addresses: TLS with an
authority of its own, SuperNodes that prove themselves with registered keys, process isolation, and
a database, so that a run survives a restart of the SuperLink. A keeper starts all processes,
restarts those that end, and ends all of them when it ends itself. If it is killed, its guardian
ends them. `state_in_memory` gives up the database for speed: a run then ends with the SuperLink.

    credentials/      see `credentials`        federation.json  ports, nodes, registered node ids
    flower/           Flower's own folder      pids.json        {process: pid}, of the keeper too
    link.db           the SuperLink's state    events.jsonl     what started and ended, and when
    logs/             one a process            nodes/NAME/      a node's inner state
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fomoe_flwr.errors import InputError, RunError
from fomoe_flwr.federation.deployment.credentials import (
    LOCAL_NAMES,
    make_authority,
    make_node_key,
    make_secret,
    make_server_certificate,
)
from fomoe_flwr.federation.deployment.gpus import gpus_of_machine, share_of_node
from fomoe_flwr.federation.deployment.guardian import Guardian
from fomoe_flwr.federation.deployment.process_family import (
    ProcessError,
    end_family,
    environment,
    family,
    free_port,
    send,
    shorten,
    start,
    take_colours_out,
    tool,
    wait_until_healthy,
)
from fomoe_flwr.federation.deployment.submission import SuperLink
from fomoe_flwr.federation.warm.folder import MOST_FOLDER_BYTES
from fomoe_flwr.files import append_line, check_folder, save_json, save_text

CONNECTION = "fomoe"
"""Name of the SuperLink in Flower's configuration."""

_HOST = "127.0.0.1"
_START_SECONDS = 60.0
_ADMISSION_SECONDS = 120.0
"""How long nodes may take until they are let in."""
_LOOK_SECONDS = 0.5
_LINK, _EXEC = "superlink", "superexec"


class FederationFolderError(InputError):
    """A federation folder that cannot be used; the text says why and what to do."""


@dataclass
class Daemon:
    """One process of the federation, started again whenever it ends."""

    name: str
    command: list[str]
    log: Path
    pauses: Sequence[float]
    """Seconds to wait before the first, second, ... restart in a row; the last for all others."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """What its environment has besides the federation's."""
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    due: float = 0.0
    """Monotonic time of the next start."""
    started: float = 0.0

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def pause(self) -> float:
        """Return how long to wait before the next start, longer while it keeps failing."""
        if time.monotonic() - self.started > 2 * max(self.pauses):
            self.failures = 0
        self.failures += 1
        return self.pauses[min(self.failures, len(self.pauses)) - 1]


@dataclass
class Loopback:
    """A federation in a folder; `nodes` are the SuperNodes' `--node-config` words, in order."""

    folder: Path
    nodes: Sequence[str] = ()
    state_in_memory: bool = False
    """Whether the SuperLink keeps its state in memory: faster, but a run ends with it."""
    _state: dict[str, Any] = field(default_factory=dict)
    _daemons: dict[str, Daemon] = field(default_factory=dict)
    _guardian: Guardian | None = None

    def __post_init__(self) -> None:
        self.folder = self.folder.expanduser().resolve()
        self.home = self.folder / "flower"
        self.credentials = self.folder / "credentials"
        self._logs = self.folder / "logs"
        self._state = _read_json(self.folder / "federation.json")

    @property
    def address(self) -> str:
        """Host and port of the SuperLink."""
        return f"{_HOST}:{self._state['port']}"

    @property
    def link(self) -> SuperLink:
        """The SuperLink, to submit runs to."""
        return SuperLink(self.home, CONNECTION, self.folder)

    @property
    def variables(self) -> dict[str, str]:
        """The environment of every process of the federation."""
        ward = {} if self._guardian is None else self._guardian.ward
        return environment(self.home, self.folder) | ward

    def up(self) -> None:
        """Make what is missing and start everything; return when all nodes are connected.

        Raises FederationFolderError for a folder in use, and ProcessError for a process that does
        not start.
        """
        self._claim()
        self._prepare()
        self._guardian = Guardian()
        try:
            link = self._daemon(_LINK, self._link_command(), (1.0, 2.0, 5.0))
            self._start(link)
            self._wait(self.address, link)
            self._register()
            self._start(self._daemon(_EXEC, self._exec_command(), (1.0, 2.0, 5.0)))
            nodes, gpus = self._state["nodes"], gpus_of_machine()
            for index, node in enumerate(nodes):
                # A node that was killed is refused until the SuperLink has noticed: up to a minute.
                daemon = self._daemon(node["name"], self._node_command(index), (2.0, 5.0, 10.0))
                daemon.variables = share_of_node(gpus, index, len(nodes))
                self._start(daemon)
            self._wait_for_nodes()
        except BaseException:
            self.end()
            raise

    def keep(self, stop: threading.Event) -> None:
        """Restart what ends, and keep logs short, until `stop` is set."""
        while not stop.wait(_LOOK_SECONDS):
            for daemon in self._daemons.values():
                self._look_after(daemon)

    def _wait_for_nodes(self) -> None:
        """Wait until all nodes are healthy; restart those that are refused at first."""
        deadline = time.monotonic() + _ADMISSION_SECONDS
        for node in self._state["nodes"]:
            daemon = self._daemons[node["name"]]
            while True:
                try:
                    self._wait(f"{_HOST}:{node['port']}", daemon)
                    break
                except ProcessError:
                    if time.monotonic() >= deadline:
                        raise
                    self._look_after(daemon)
                    time.sleep(_LOOK_SECONDS)

    def end(self) -> None:
        """End every process of the federation, nodes first, so that they can sign off.

        The SuperLink takes a node that did not sign off for alive, and refuses it for a minute.
        """
        nodes = [d.process for name, d in self._daemons.items() if name not in (_LINK, _EXEC)]
        processes = [psutil.Process(p.pid) for p in nodes if p is not None and p.poll() is None]
        for process in processes:
            send(process, signal.SIGTERM)
        psutil.wait_procs(processes, timeout=10)
        self._daemons.clear()
        ended = end_family(self.folder)
        if self._guardian is not None:
            self._guardian.dismiss()
        for log in self._logs.glob("*.log"):
            take_colours_out(log)
        self._note("federation", "ended", processes=ended)
        (self.folder / "pids.json").unlink(missing_ok=True)

    def pids(self) -> dict[str, int]:
        """Return {process: pid} as last written down; empty if the federation is not up."""
        return {name: int(pid) for name, pid in _read_json(self.folder / "pids.json").items()}

    def check(self) -> None:
        """Refuse a folder with anything in it that no federation wrote. Raises InputError."""
        if not (self.folder / "federation.json").is_file():
            names = ("keeper.log", "pids.json", self.home.name, "credentials", self._logs.name)
            check_folder(self.folder, "FOLDER", names)

    def _claim(self) -> None:
        if family(self.folder):
            raise FederationFolderError(
                f"{self.folder} is up already: end it with `fomoe federation down {self.folder}`"
            )

    def _prepare(self) -> None:
        """Make credentials, ports and Flower's configuration where they are missing."""
        self._logs.mkdir(parents=True, exist_ok=True)
        self.home.mkdir(exist_ok=True)
        if not (self.credentials / "server.key").exists():
            make_authority(self.credentials)
            make_server_certificate(self.credentials, LOCAL_NAMES)
            make_secret(self.credentials / "superexec.secret")
        if not self._state:
            self._state = {"port": free_port(), "nodes": []}
        for index in range(len(self._state["nodes"]), len(self.nodes)):
            name = f"node-{index}"
            make_node_key(self.credentials, name)
            self._state["nodes"].append({"name": name, "port": free_port()})
        for node, words in zip(self._state["nodes"], self.nodes, strict=False):
            node["config"] = words
        if not self._state["nodes"]:
            raise FederationFolderError(f"{self.folder} has no nodes: give their number")
        self._save()
        save_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "{self.address}"\n'
            f'root-certificates = "{self.credentials / "ca.crt"}"\n',
            self.home / "config.toml",
        )

    def _register(self) -> None:
        """Tell the SuperLink the public keys that it does not know yet."""
        for node in self._state["nodes"]:
            if "id" in node and not self.state_in_memory:
                continue
            done = subprocess.run(
                [
                    *(tool("flwr"), "supernode", "register"),
                    str(self.credentials / f"{node['name']}.pub"),
                    *(CONNECTION, "--name", node["name"], "--format", "json"),
                ],
                env=self.variables,
                capture_output=True,
                text=True,
                timeout=_START_SECONDS,
                check=False,
            )
            answer = _json_in(done.stdout)
            if not answer.get("success"):
                raise RunError(
                    f"the SuperLink did not register {node['name']}: {done.stdout}{done.stderr}"
                )
            if not self.state_in_memory:
                node["id"] = str(answer["node-id"])
                self._save()

    def _save(self) -> None:
        save_json(self._state, self.folder / "federation.json")

    def _link_command(self) -> list[str]:
        return [
            tool("flower-superlink"),
            *self._certificates(),
            *("--enable-supernode-auth", "--isolation", "process"),
            *("--superexec-auth-secret-file", str(self.credentials / "superexec.secret")),
            *(() if self.state_in_memory else ("--database", str(self.folder / "link.db"))),
            "--disable-runtime-dependency-installation",
            *("--host", _HOST, "--port", str(self._state["port"])),
        ]

    def _exec_command(self) -> list[str]:
        return [
            tool("flower-superexec"),
            *("--root-certificates", str(self.credentials / "ca.crt")),
            *("--runtime-api-address", self.address),
            *("--superexec-auth-secret-file", str(self.credentials / "superexec.secret")),
        ]

    def _node_command(self, index: int) -> list[str]:
        node = self._state["nodes"][index]
        state = self.folder / "nodes" / node["name"]
        config = f'partition-id={index} state-dir="{state}" {node.get("config", "")}'
        # Short, because it holds a socket.
        warm = self.folder / f"w{index}"
        if len(os.fsencode(warm)) <= MOST_FOLDER_BYTES:
            config += f' worker-dir="{warm}"'
        return [
            tool("flower-supernode"),
            *("--root-certificates", str(self.credentials / "ca.crt")),
            *("--auth-supernode-private-key", str(self.credentials / node["name"])),
            *("--superlink", self.address),
            # Its connection to the apps that it starts is encrypted, too.
            *self._certificates(),
            *("--host", _HOST, "--port", str(node["port"])),
            *("--node-config", config.strip()),
        ]

    def _certificates(self) -> list[str]:
        return [
            *("--ssl-ca-certfile", str(self.credentials / "ca.crt")),
            *("--ssl-certfile", str(self.credentials / "server.crt")),
            *("--ssl-keyfile", str(self.credentials / "server.key")),
        ]

    def _daemon(self, name: str, command: list[str], pauses: Sequence[float]) -> Daemon:
        self._daemons[name] = Daemon(name, command, self._logs / f"{name}.log", pauses)
        return self._daemons[name]

    def _start(self, daemon: Daemon) -> None:
        variables = {**self.variables, **daemon.variables}
        daemon.process = start(daemon.command, variables, self.folder, daemon.log)
        daemon.started, daemon.due = time.monotonic(), 0.0
        pids = {d.name: d.process.pid for d in self._daemons.values() if d.process is not None}
        save_json({"keeper": os.getpid(), **pids}, self.folder / "pids.json")
        self._note(daemon.name, "started", pid=daemon.process.pid)

    def _wait(self, address: str, daemon: Daemon) -> None:
        authority = self.credentials / "ca.crt"
        wait_until_healthy(address, authority, lambda: daemon.is_alive, daemon.log, _START_SECONDS)

    def _look_after(self, daemon: Daemon) -> None:
        shorten(daemon.log)
        if daemon.is_alive:
            return
        if not daemon.due:
            assert daemon.process is not None
            pause = daemon.pause()
            daemon.due = time.monotonic() + pause
            self._note(
                daemon.name,
                "ended",
                pid=daemon.process.pid,
                status=daemon.process.returncode,
                again_in_seconds=pause,
            )
        elif time.monotonic() >= daemon.due:
            self._start(daemon)
            if daemon.name == _LINK and self.state_in_memory:
                self._wait(self.address, daemon)
                self._register()

    def _note(self, process: str, event: str, **more: object) -> None:
        stamp = {"time": time.time(), "process": process, "event": event}
        append_line(self.folder / "events.jsonl", {**stamp, **more})


def end_federation(folder: Path) -> int:
    """End whatever runs of the federation in `folder`, its keeper first; return how many."""
    folder = folder.expanduser().resolve()
    if not (folder / "federation.json").is_file():
        raise FederationFolderError(f"{folder} is no federation: it has no federation.json")
    keeper = _read_json(folder / "pids.json").get("keeper")
    ended = 0
    if keeper is not None and psutil.pid_exists(int(keeper)) and int(keeper) != os.getpid():
        process = psutil.Process(int(keeper))
        # A pid may have been given to another program since.
        if "federation" in process.cmdline():
            process.terminate()
            psutil.wait_procs([process], timeout=30)
            ended += 1
    ended += end_family(folder)
    (folder / "pids.json").unlink(missing_ok=True)
    return ended


def _json_in(text: str) -> dict[str, Any]:
    """Return the JSON object that a command printed, whatever it printed before it."""
    begin = text.find("{")
    try:
        found = json.loads(text[begin:]) if begin >= 0 else {}
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, json.JSONDecodeError) as error:
        raise FederationFolderError(f"cannot read {path}: {error}") from error
    return found if isinstance(found, dict) else {}
