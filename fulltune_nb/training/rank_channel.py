"""The channel between ranks: small messages to and from rank 0, and the news that a rank has ended or hangs.

Each rank has one TCP connection with rank 0. Something is sent on it every second by a thread of its own, so that silence for as long
as the deadline means that a process, its machine or the network is stuck. Messages are JSON and never code.
"""

from __future__ import annotations

import atexit
import hashlib
import hmac
import json
import math
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fulltune_nb.errors import ConfigError, TrainingError

ADDRESS, DEADLINE, TOKEN = "FULLTUNE_NB_RANK0", "FULLTUNE_NB_DEADLINE", "FULLTUNE_NB_TOKEN"
"""Environment variables: where rank 0 listens (host:port), after how many seconds of silence a rank is lost, and a common secret."""
DEADLINE_SECONDS = 60.0
JOIN_SECONDS = 300.0
"""Within which all ranks must have come: models and data are loaded by then."""
HELLO_SECONDS = 5.0
"""In which whoever connects must have said who it is."""
_MOST_BYTES, _MOST_HELLO_BYTES = 2**26, 2**12  # of a message, and of the first one, which may be a stranger's
_LOST = -1  # in place of a rank: a message that tells of a lost one


class Abandoned(Exception):
    """Rank 0 has gone on to another command."""


