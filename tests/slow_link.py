"""A bad network in user space: a TCP relay that is slow, late, and resets connections.

    python tests/slow_link.py --listen 127.0.0.1:8100 --to 127.0.0.1:8000 \\
        --kbits 256 --delay-ms 150 --resets 0.05 --seed 0

Both ways have the rate and the delay each, shared by all connections, as a modem's
line is. A reset comes in the middle of an exchange: of a request and its answer, one
in so many is cut at a random byte. It ends as SIGTERM comes, and prints what it saw as
one line of JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import struct
import time

_PIECE = 1460  # bytes, as of an Ethernet frame
_MOST_AHEAD = 16 * 1024  # bytes in flight one way: a short queue, as a modem's


class Line:
    """One direction of the link: its rate, and its delay.

    Args:
        kbits: 1,000 bits a second.
        delay: seconds that every byte is under way.
    """

    def __init__(self, kbits: float, delay: float) -> None:
        self._bytes_per_second = kbits * 1000 / 8
        self._delay = delay
        self._free_at = 0.0
        self.nbytes = 0

    async def sent(self, nbytes: int) -> float:
        """Wait until the line has taken so many bytes; returns when they arrive."""
        self._free_at = max(self._free_at, time.monotonic()) + nbytes / self._bytes_per_second
        self.nbytes += nbytes
        await asyncio.sleep(self._free_at - time.monotonic())
        return self._free_at + self._delay


class Reset(Exception):
    """The link has cut this connection."""


class Resets:
    """Decides, request by request, whether a connection is cut, and after how many bytes."""

    def __init__(self, probability: float, seed: int) -> None:
        self._probability, self._rng = probability, random.Random(seed)
        self.exchanges = self.cut = 0

    def next_exchange(self) -> int | None:
        """Bytes after which the exchange that begins now is cut; None: it is not."""
        self.exchanges += 1
        return self._rng.randrange(1, 3_000) if self._rng.random() < self._probability else None


class Exchange:
    """What goes to and fro on one connection."""

    def __init__(self, resets: Resets) -> None:
        self._resets = resets
        self._answering = True
        self._left: int | None = None

    def pass_on(self, nbytes: int, answer: bool) -> None:
        """Account for bytes of a request or of its answer.

        Raises:
            Reset: if it ends here.
        """
        if self._answering and not answer:  # a new request
            self._left = self._resets.next_exchange()
        self._answering = answer
        if self._left is not None:
            self._left -= nbytes
            if self._left <= 0:
                self._resets.cut += 1
                raise Reset


class Relay:
    """The link between a listening port and a server."""

    def __init__(self, to: tuple[str, int], up: Line, down: Line, resets: Resets) -> None:
        self._to, self._up, self._down, self._resets = to, up, down, resets
        self._connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay one connection until either side, or the link, ends it."""
        self._connections += 1
        exchange = Exchange(self._resets)
        try:
            there = await asyncio.open_connection(*self._to)
        except OSError:
            _reset(writer)
            return
        pumps = [
            asyncio.create_task(_pump(reader, there[1], self._up, exchange, answer=False)),
            asyncio.create_task(_pump(there[0], writer, self._down, exchange, answer=True)),
        ]
        done, pending = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        broken = any(isinstance(task.exception(), Reset | OSError) for task in done)
        if not broken:  # one side has said all; the other may still have to
            done, pending = await asyncio.wait(pumps, timeout=60)
            broken = bool(pending) or any(task.exception() for task in done)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for each in (writer, there[1]):
            _reset(each) if broken else each.close()

    def seen(self) -> dict[str, int]:
        """Connections, exchanges and resets so far, and bytes each way."""
        return {
            "connections": self._connections,
            "exchanges": self._resets.exchanges,
            "cut": self._resets.cut,
            "bytes_up": self._up.nbytes,
            "bytes_down": self._down.nbytes,
        }


async def _pump(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    line: Line,
    exchange: Exchange,
    answer: bool,
) -> None:
    """Carry bytes one way until their source has no more."""
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MOST_AHEAD // _PIECE)
    delivery = asyncio.create_task(_deliver(under_way, writer))
    try:
        while data := await reader.read(_PIECE):
            exchange.pass_on(len(data), answer)
            await under_way.put((await line.sent(len(data)), data))
        await under_way.put((0.0, b""))
        await delivery
    finally:
        delivery.cancel()


async def _deliver(
    under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
) -> None:
    while True:
        arrival, data = await under_way.get()
        if not data:
            with contextlib.suppress(OSError):
                writer.write_eof()
            return
        await asyncio.sleep(max(arrival - time.monotonic(), 0))
        writer.write(data)
        await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a broken network does: by RST, not FIN."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _run(options: argparse.Namespace) -> None:
    lines = [Line(options.kbits, options.delay_ms / 1000) for _ in range(2)]
    relay = Relay(_address(options.to), *lines, Resets(options.resets, options.seed))
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    host, port = _address(options.listen)
    server = await asyncio.start_server(relay.serve, host, port, limit=_PIECE)
    print(f"relay on {options.listen}", flush=True)
    await ended.wait()
    server.close()
    print(json.dumps(relay.seen()), flush=True)
    os._exit(0)  # connections that are open end with the process


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main() -> None:
    """Relay until told to end."""
    parser = argparse.ArgumentParser(description="A slow and lossy TCP relay.")
    parser.add_argument("--listen", required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--kbits", type=float, required=True)
    parser.add_argument("--delay-ms", type=float, required=True)
    parser.add_argument("--resets", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
