"""Measure the utilisation of sites behind real links: the share of time that they spend in steps.

    python benchmarks/link.py --json benchmarks/results/link.json
    python benchmarks/link.py --mbps 200 --rtt-ms 40 --method plain --method delayed
    python benchmarks/link.py --preset tiny --rounds 3                 # to try it, in minutes

A federation of real processes on this machine: SuperLink with TLS, two SuperNodes with warm
workers, each behind a proxy that shapes its connections: a rate each way, and half of the round
trip as delay. Every site has one thread. Utilisation is the mean over sites of seconds in optimizer
steps, over the seconds from the end of the first round to the end of the last.
"""

from __future__ import annotations

import queue
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from measurement import markdown, parser_of, save

from fomoe_flwr.cli.main import main as fomoe
from fomoe_flwr.federation.deployment.loopback import Loopback
from fomoe_flwr.report.environment import environment
from fomoe_flwr.run.directory import RunDirectory

INT4 = ("wire.up=int4", "wire.down=int8")
DELAYED = ("outer.delay_steps={delay}", "outer.merge_alpha=0.5")
METHODS = {
    "plain": (),
    "int4": INT4,
    "fragments": ("outer.fragments=4",),
    "delayed": DELAYED,
    "delayed int4": (*DELAYED, *INT4),
    "delayed fragments int4": (*DELAYED, "outer.fragments=4", *INT4),
}


class ShapedLink:
    """Passes TCP connections on to `target`, each way at a rate and with a delay."""

    def __init__(self, target: tuple[str, int], mbps: float, rtt_seconds: float) -> None:
        self.target, self.delay = target, rtt_seconds / 2
        self._rate = mbps * 1e6 / 8
        self._free = [0.0, 0.0]
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.create_connection(self.target)
            for way, (source, sink) in enumerate(((near, far), (far, near))):
                sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                pipe: queue.Queue[tuple[float, bytes]] = queue.Queue()
                for work in (self._take, self._give):
                    threading.Thread(
                        target=work, args=(way, source, sink, pipe), daemon=True
                    ).start()

    def _take(
        self, way: int, source: Any, sink: Any, pipe: queue.Queue[tuple[float, bytes]]
    ) -> None:
        """Read as fast as the link carries: what is in it waits for its delay alone."""
        del sink
        data = b"-"
        while data:
            try:
                data = source.recv(2**16)
            except OSError:
                data = b""
            with self._lock:
                self._free[way] = max(time.monotonic(), self._free[way]) + len(data) / self._rate
                sent = self._free[way]
            pipe.put((sent + self.delay, data))
            time.sleep(max(0.0, sent - time.monotonic()))

    def _give(
        self, way: int, source: Any, sink: Any, pipe: queue.Queue[tuple[float, bytes]]
    ) -> None:
        del way
        try:
            while (item := pipe.get())[1]:
                time.sleep(max(0.0, item[0] - time.monotonic()))
                sink.sendall(item[1])
        except OSError:
            pass
        for each in (source, sink):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


class Sites(Loopback):
    """A loopback federation whose nodes are behind shaped links."""

    mbps, rtt_seconds = 0.0, 0.0

    def _node_command(self, index: int) -> list[str]:
        command = super()._node_command(index)
        host, _, port = self.address.partition(":")
        link = ShapedLink((host, int(port)), self.mbps, self.rtt_seconds)
        command[command.index("--superlink") + 1] = f"127.0.0.1:{link.port}"
        return command


def measure(sites: Sites, words: list[str], folder: Path) -> dict[str, Any]:
    """Run, and return what its rounds after the first took."""
    command = ["federation", "submit", str(sites.folder), *words, f"output_dir={folder}"]
    if status := fomoe(command):
        sys.exit(status)
    rows = RunDirectory(folder).read_metrics()
    seconds = rows[-1]["round/ended_unix_seconds"] - rows[0]["round/ended_unix_seconds"]
    later = rows[1:]
    workers = [list(row["round/worker_seconds"].values()) for row in later]
    in_steps = sum(sum(each) / len(each) for each in workers)
    return {
        "utilisation": in_steps / seconds,
        "seconds_of_a_round": seconds / len(later),
        "seconds_in_steps": in_steps / len(later),
        "bytes_up": sum(row["comm/bytes_up"] for row in later) / len(later),
        "bytes_down": sum(row["comm/bytes_down"] for row in later) / len(later),
        "tokens": rows[-1]["tokens"],
        "loss": rows[-1]["eval/loss"],
        "failures": [row["round/failures"] for row in rows if row["round/failures"]],
    }


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--mbps", type=float, default=50.0)
    parser.add_argument("--rtt-ms", type=float, default=100.0)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--delay", type=int, default=0, help="steps; default: a quarter of --steps")
    parser.add_argument("--method", choices=METHODS, action="append")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    found: dict[str, Any] = environment() | {
        "link": {"mbps": options.mbps, "rtt_ms": options.rtt_ms},
        "preset": options.preset,
        "overrides": options.overrides,
        "methods": {},
    }
    delay = options.delay or options.steps // 4
    common = [
        *(f"preset={options.preset}", f"rounds={options.rounds}", f"local.steps={options.steps}"),
        *("layout.num_workers=2", "layout.overlap=1", "local.threads=1", "tracker=none"),
        *options.overrides,
    ]
    with tempfile.TemporaryDirectory() as scratch:
        sites = Sites(Path(scratch) / "federation", ["", ""])
        sites.mbps, sites.rtt_seconds = options.mbps, options.rtt_ms / 1e3
        sites.up()
        try:
            for name in options.method or METHODS:
                words = [word.format(delay=delay) for word in METHODS[name]]
                folder = Path(scratch) / name.replace(" ", "-")
                found["methods"][name] = measure(sites, [*common, *words], folder)
                print(name, found["methods"][name], flush=True)
                save(options.json, found)
        finally:
            sites.end()
    rows = [
        (name, f"{each['utilisation']:.1%}", f"{each['seconds_of_a_round']:.1f}",
         f"{each['seconds_in_steps']:.1f}", f"{each['bytes_up'] / 1e6:.1f}", f"{each['loss']:.4f}")
        for name, each in found["methods"].items()
    ]  # fmt: skip
    heads = ("method", "utilisation", "s a round", "s in steps", "MB up a round", "held-out loss")
    print(markdown(heads, rows))


if __name__ == "__main__":
    main()
