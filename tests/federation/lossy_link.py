"""A link between a node and the SuperLink that can be slowed down and cut."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

_CHUNK = 4096


class LossyLink:
    """Passes TCP connections on from a port of this machine; what it passes may be encrypted."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.sent_bytes = 0
        """What went from the node to the SuperLink."""
        self.bytes_per_second = 0.0
        """Speed towards the SuperLink; 0 is as fast as it goes."""
        self._is_whole = threading.Event()
        self._is_whole.set()
        self._open: set[socket.socket] = set()
        self.port = 0
        self._listen()

    def cut(self) -> None:
        """Let nothing through, and take no new connection."""
        self._is_whole.clear()
        _end(self._listener)  # closing alone would not wake who waits for a connection

    def mend(self) -> None:
        """Go on where the link was cut."""
        self._listen()
        self._is_whole.set()

    def close(self) -> None:
        """End everything."""
        _end(self._listener)
        for each in list(self._open):
            _end(each)
        self._is_whole.set()

    def _listen(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self.target, timeout=5)
            except OSError:
                _end(near)
                continue
            far.settimeout(None)
            self._open |= {near, far}
            for source, sink, is_up in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pass, args=(source, sink, is_up), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, is_up: bool) -> None:
        try:
            while data := source.recv(_CHUNK):
                if is_up:
                    self.sent_bytes += len(data)
                    if self.bytes_per_second:
                        time.sleep(len(data) / self.bytes_per_second)
                self._is_whole.wait()
                sink.sendall(data)
        except OSError:
            pass
        finally:
            _end(source)
            _end(sink)
            self._open -= {source, sink}


def _end(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
