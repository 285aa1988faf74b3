"""Measure what a round takes besides its local steps, in simulation and in deployment.

    python benchmarks/rounds.py simulation
    python benchmarks/rounds.py deployment --nodes 2
    python benchmarks/rounds.py simulation deployment --json benchmarks/results/rounds.json
    python benchmarks/rounds.py gpu --shape olmoe-1b4 --override local.steps=64
    python benchmarks/rounds.py gpus --shape olmoe-1b4 --nodes 2 --override local.steps=64

Simulation runs the demo through `flwr run` and takes its rounds apart. Deployment starts a
SuperLink and SuperNodes on the loopback interface and times three kinds of rounds: empty ones
(Flower's floor), ours with cold ClientApps, and ours with warm workers. Figures are medians of all
rounds but the first, which pays for what the later ones find ready.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from gpu_rounds import SHAPES, rounds_on_gpu, rounds_over_gpus
from measurement import FOMOE, parser_of, save

from fomoe_flwr import report
from fomoe_flwr.run.directory import RunDirectory

ROOT = Path(__file__).resolve().parents[1]
EMPTY_APP = Path(__file__).with_name("empty_app")
MARK = "FOMOE_BENCHMARK"
SERVER_PHASES = ("send", "outer", "routing", "eval", "sample", "checkpoint")
DEPLOYED = ("local.steps=2", "eval.max_tokens=2048", "eval.sample_tokens=0", "local.threads=1")


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Read a run's rounds but the first."""
    rows = RunDirectory(run).read_metrics()
    if RunDirectory(run).read_summary().get("status") != "completed":
        raise SystemExit(f"the run failed: {run}")
    return rows[1:]


