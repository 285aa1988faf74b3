"""The handshake: both sides prove that they know the token, and neither sends it.

    worker -> task giver   a nonce
    task giver -> worker   a nonce of its own, and HMAC(token, "giver", both nonces)
    worker -> task giver   HMAC(token, "worker", both nonces), and which code it runs

Both must run the same code: otherwise the worker would train another model than the server expects.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import fomoe_flwr
from fomoe_flwr.errors import RunError
from fomoe_flwr.federation.warm.frames import SHORT_HEADER_BYTES, Frame, receive, send

PROTOCOL = 1
HANDSHAKE_SECONDS = 5.0
"""A worker's limit for the whole handshake; both sides are on one machine."""
END = "end"
"""Kind of a task that asks the worker to end."""
BEAT = "beat"
"""Field of a heartbeat, which a worker sends to everybody who waits: seconds of processor time."""

_GIVER, _WORKER = "giver", "worker"


class StrangerError(RunError):
    """A peer that does not know the token, or speaks another protocol."""


class OtherCodeError(RunError):
    """A worker that runs another version than the one who has a task for it."""


@cache
def code() -> dict[str, str]:
    """Return the version of this package, and a digest of its modules as they are on the disk."""
    root = Path(fomoe_flwr.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root)}\0{content}\0".encode())
    return {"version": fomoe_flwr.__version__, "digest": digest.hexdigest()[:16]}


def greet_as_worker(peer: socket.socket, token: bytes) -> None:
    """Let a task giver in. Raises StrangerError or FrameError."""
    # One limit for the whole handshake, not for each byte: a slow peer holds up the others.
    alarm = threading.Timer(HANDSHAKE_SECONDS, _hang_up, [peer])
    alarm.daemon = True
    alarm.start()
    try:
        own = secrets.token_hex(16)
        send(peer, Frame({"protocol": PROTOCOL, "nonce": own}))
        answer = _short(peer)
        other = str(answer.get("nonce"))
        if not _is_right(answer, _proof(token, _GIVER, own, other)):
            send(peer, Frame({"refused": "the proof is wrong"}))
            raise StrangerError("a peer does not know the token of this warm worker")
        send(peer, Frame({"proof": _proof(token, _WORKER, own, other), **code()}))
    finally:
        alarm.cancel()


def greet_as_giver(peer: socket.socket, token: bytes) -> None:
    """Introduce a task giver to a worker. Raises StrangerError, FrameError or OtherCodeError."""
    hello = _short(peer)
    if hello.get("protocol") != PROTOCOL:
        raise StrangerError(f"the warm worker speaks protocol {hello.get('protocol')}")
    own, other = secrets.token_hex(16), str(hello.get("nonce"))
    send(peer, Frame({"nonce": own, "proof": _proof(token, _GIVER, other, own)}))
    answer = _short(peer)
    if not _is_right(answer, _proof(token, _WORKER, other, own)):
        raise StrangerError("this ClientApp and the warm worker do not know the same token")
    found = {key: answer.get(key) for key in code()}
    if found != code():
        raise OtherCodeError(
            f"the warm worker runs fomoe-flwr {found['version']} (modules {found['digest']}), this "
            f"ClientApp {code()['version']} (modules {code()['digest']}): install the same version "
            "and start the worker again"
        )


def peer_pid(peer: socket.socket) -> int:
    """Return the process that listens at the other end; 0 where the system does not tell."""
    if hasattr(socket, "SO_PEERCRED"):
        size = struct.calcsize("3i")
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(struct.unpack("3i", credentials)[0])
    if sys.platform == "darwin":
        return int(peer.getsockopt(0, 2))  # SOL_LOCAL, LOCAL_PEERPID
    return 0


def _short(peer: socket.socket) -> dict[str, Any]:
    return dict(receive(peer, SHORT_HEADER_BYTES, most_blob_bytes=0).fields)


def _hang_up(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):
        peer.shutdown(socket.SHUT_RDWR)


def _proof(token: bytes, role: str, worker_nonce: str, giver_nonce: str) -> str:
    words = f"{PROTOCOL}\0{role}\0{worker_nonce}\0{giver_nonce}"
    return hmac.new(token, words.encode(), hashlib.sha256).hexdigest()


def _is_right(answer: dict[str, Any], proof: str) -> bool:
    return hmac.compare_digest(str(answer.get("proof")).encode(), proof.encode())
