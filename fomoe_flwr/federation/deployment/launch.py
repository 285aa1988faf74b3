"""Run the same two apps on Flower's simulation engine: `flwr run`, with its environment set up.

The run gets a SuperLink of its own, with a free port and a state folder inside the run directory.
So it meets no process of another run and leaves nothing behind. Whether the run succeeded is read
from its summary, because `flwr run --stream` exits 0 even when a run failed.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fomoe_flwr.config import PATHS, Settings, quoted
from fomoe_flwr.events import pass_on, tell
from fomoe_flwr.federation.deployment.app_folder import app_folder
from fomoe_flwr.federation.deployment.guardian import Guardian
from fomoe_flwr.federation.deployment.process_family import (
    end_family,
    environment,
    free_port,
    start,
    take_colours_out,
    tool,
    wait_until_healthy,
)
from fomoe_flwr.files import check_file, save_text
from fomoe_flwr.run.directory import RunDirectory

_START_SECONDS = 60.0
_CONNECTION = "fomoe"
_MARK = "# Written by `fomoe`."


def run_with_flower(settings: Settings, overrides: Sequence[str]) -> bool:
    """Run on the simulation engine; return whether all rounds were done.

    `overrides` are those that gave `settings`.
    """
    run = RunDirectory(Path(settings.output_dir))
    home = run.path / "flower"
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    save_text(
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n',
        home / "config.toml",
    )
    run_config = home / "run_config.toml"
    write_run_config(run_config, settings, overrides, run.workers)
    guardian, log = Guardian(), home / "superlink.log"
    variables = environment(home, home) | guardian.ward
    link = start(_link_command(port), variables, home, log)
    try:
        wait_until_healthy(
            f"127.0.0.1:{port}", None, lambda: link.poll() is None, log, _START_SECONDS
        )
        limits = settings.federation
        federation = (
            f"num-supernodes={settings.layout.num_workers} "
            f"client-resources-num-cpus={limits.cpus_per_worker} "
            f"client-resources-num-gpus={limits.gpus_per_worker}"
        )
        with app_folder() as root:
            command = [
                *(tool("flwr"), "run", str(root), _CONNECTION, "--stream"),
                *("--run-config", str(run_config), "--federation-config", federation),
            ]
            text = shlex.join(command)
            tell("command", f"+ {text}", command=text)
            _follow(command, variables, run.path)
    finally:
        end_family(home)
        guardian.dismiss()
        take_colours_out(log)
    return is_complete(settings)


def _follow(command: list[str], variables: dict[str, str], folder: Path) -> None:
    """Run a command and pass on what it prints; it never meets a console that is gone."""
    with subprocess.Popen(
        command,
        env=variables,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                pass_on(line.rstrip("\n"))
        except BaseException:
            child.kill()
            raise


def write_run_config(
    path: Path, settings: Settings, overrides: Sequence[str], state_dir: Path | None = None
) -> None:
    """Write what `flwr run --run-config` takes for these settings.

    `state_dir` is where workers keep their state; without it the nodes decide.
    """
    check_file(path, "the run's configuration", _MARK)
    text = f"{_MARK}\noverrides = {_toml(shlex.join(words_for(settings, overrides)))}\n"
    if state_dir is not None:
        text += f"state-dir = {_toml(str(state_dir))}\n"
    save_text(text, path)


def is_complete(settings: Settings) -> bool:
    """Tell from a run's summary whether all of its rounds were done."""
    summary = RunDirectory(Path(settings.output_dir)).read_summary()
    return summary.get("status") == "completed" and summary.get("rounds_done") == settings.rounds


def words_for(settings: Settings, overrides: Sequence[str]) -> list[str]:
    """Return the given overrides, with paths that are valid in every process."""
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


def _link_command(port: int) -> list[str]:
    return [
        tool("flower-superlink"),
        "--insecure",
        "--simulation",
        *("--isolation", "subprocess"),
        "--disable-runtime-dependency-installation",
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


def _toml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
