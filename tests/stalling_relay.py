"""A TCP relay that stops in the middle of an upload, as if the sender had lost its power."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

_PIECE = 4096  # bytes


class StallingRelay:
    """Relays connections to a server, until it is told to stop in an upload.

    Args:
        to: the server's address.

    Attributes:
        stalled: set once it has stopped.
    """

    def __init__(self, to: tuple[str, int]) -> None:
        self.stalled = threading.Event()
        self._to = to
        self._goes_on = threading.Event()
        self._goes_on.set()
        self._everything = False
        self._stop_after: int | None = None
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))

    @property
    def port(self) -> int:
        """Where it listens, on loopback."""
        return self._listener.getsockname()[1]

    def stall_in_uploads(self, nbytes: int, everything: bool) -> None:
        """Stop a request once it has so many bytes, the next as those after it.

        Args:
            everything: from then on nothing passes on any connection.
        """
        self.stalled.clear()
        self._goes_on.clear()
        self._everything, self._stop_after = everything, nbytes

    def cut(self) -> None:
        """Let nothing pass any more on any connection, as where the network is gone."""
        self._goes_on.clear()
        self._everything = True
        self.stalled.set()

    def go_on(self) -> None:
        """Let new connections pass; those from before are reset."""
        self._stop_after = None
        self.stalled.clear()
        held, self._open = self._open, []
        for end in held:
            _reset(end)
        self._goes_on.set()

    def serve(self) -> None:
        """Accept connections until it is closed."""
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._to)
            except OSError:
                if self._listener.fileno() < 0:
                    return
                _reset(near)  # the server is away
                continue
            self._open += [near, far]
            sent = [0]  # bytes of the request that is under way
            for source, target, up in ((near, far, True), (far, near, False)):
                arguments = (source, target, sent, up)
                threading.Thread(target=self._pump, args=arguments, daemon=True).start()

    def close(self) -> None:
        """End it and its connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.go_on()

    def _pump(
        self, source: socket.socket, target: socket.socket, sent: list[int], up: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_PIECE):
                sent[0] = sent[0] + len(data) if up else 0
                if self._stop_after is not None and sent[0] > self._stop_after:
                    self.stalled.set()
                    self._goes_on.wait()
                self._wait_if_all_is_stalled()
                target.sendall(data)
        self._wait_if_all_is_stalled()  # an end is passed on as bytes are
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _wait_if_all_is_stalled(self) -> None:
        if self._everything and self.stalled.is_set():
            self._goes_on.wait()


@contextlib.contextmanager
def stalling_relay(to: tuple[str, int]) -> Iterator[StallingRelay]:
    """A relay that serves while the block goes on."""
    relay = StallingRelay(to)
    thread = threading.Thread(target=relay.serve, daemon=True)
    thread.start()
    try:
        yield relay
    finally:
        relay.close()
        thread.join(timeout=10)


def _reset(end: socket.socket) -> None:
    """End a connection as a machine does that knows nothing of it: by RST."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RD)  # who reads from it wakes up
    end.close()