class _Wire:
    """One connection."""

    def __init__(self, connection: socket.socket, seconds: float):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._lock = connection, threading.Lock()
        self.wait_at_most(seconds)

    def wait_at_most(self, seconds: float) -> None:
        self._socket.settimeout(max(seconds, 0.01))

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        with self._lock:
            self._socket.sendall(struct.pack("!I", len(data)) + data)

    def receive(self, most: int = _MOST_BYTES) -> dict[str, Any]:
        (size,) = struct.unpack("!I", self._exactly(4))
        if size > most:
            raise ConnectionError(f"a message of {size:,} bytes")
        message = json.loads(self._exactly(size))
        if not isinstance(message, dict):
            raise ConnectionError("something that is no message")
        return message

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            if not (part := self._socket.recv(count - len(data))):
                raise ConnectionError("the connection was closed")
            data += part
        return bytes(data)

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class RankChannel:
    """This rank's connections: on rank 0 to every other, elsewhere to rank 0.

    Args:
        rank: this process.
        size: how many there are.
        address: where rank 0 listens.
        deadline: seconds of silence after which a rank is lost; None: as the environment says.
        last_words: how a rank's process has ended and what it said, asked for with seconds to wait for its end; None while it runs, or
            where this process has not started it.

    Attributes:
        on_lost: called once when a rank is lost, on a thread of this channel.
        interrupted: a signal asks this rank to pause; on rank 0: one has asked another.

    Raises:
        TrainingError: not all ranks came; on another rank: rank 0 is not there, or does not take this process.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        address: tuple[str, int],
        deadline: float | None = None,
        last_words: Callable[[int, float], str | None] = lambda rank, within: None,
    ):
        self.rank, self.size, self._last_words = rank, size, last_words
        self.deadline = deadline_of_environment() if deadline is None else deadline
        self.on_lost: Callable[[], None] | None = None
        self.interrupted = False
        self.failure: str | None = None
        self._failed, self._closed, self._lock = threading.Event(), False, threading.Lock()
        self._inbox: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        self._put_back: dict[str, Any] | None = None
        self._at = [0, 0]  # the command under way, and the exchanges within it
        self._needed = 0  # the last command that every rank must take
        self._through: set[int] = set()  # ranks whose program has come to its end
        self._wires = self._accepted(address) if rank == 0 else {0: self._connected(address)}
        self._readers = [
            threading.Thread(target=self._read, args=item, daemon=True, name=f"rank {item[0]}") for item in self._wires.items()
        ]
        for reader in self._readers:
            reader.start()
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()
        atexit.register(self.close)

    # -- coming together ---------------------------------------------------------------------------------------------------------

    def _accepted(self, address: tuple[str, int]) -> dict[int, _Wire]:
        wires: dict[int, _Wire] = {}
        secret, end = token().encode(), time.monotonic() + JOIN_SECONDS
        try:
            server = socket.create_server(address)
        except OSError as error:
            raise TrainingError(f"Rank 0 cannot listen at {address[0]}:{address[1]}: {error}. Set {ADDRESS} to a free port.") from error
        with server:
            server.settimeout(0.5)
            while missing := [rank for rank in range(1, self.size) if rank not in wires]:
                for rank in range(1, self.size):
                    if (ended := self._last_words(rank, 0.0)) is not None:
                        raise TrainingError(f"Rank {rank} has ended before all had come: {ended}")
                if time.monotonic() > end:
                    ranks = ", ".join(map(str, missing))
                    raise TrainingError(f"Rank {ranks} did not come within {JOIN_SECONDS:.0f} s. See what it printed.")
                with suppress(TimeoutError):
                    wire = _Wire(server.accept()[0], min(self.deadline, HELLO_SECONDS))
                    if (rank := self._greeted(wire, missing, secret)) is not None:
                        wires[rank] = wire
        for rank, wire in wires.items():  # not before all are there: until then nothing else is sent, and the deadline would pass
            wire.wait_at_most(self.deadline)
            with suppress(OSError):  # one that has ended meanwhile is noticed by who reads from it
                wire.send({"welcome": rank})
        return wires

    def _greeted(self, wire: _Wire, missing: list[int], secret: bytes) -> int | None:
        """On rank 0: which of the missing ranks this is; None of somebody else's connection, which is closed without a word."""
        with suppress(OSError, ValueError, RecursionError):
            hello = wire.receive(_MOST_HELLO_BYTES)
            known = hmac.compare_digest(str(hello.get("token")).encode(), secret)
            if known and (rank := hello.get("rank")) in missing:
                return rank
        wire.close()
        return None

    def _connected(self, address: tuple[str, int]) -> _Wire:
        where, secret, end = f"{address[0]}:{address[1]}", token(), time.monotonic() + JOIN_SECONDS
        while True:
            try:
                wire = _Wire(socket.create_connection(address, timeout=self.deadline), end - time.monotonic())
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise TrainingError(f"Rank {self.rank} does not reach rank 0 at {where}: {error}. Is it running there?") from error
                time.sleep(0.05)
        try:
            wire.send({"rank": self.rank, "token": secret})
            if wire.receive(_MOST_HELLO_BYTES).get("welcome") != self.rank:
                raise ConnectionError("it answers something else")
        except (OSError, ValueError, RecursionError) as error:
            wire.close()
            raise TrainingError(
                f"Rank 0 at {where} does not take this process as rank {self.rank}: {error}. It has another secret ({TOKEN}, or another"
                f" MLX_HOSTFILE) or such a rank already, has ended, or another program listens there ({ADDRESS} names the place)."
            ) from error
        wire.wait_at_most(self.deadline)
        return wire

    # -- messages ----------------------------------------------------------------------------------------------------------------

    def command(self, message: dict[str, Any], needed: bool = True) -> None:
        """On rank 0: to every other rank. `needed`: one whose program has ended cannot do without it, and is lost."""
        self.check()
        self._at = [self._at[0] + 1, 0]
        if needed:
            self._needed = self._at[0]  # before the next line: the thread that hears of an end looks at both the other way round
            for rank in self._through:
                self.lose(f"rank {rank} has ended")
                raise self.error()
        self._to_all({**message, "at": self._at})

    def next_command(self) -> dict[str, Any]:
        """On the others: waits for the next command; "end" is the last."""
        while True:
            message, self._put_back = self._put_back or self._take()[1], None
            if "do" in message:
                self._at = list(message["at"])
                return message

    def put_back(self, command: dict[str, Any]) -> None:
        """On the others: this command is the next once more."""
        self._put_back = command

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks.

        Raises:
            TrainingError: a rank was lost.
            Abandoned: on the others: rank 0 has broken off the command.
        """
        self.check()
        self._at[1] += 1
        at = list(self._at)
        if self.rank:
            self._send(0, {"part": value, "at": at})
            while True:
                message = self._take()[1]
                if "do" in message:
                    self.put_back(message)
                    raise Abandoned
                if message.get("at") == at:
                    return message["reply"]
        parts = {0: value}
        while len(parts) < self.size:
            rank, message = self._take()
            if message.get("at") == at:
                parts[rank] = message["part"]
        values = [parts[rank] for rank in range(self.size)]
        self._to_all({"reply": values, "at": at})
        return values

    def take_interrupt(self) -> bool:
        """Whether there was an interrupt since the last call."""
        found, self.interrupted = self.interrupted, False
        return found

    def _take(self) -> tuple[int, dict[str, Any]]:
        rank, message = self._inbox.get()
        if "bye" in message:  # behind all that it said, and something is wanted still
            self.lose(f"rank {rank} has ended")
        if rank == _LOST or "bye" in message:
            self._inbox.put((_LOST, {}))
            raise self.error()
        return rank, message

    def _send(self, rank: int, message: dict[str, Any]) -> None:
        try:
            self._wires[rank].send(message)
        except OSError as error:
            self.lose(f"rank {rank} cannot be reached: {error}")
            raise self.error() from error

    def _to_all(self, message: dict[str, Any]) -> None:
        for rank in self._wires.keys() - self._through:
            self._send(rank, message)

    # -- who is there ------------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """
        Raises:
            TrainingError: a rank was lost.
        """
        if self.failure is not None:
            raise self.error()

    def error(self) -> TrainingError:
        """What ended the run of all ranks."""
        return TrainingError(
            f"The ranks cannot go on together: {self.failure}. What was saved is whole: start them again and resume, with as many ranks"
            " as you like."
        )

    def fail(self, why: str) -> None:
        """This rank cannot go on; the others are told."""
        self._lost(f"rank {self.rank} failed: {why}", {"failed": why})

    def lose(self, why: str, wait: float = 0.0) -> None:
        """Something was noticed that means a rank is lost; a better reason may come within `wait` seconds."""
        if not self._failed.wait(wait):
            self._lost(why, {"lost": why})

    def _lost(self, why: str, message: dict[str, Any]) -> None:
        with self._lock:
            if self.failure is not None or self._closed:
                return
            self.failure = why
        self._failed.set()
        self._inbox.put((_LOST, {}))  # wakes who waits
        for wire in self._wires.values():
            with suppress(OSError):
                wire.send(message)
        if self.on_lost is not None:
            threading.Thread(target=self.on_lost, daemon=True, name="lost rank").start()

    def _read(self, rank: int, wire: _Wire) -> None:
        while True:
            try:
                message = wire.receive()
            except TimeoutError:
                return self.lose(f"rank {rank} has not been heard of for {self.deadline:.0f} s: it hangs, or the network does")
            except (OSError, ValueError) as error:
                ended = None if self._closed else self._last_words(rank, 1.0)
                return self.lose(f"rank {rank} has ended ({ended or error})")
            if "bye" in message and self._has_gone(rank, message):
                return None
            if "failed" in message:
                return self.lose(f"rank {rank} failed: {message['failed']}")
            if "lost" in message:
                return self.lose(str(message["lost"]))
            if message.get("interrupt"):
                self.interrupted = True
            if "beat" not in message:
                self._inbox.put((rank, message))

    def _has_gone(self, rank: int, message: dict[str, Any]) -> bool:
        """A rank's program is through. Whether there is nothing more to hear of it: on the others rank 0 waits for all."""
        if not self.rank:
            self._through.add(rank)
            if message["bye"] < self._needed:
                self.lose(f"rank {rank} has ended")
        self._inbox.put((rank, message))
        return not self.rank

    def _beat(self) -> None:
        while not self._failed.wait(min(1.0, self.deadline / 4)):
            for rank, wire in self._wires.items():
                try:
                    wire.send({"beat": 1, "interrupt": bool(self.rank) and self.take_interrupt()})
                except OSError as error:
                    self.lose(f"rank {rank} cannot be reached: {error}")

    def close(self) -> None:
        """This process is through; the others hear of it. It waits until they are, for the deadline at most: they may still be reading
        what MLX's engine has of this process's."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        end = time.monotonic() + self.deadline
        for wire in self._wires.values():
            with suppress(OSError):
                wire.send({"bye": self._at[0] - (self._put_back is not None)})  # the last command that was taken
        for reader in self._readers:
            reader.join(0.0 if self.failure else max(end - time.monotonic(), 0.0))
        self.failure = self.failure or "they were ended"
        self._failed.set()
        for wire in self._wires.values():
            wire.close()


def rank_of_environment() -> int:
    """Which of the processes this is that were started together, as by `mlx.launch`; 0 where it is one alone.

    Raises:
        ConfigError: the variable is no whole number.
    """
    return whole_number_in("MLX_RANK", os.environ.get("MLX_RANK") or "0")


def deadline_of_environment() -> float:
    """Seconds of silence after which a rank is lost.

    Raises:
        ConfigError: the variable is no number above 0.
    """
    said = os.environ.get(DEADLINE) or DEADLINE_SECONDS
    with suppress(ValueError):
        if 0 < (deadline := float(said)) < math.inf:
            return deadline
    raise ConfigError(f"The environment variable {DEADLINE}: expected seconds, a number above 0 such as 60, got {said!r:.80}.")


def whole_number_in(variable: str, said: str, low: int = 0) -> int:
    """What an environment variable, or a part of it, says.

    Raises:
        ConfigError: no whole number of at least `low`.
    """
    with suppress(ValueError):
        if (number := int(said)) >= low:
            return number
    raise ConfigError(f"The environment variable {variable}: expected a whole number of at least {low}, got {said!r:.80}.")


def token() -> str:
    """What tells the ranks of this start from other processes: a secret of who started them, or else what they all were told.

    Raises:
        ConfigError: neither is there, and anybody could join.
    """
    if secret := os.environ.get(TOKEN):
        return secret
    path = os.environ.get("MLX_HOSTFILE")
    if path is None:
        raise ConfigError(f"Nothing tells the ranks from strangers: set {TOKEN} to a secret of your own, the same on every rank.")
    with open(path, "rb") as file:
        return hashlib.sha256(file.read().strip()).hexdigest()
