"""A shaped link: network namespaces joined by a veth pair whose two ends have `tc` hold the rate.

Needs root, `ip` and `tc` with the tbf queue. Latency is a delay line in the program at the far
end, because many kernels lack netem: what arrived counts as arrived so much later.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_HEADER = struct.Struct("!cQ")
_BLOCK = bytes(2**20)


def is_available() -> bool:
    """Whether this process may make namespaces and shape links between them."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        return False
    try:
        with shaped_link(10.0, 0.0):
            return True
    except (subprocess.CalledProcessError, OSError):
        return False


class ShapedLink:
    """A connection over the shaped link to a program that takes and gives bytes."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, num_bytes: int) -> float:
        """Send bytes; return the seconds until the last one had arrived."""
        started = time.perf_counter()
        self._socket.sendall(_HEADER.pack(b"d", num_bytes))
        left = num_bytes
        while left:
            left -= self._socket.send(_BLOCK[: min(left, len(_BLOCK))])
        self._socket.recv(1)
        return time.perf_counter() - started

    def receive(self, num_bytes: int) -> float:
        """Ask for bytes; return the seconds until the last one has arrived."""
        started = time.perf_counter()
        self._socket.sendall(_HEADER.pack(b"u", num_bytes))
        _drain(self._socket, num_bytes)
        return time.perf_counter() - started


@contextlib.contextmanager
def shaped_link(mbps: float, latency_seconds: float, index: int = 0) -> Iterator[ShapedLink]:
    """Make both namespaces and the link, run the far end, and take everything away again."""
    mark = f"{os.getpid() % 10000}{index}"
    near, far = f"fomoe-n{mark}", f"fomoe-f{mark}"
    veth = {near: f"fn{mark}", far: f"ff{mark}"}
    address = {near: f"10.213.{index}.1", far: f"10.213.{index}.2"}
    burst = max(16_000, int(mbps * 1e6 / 8 / 250))
    process = None
    try:
        for space in (near, far):
            _ip("netns", "add", space)
        _ip("link", "add", veth[near], "netns", near, "type", "veth", "peer", "name", veth[far],
            "netns", far)  # fmt: skip
        for space in (near, far):
            _ip("-n", space, "addr", "add", f"{address[space]}/30", "dev", veth[space])
            _ip("-n", space, "link", "set", veth[space], "up")
            shape = f"tbf rate {mbps:g}mbit burst {burst} latency 200ms".split()
            _ip("netns", "exec", space, "tc", "qdisc", "add", "dev", veth[space], "root", *shape)
        program = [
            sys.executable,
            str(Path(__file__).resolve()),
            address[far],
            f"{latency_seconds}",
        ]
        process = subprocess.Popen(
            ["ip", "netns", "exec", far, *program], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with _inside(near):
            connection = socket.create_connection((address[far], port), timeout=600)
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield ShapedLink(connection)
    finally:
        if process is not None:
            process.terminate()
            process.wait()
        for space in (near, far):
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)


def serve(address: str, latency_seconds: float) -> None:
    """Be the far end: take what comes, give what is asked for, each after the latency."""
    with socket.create_server((address, 0)) as server:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
        with connection:
            while header := connection.recv(_HEADER.size, socket.MSG_WAITALL):
                way, num_bytes = _HEADER.unpack(header)
                if way == b"d":
                    _drain(connection, num_bytes)
                    time.sleep(latency_seconds)
                    connection.sendall(b"k")
                    continue
                time.sleep(latency_seconds)
                left = num_bytes
                while left:
                    left -= connection.send(_BLOCK[: min(left, len(_BLOCK))])


def _drain(connection: socket.socket, num_bytes: int) -> None:
    left = num_bytes
    while left:
        got = len(connection.recv(min(left, 2**20)))
        if not got:
            raise ConnectionError("the other end has gone")
        left -= got


@contextlib.contextmanager
def _inside(space: str) -> Iterator[None]:
    """Open sockets in a namespace; they stay there when this thread goes home."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{space}", os.O_RDONLY)
    try:
        _setns(there)
        yield
    finally:
        _setns(home)
        os.close(home)
        os.close(there)


def _setns(descriptor: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0):
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]))
