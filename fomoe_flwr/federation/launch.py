"""Run the same two apps on Flower's simulation engine: `flwr run`, with its environment set up.

A SuperLink of our own is started for the run, with a state folder inside the run directory and a
free port, so that no other run's process is met and nothing is left behind. Whether the run
succeeded is read from its summary: `flwr run --stream` exits 0 even when a run failed.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import psutil

from fomoe_flwr.config import PATHS, Settings, SettingsError
from fomoe_flwr.federation.run_config import quoted
from fomoe_flwr.files import save_text
from fomoe_flwr.run_directory import RunDirectory

_START_SECONDS = 60.0
_CONNECTION = "fomoe"


def run_with_flower(settings: Settings, overrides: Sequence[str]) -> bool:
    """Run on the simulation engine; return whether all rounds were done.

    `overrides` are those that gave `settings`.
    """
    root = project_root()
    run = RunDirectory(Path(settings.output_dir))
    home = run.path / "flower"
    home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    save_text(
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n',
        home / "config.toml",
    )
    words = words_for(settings, overrides)
    run_config = home / "run_config.toml"
    save_text(
        f"overrides = {_toml(shlex.join(words))}\nstate-dir = {_toml(str(run.workers))}\n",
        run_config,
    )
    environment = _environment(home)
    link = _start_superlink(port, home, environment)
    try:
        _wait_until_healthy(link, port, home)
        limits = settings.federation
        federation = (
            f"num-supernodes={settings.layout.num_workers} "
            f"client-resources-num-cpus={limits.cpus_per_worker} "
            f"client-resources-num-gpus={limits.gpus_per_worker}"
        )
        command = [
            _tool("flwr"),
            "run",
            str(root),
            _CONNECTION,
            "--stream",
            "--run-config",
            str(run_config),
            "--federation-config",
            federation,
        ]
        print("+ " + shlex.join(command), flush=True)
        subprocess.run(command, env=environment, cwd=run.path, check=False)
    finally:
        _stop(link)
    summary = run.read_summary()
    return summary.get("status") == "completed" and summary.get("rounds_done") == settings.rounds


def words_for(settings: Settings, overrides: Sequence[str]) -> list[str]:
    """Return the overrides of the run: those given, with paths that hold in any process."""
    paths = (
        {"resume": settings.resume}
        if settings.resume
        else {
            "output_dir": settings.output_dir,
            **{f"{part}.{key}": getattr(getattr(settings, part), key) for part, key in PATHS},
            "layout.path": settings.layout.path,
        }
    )
    named = ("engine=", *(f"{key}=" for key in paths))
    return [
        *(word for word in overrides if not word.startswith(named)),
        *(f"{key}={quoted(path)}" for key, path in paths.items()),
        "engine=flower",
    ]


def project_root() -> Path:
    """Return the checkout that `flwr run` bundles. Raises SettingsError without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "server_app.py").is_file() or not (root / "pyproject.toml").is_file():
        raise SettingsError(
            "engine=flower bundles the project's source folder and none is installed beside "
            f"{root}: install a checkout with `pip install -e .`, or use engine=in_process"
        )
    return root


def _environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Otherwise every run installs the app's dependencies, torch included, into a fresh
        # environment that shadows this one.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # Otherwise Ray joins, or waits for, any cluster that was ever started on this machine.
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        # The SuperLink starts its helpers by name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def _start_superlink(port: int, home: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (home / "superlink.log").open("ab") as log:
        return subprocess.Popen(
            [
                _tool("flower-superlink"),
                "--insecure",
                "--simulation",
                "--isolation",
                "subprocess",
                "--disable-runtime-dependency-installation",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            env=environment,
            cwd=home,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait_until_healthy(link: subprocess.Popen[bytes], port: int, home: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if link.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"Flower's SuperLink did not start; its log is {home / 'superlink.log'}")


def _stop(link: subprocess.Popen[bytes]) -> None:
    """End the SuperLink and every process it started, by pid."""
    try:
        family = [psutil.Process(link.pid), *psutil.Process(link.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        _signal(process, signal.SIGKILL)
    link.wait(timeout=10)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _tool(name: str) -> str:
    """Return the command of this very environment, activated or not."""
    path = Path(sys.executable).parent / name
    return str(path) if path.exists() else name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _toml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