def median(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.median(row.get(key, 0.0) for row in rows)


def simulation(rounds: int, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Take the rounds of a simulated run apart."""
    run = folder / "simulation"
    words = ["engine=flower", f"rounds={rounds}", f"output_dir={run}", *overrides]
    subprocess.run([*FOMOE, "run", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = rows_of(run)
    together = {
        key: median(rows, f"round/{key}_seconds")
        for key in ("train", "local", "overhead", *SERVER_PHASES)
    }
    total = statistics.median(row["round/seconds"] for row in rows)
    # Workers share the cores: as many run at once as the engine has actors.
    actors = min(int(rows[0]["round/workers_ok"]), os.cpu_count() or 1)
    steps = together["local"] / actors
    server = sum(together[phase] for phase in SERVER_PHASES)
    return {
        "round_seconds": total,
        "local_steps_seconds": steps,
        "worker_overhead_seconds": together["overhead"] / actors,
        "waiting_and_transfer_seconds": together["train"] - steps - together["overhead"] / actors,
        **{f"server_{phase}_seconds": together[phase] for phase in SERVER_PHASES},
        "outside_share": 1 - steps / total,
        # Evaluation and sample are what the server does with a model, with warm workers or not.
        "outside_share_without_evaluation": 1
        - steps / (total - together["eval"] - together["sample"]),
        "server_rest_seconds": total - together["train"] - server,
        "actors": actors,
    }


def deployment(nodes: int, rounds: int, overrides: Sequence[str], folder: Path) -> dict[str, Any]:
    """Time empty rounds, and ours with and without a warm worker."""
    found: dict[str, Any] = {"nodes": nodes}
    with federation(folder / "empty", [f"partition-id={i}" for i in range(nodes)]) as run:
        out = folder / "empty.json"
        run(EMPTY_APP, {"rounds": rounds, "nodes": nodes, "out": str(out)})
        found["empty_round_seconds"] = statistics.median(json.loads(out.read_text())[1:])
    for kind in ("cold", "warm"):
        home = folder / kind
        words = [f'partition-id={i} state-dir="{home}/state"' for i in range(nodes)]
        if kind == "warm":
            words = [f'{word} worker-dir="{home}/w{i}"' for i, word in enumerate(words)]
        with federation(home, words) as run:
            out = home / "run"
            settings = [
                *(f"rounds={rounds}", f"layout.num_workers={nodes}", "layout.overlap=1"),
                *(*DEPLOYED, *overrides, f"output_dir={out}"),
            ]
            run(ROOT, {"overrides": shlex.join(settings)})
        rows = rows_of(out)
        evaluation = [row["round/eval_seconds"] for row in rows]
        total = [row["round/seconds"] for row in rows]
        slowest = [row["round/slowest_worker_seconds"] for row in rows]
        found[kind] = {
            "round_seconds": statistics.median(total),
            "local_steps_seconds": statistics.median(slowest),
            "worker_overhead_seconds": median(rows, "round/overhead_seconds") / nodes,
            **{
                f"server_{phase}_seconds": median(rows, f"round/{phase}_seconds")
                for phase in SERVER_PHASES
            },
            "outside_seconds": statistics.median(
                a - b for a, b in zip(total, slowest, strict=True)
            ),
            "outside_without_evaluation_seconds": statistics.median(
                a - b - c for a, b, c in zip(total, slowest, evaluation, strict=True)
            ),
        }
    return found


@contextmanager
def federation(home: Path, node_configs: Sequence[str]) -> Iterator[Any]:
    """Start a SuperLink and SuperNodes; yield a function that runs an app to its end."""
    home.mkdir(parents=True)
    variables = {
        **os.environ,
        MARK: str(home),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    link, *ports = free_ports(1 + len(node_configs))
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "b"\n[superlink.b]\n'
        f'address = "127.0.0.1:{link}"\ninsecure = true\n'
    )

    def start(name: str, *words: str) -> None:
        with open(home / f"{name}.log", "wb") as log:
            subprocess.Popen(
                words, env=variables, cwd=home, stdout=log, stderr=log, start_new_session=True
            )

    def run(app: Path, config: Mapping[str, object]) -> None:
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items())
        (home / "run.toml").write_text(text + "\n")
        command = ["flwr", "run", str(app), "b", "--stream", "--run-config", f"{home}/run.toml"]
        with open(home / "flwr-run.log", "wb") as log:
            subprocess.run(command, env=variables, cwd=home, check=True, stdout=log, stderr=log)

    try:
        start("link", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link))
        wait_until_healthy(link)
        for index, (port, config) in enumerate(zip(ports, node_configs, strict=True)):
            where = ("--superlink", f"127.0.0.1:{link}", "--host", "127.0.0.1", "--port", str(port))
            start(
                f"node-{index}", "flower-supernode", "--insecure", *where, "--node-config", config
            )
        yield run
    finally:
        end_family(home)


def wait_until_healthy(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        time.sleep(0.1)
    raise SystemExit("the SuperLink does not answer")


def end_family(home: Path) -> None:
    """End every process that was started for a federation, by pid."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        family = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(home):
                    process.send_signal(number)
                    family.append(process)
        psutil.wait_procs(family, timeout=8)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def show(title: str, figures: Mapping[str, Any]) -> None:
    print(f"\n{title}")
    for key, value in figures.items():
        if isinstance(value, Mapping):
            show(key, value)
        else:
            print(
                f"  {key:<40}{value:>10.3f}"
                if isinstance(value, float)
                else f"  {key:<40}{value!s:>10}"
            )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("what", nargs="+", choices=("simulation", "deployment", "gpu", "gpus"))
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-1b4", help="of the gpu's model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=2, help="of the deployment, or GPUs")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--keep", type=Path, default=None, help="folder for what the runs leave")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="r") as scratch:
        folder = (options.keep or Path(scratch)).resolve()
        if "simulation" in options.what:
            found["simulation"] = simulation(options.rounds, options.override, folder)
        if "deployment" in options.what:
            found["deployment"] = deployment(
                options.nodes, options.rounds, options.override, folder
            )
        if "gpu" in options.what:
            found["gpu"] = rounds_on_gpu(
                options.shape, options.rounds, options.override, folder / "gpu"
            )
        if "gpus" in options.what:
            found["gpus"] = rounds_over_gpus(
                options.shape, options.nodes, options.rounds, options.override, folder / "gpus"
            )
    for title, figures in found.items():
        show(title, figures)
    save(options.json, {**report.environment(), "load": os.getloadavg(), **found})


if __name__ == "__main__":
    main()
