"""`fomoe federation`: credentials, a secure federation on this machine, and runs on any of them."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fomoe_flwr.cli.paths import given_path
from fomoe_flwr.cli.train import add_log_format, exit_status
from fomoe_flwr.events import tell

if TYPE_CHECKING:
    from fomoe_flwr.config import Settings
    from fomoe_flwr.federation.deployment.loopback import Loopback
    from fomoe_flwr.federation.deployment.submission import SuperLink

_EXAMPLES = """examples:
  fomoe federation run /tmp/fed preset=tiny layout.num_workers=3   # up, train, down
  fomoe federation up /tmp/fed --nodes 3 --detach                  # or step by step
  fomoe federation submit /tmp/fed preset=tiny layout.num_workers=3
  fomoe federation down /tmp/fed
  fomoe federation credentials /etc/fomoe --host link.example.org  # for real hosts: docs/deploy.md
  fomoe federation node-key /etc/fomoe berlin
"""


def add_federation(commands: Any) -> None:
    """Add `federation` and its own commands to the command line."""
    parent = commands.add_parser(
        "federation",
        help="a secure federation: credentials, processes, runs; see docs/deploy.md",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = parent.add_subparsers(required=True, metavar="COMMAND")
    text = "SuperLink, SuperExec and SuperNodes on this machine: TLS, registered node keys"
    up = own.add_parser("up", help="start a federation and keep it alive", description=text)
    up.add_argument("folder", type=given_path, metavar="FOLDER", help="made if it is not there")
    _add_nodes(up)
    up.add_argument("--detach", action="store_true", help="return once it is up")
    up.set_defaults(run=_up)
    down = own.add_parser("down", help="end every process of a federation, by pid")
    down.add_argument("folder", type=given_path, metavar="FOLDER")
    down.set_defaults(run=_down)
    run = own.add_parser("run", help="up, submit, down; exit status 0 if all rounds were done")
    run.add_argument("folder", type=given_path, metavar="FOLDER", help="made if it is not there")
    _add_nodes(run)
    _add_run(run)
    run.set_defaults(run=_run)
    submit = own.add_parser(
        "submit", help="train on a federation that is up; exit status 0 if all rounds were done"
    )
    submit.add_argument(
        "folder", type=given_path, metavar="FOLDER", help="with flower/config.toml in it"
    )
    _add_run(submit)
    submit.set_defaults(run=_submit)
    keys = own.add_parser(
        "credentials", help="make an authority, a server certificate and a SuperExec secret"
    )
    keys.add_argument("folder", type=given_path, metavar="FOLDER")
    keys.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME",
        help="name or address by which nodes reach the SuperLink; repeat for more; "
        "localhost and superlink (compose) are always among them",
    )
    keys.set_defaults(run=_credentials)
    node = own.add_parser("node-key", help="make a SuperNode's key pair")
    node.add_argument("folder", type=given_path, metavar="FOLDER")
    node.add_argument("name", metavar="NAME")
    node.set_defaults(run=_node_key)


def _add_nodes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=3, help="SuperNodes, default: %(default)s")
    parser.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="WORDS",
        help="what a node says of itself, first one first, e.g. "
        '\'data-path="/data/a" capacity-gib=0.5 device="cpu"\'',
    )
    parser.add_argument(
        "--superlink-state",
        choices=("disk", "memory"),
        default="disk",
        help="where the SuperLink keeps messages and runs: `memory` is faster for large models, "
        "but a run does not outlive the SuperLink; default: %(default)s",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE|FILE.yaml")
    parser.add_argument(
        "--resume-on-failure",
        type=int,
        default=0,
        metavar="N",
        help="resume the run whenever it ends early; give up after N attempts without progress",
    )
    add_log_format(parser)


def _loopback(options: argparse.Namespace) -> Loopback:
    from fomoe_flwr.federation.deployment.loopback import Loopback

    count = max(options.nodes, len(options.node))
    words = [*options.node, *[""] * (count - len(options.node))]
    federation = Loopback(options.folder, words, options.superlink_state == "memory")
    federation.check()
    return federation


def _up(options: argparse.Namespace) -> int:
    if options.detach:
        return _detach(options)
    federation = _loopback(options)
    federation.up()
    print(f"up at {federation.address}; end it with Ctrl-C or SIGTERM", flush=True)
    try:
        federation.keep(_until_signal())
    finally:
        federation.end()
    return 0


def _detach(options: argparse.Namespace) -> int:
    """Start the keeper as a process of its own; return when its nodes are up."""
    _loopback(options)  # Refuses a folder of somebody else's before anything is written.
    folder = options.folder.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fomoe_flwr.cli", "federation", "up", str(folder)]
    command += ["--nodes", str(options.nodes), *(f"--node={words}" for words in options.node)]
    command += ["--superlink-state", options.superlink_state]
    log = folder / "keeper.log"
    with log.open("wb") as sink:
        keeper = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    while keeper.poll() is None and not log.read_text(errors="replace").startswith("up at"):
        time.sleep(0.1)
    print(log.read_text(errors="replace").strip().replace("Ctrl-C or SIGTERM", f"down {folder}"))
    return keeper.returncode or 0


def _down(options: argparse.Namespace) -> int:
    from fomoe_flwr.federation.deployment.loopback import end_federation

    count = end_federation(options.folder)
    told = f"ended {count} process{'es' * (count > 1)}" if count else "no process of it ran"
    print(told)
    return 0


def _run(options: argparse.Namespace) -> int:
    from fomoe_flwr.run.preflight import preflight

    # In this order: the run directory may lie in the federation's folder.
    federation, stop = _loopback(options), threading.Event()
    settings, words = _asked(options)
    preflight(settings)
    federation.up()
    keeper = threading.Thread(target=federation.keep, args=[stop], daemon=True)
    keeper.start()
    try:
        return _train(options, settings, words, federation.link)
    finally:
        stop.set()
        keeper.join()
        federation.end()


def _submit(options: argparse.Namespace) -> int:
    from fomoe_flwr.federation.deployment.launch import is_complete
    from fomoe_flwr.federation.deployment.loopback import Loopback
    from fomoe_flwr.run.preflight import preflight
    from fomoe_flwr.run.rerun import words_to_go_on

    settings, words = _asked(options)
    if again := words_to_go_on(settings):
        # The same command after a reboot is the same run.
        settings, words = _settings_of(again), again
        if is_complete(settings):
            _say(f"{settings.output_dir} is completed: nothing to do")
            return 0
    preflight(settings)
    return _train(options, settings, words, Loopback(options.folder).link)


def _asked(options: argparse.Namespace) -> tuple[Settings, list[str]]:
    """Return the settings that were asked for, and the words that gave them."""
    from fomoe_flwr.config import expand_files

    words = expand_files(options.overrides)
    return _settings_of(words), words


def _settings_of(words: list[str]) -> Settings:
    from fomoe_flwr.config import load_settings
    from fomoe_flwr.model.source import settle
    from fomoe_flwr.run.directory import absolute

    return absolute(load_settings([*words, "engine=flower"], settle))


def _train(
    options: argparse.Namespace, settings: Settings, words: list[str], link: SuperLink
) -> int:
    from fomoe_flwr import report
    from fomoe_flwr.federation.deployment.submission import run_once, supervise
    from fomoe_flwr.run.directory import RunDirectory

    if options.resume_on_failure:
        done = supervise(link, settings, words, options.resume_on_failure, _say)
    else:
        done = run_once(link, settings, words, _say)
    run = RunDirectory(Path(settings.output_dir))
    if run.read_metrics():  # The server is on this machine.
        report.print_end(run)
    return exit_status(settings, done)


def _credentials(options: argparse.Namespace) -> int:
    from fomoe_flwr.federation.deployment import credentials

    credentials.make_authority(options.folder)
    names = dict.fromkeys([*options.host, *credentials.LOCAL_NAMES])
    credentials.make_server_certificate(options.folder, list(names))
    credentials.make_secret(options.folder / "superexec.secret")
    print(f"made ca.crt, ca.key, server.crt, server.key and superexec.secret in {options.folder}")
    return 0


def _node_key(options: argparse.Namespace) -> int:
    from fomoe_flwr.federation.deployment.credentials import make_node_key

    path = make_node_key(options.folder, options.name)
    print(f"made {path} (stays on the node) and {path}.pub (register it at the SuperLink)")
    return 0


def _until_signal() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _say(text: str) -> None:
    tell("submission", text)
