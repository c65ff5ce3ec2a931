"""Ranks: several processes that train one model together, each with its share of a step's micro-batches.

Rank 0 leads. It alone has the run's folder, callbacks and schedule, and tells the others what comes next; they do it and nothing else.
Gradients and weights travel by an engine of MLX's (`mx.distributed`), from neighbour to neighbour; everything small travels by a channel
of our own (`RankChannel`), which also notices a rank that has ended or hangs: the engines wait for ever.

**Sums are those of one process, bit for bit.** One process adds micro-batch after micro-batch: ((m0 + m1) + m2) + m3. The ranks take
them back and forth (with 2 ranks 0, 1, 1, 0, 0, 1, ...), and the running sum goes from rank to rank in that order. A rank computes all
it can before it waits for the sum, so that the ranks compute at the same time.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from fulltune_nb.cpu import evaluate, on_cpu
from fulltune_nb.errors import ConfigError, FulltuneError, NonFiniteError, TrainingError
from fulltune_nb.models.parameters import Arrays
from fulltune_nb.training.gradients import add
from fulltune_nb.training.rank_channel import ADDRESS, RankChannel, rank_of_environment, whole_number_in

HOSTS = "FULLTUNE_NB_HOSTS"
"""Environment variable: what stands in the ring's host file, where we have started the ranks."""
LOST_ENGINE_SECONDS = 4.0
"""So long an operation of the engine may still take when a rank is lost and its connections are shut."""
CONNECT_SECONDS = 5.0
"""In which MLX's engine, of ranks that are all there, connects, or it ends the process after the deadline."""


class Ranks:
    """This process among those that train together.

    Attributes:
        rank: this process, from 0; 0 leads.
        size: how many there are.
        bytes_sent: by this rank through MLX's engine so far.
        seconds: this rank has spent in the engine, waiting included.
        launched: whether rank 0 has started the others, by `ft.launch`, so that they have neither model nor data of their own.
        runs: trainers that have had these ranks; they serve the last one.
    """

    def __init__(self, channel: RankChannel, launched: bool = False, end: Callable[[], None] = lambda: None):
        self._channel, self._end = channel, end
        self.launched, self.runs = launched, 0
        self.rank, self.size = channel.rank, channel.size
        self.bytes_sent, self.seconds = 0, 0.0
        self.settled: FulltuneError | None = None
        """The last error that all ranks raised together, behind which they are in step."""
        self.obeys: Callable[[], Callable[[dict[str, Any]], Any] | None] = lambda: None
        """On the others: a reference to who does what rank 0 says between two calls."""
        self._calls = self._depth = 0
        self._engine_since: float | None = None
        channel.exchange("connected")  # all are there: now the engine, which waits for ever, need not wait
        before = _open_sockets()
        self._sockets = lambda: _open_sockets() - before
        channel.on_lost = self._shut_engine
        with self._in_engine():
            self._group = _connected_engine(channel.deadline)
        own = self._sockets()
        self._sockets = lambda: own
        if (self._group.rank(), self._group.size()) != (self.rank, self.size):
            found = f"rank {self._group.rank()} of {self._group.size()}"
            raise ConfigError(f"MLX's engine says {found}, the environment rank {self.rank} of {self.size}. Start all ranks anew.")

    def __repr__(self) -> str:
        return f"Ranks({self.rank} of {self.size})"

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the ranks that rank 0 has started."""
        if self.launched:
            with suppress(TrainingError):
                self.command("end")
        self._channel.close()
        self._end()

    # -- what rank 0 says, and what all agree on ---------------------------------------------------------------------------------

    def command(self, do: str, **values: Any) -> None:
        """On rank 0: has the others do the same as this rank now. On the others, which are at it, nothing."""
        if self.rank == 0:
            self._channel.command({"do": do, **values}, needed=do not in ("leave", "end"))

    def next_command(self) -> dict[str, Any]:
        """On the others: what comes next."""
        return self._channel.next_command()

    def awaited(self, do: str) -> dict[str, Any]:
        """On the others: the next command of this name; what comes before it is for the trainer that these ranks had before.

        Raises:
            TrainingError: that is gone here, but not on rank 0.
        """
        while (command := self.next_command())["do"] != do:
            if (obey := self.obeys()) is not None:
                obey(command)
            elif command["do"] != "leave":
                error = TrainingError(f"rank 0 still has a trainer that rank {self.rank} has let go. Let go of them alike.")
                self.fail(error)
                raise error
        return command

    def following_at_once(self, do: str) -> dict[str, Any]:
        """On the others: the next command, which has this name.

        Raises:
            TrainingError: it has not, as rank 0 could not go on with what this belongs to. It is the next one then.
        """
        command = self.next_command()
        if command["do"] != do:
            self._channel.put_back(command)
            self.settled = TrainingError("rank 0 has given this run up before its first step; see what it says.")
            raise self.settled
        return command

    @contextmanager
    def leading(self, about: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
        """On rank 0: a call that the others are in too, if they run the same program; at its end they are told so, and of `about()`."""
        self._depth += 1
        problem = None
        if self._depth == 1:
            self._calls += 1
        call = self._calls
        try:
            yield
        except GeneratorExit:  # the loop over the steps was left
            raise
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._depth -= 1
            if not self._depth:
                with suppress(TrainingError):  # where they are lost, there is nobody to tell
                    self.command("leave", call=call, problem=problem, **about())

    @contextmanager
    def in_program(self) -> Iterator[None]:
        """On rank 0, at a `yield` within such a call: the program goes on meanwhile, and what it calls is a call that the others are in."""
        self._depth -= 1
        try:
            yield
        finally:
            self._depth += 1

    def following(self) -> int:
        """On the others: the number of the call that begins; its end is told by "leave" with this number."""
        self._calls += 1
        return self._calls

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value (of JSON), in the order of ranks."""
        return self._channel.exchange(value)

    def merged(self, own: Mapping[int, Any]) -> list[Any]:
        """What the ranks have by number, in the order of the numbers."""
        pairs = [(int(number), value) for part in self.exchange(sorted(own.items())) for number, value in part]
        return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]

    def told(self, value: Any) -> Any:
        """Rank 0's value (of JSON, of any size), on every rank."""
        text = {"": mx.array(np.frombuffer(json.dumps(value).encode(), np.uint8))}
        return json.loads(np.asarray(self.shared(text, 0)[""]).tobytes())

    def agree(self, check: Callable[[], None]) -> None:
        """Calls `check` on every rank; where it raises on one, all raise."""
        problem: FulltuneError | None = None
        try:
            check()
        except FulltuneError as error:
            problem = error
        verdicts = self.exchange(None if problem is None else [type(problem).__name__, str(problem)])
        for rank, verdict in enumerate(verdicts):
            if verdict is not None and problem is None:
                kind = NonFiniteError if verdict[0] == "NonFiniteError" else TrainingError
                problem = kind(f"rank {rank}: {verdict[1]}")
        if problem is not None:
            self.settled = problem
            raise problem

    def fail(self, error: BaseException) -> None:
        """This rank cannot go on, in the middle of what the others do too: theirs ends as well."""
        if error is not self.settled:
            self._channel.fail(" ".join(f"{type(error).__name__}: {error}".split()))

    @property
    def interrupted(self) -> bool:
        """On rank 0: whether another rank was interrupted; reading it takes it away. On the others set by a signal, and passed on."""
        return self._channel.take_interrupt()

    def interrupt(self, arrived: bool = True) -> None:
        """On the others, in a signal handler: rank 0 hears of it soon."""
        self._channel.interrupted = arrived

    # -- the sum over micro-batches ----------------------------------------------------------------------------------------------

    def owner(self, number: int) -> int:
        """The rank that takes micro-batch `number` of a step, counted from 0: back and forth, so that neighbours follow each other."""
        return owner_of(number, self.size)

    def own(self, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """This rank's micro-batches, with their numbers."""
        return ((number, item) for number, item in enumerate(items) if self.owner(number) == self.rank)

    def added(self, number: int, count: int, sums: Arrays, own: Arrays) -> Arrays:
        """The running sum with micro-batch `number` of `count`, this rank's: received if another rank has it, and passed on if another
        takes the next. Array by array, so that the ranks behind are at it meanwhile.

        Args:
            sums: the running sum, where this rank had the micro-batch before.
            own: this micro-batch's, evaluated; emptied.

        Returns:
            The running sum, evaluated; empty where it was passed on.
        """
        before = self._other(number - 1) if number else None
        behind = self._other(number + 1) if number + 1 < count else None
        heads = self._receive_heads(before) if before is not None else heads_of(sums)
        if behind is not None:
            self._send_heads({name: _added_head(heads.get(name), own.get(name)) for name in {**heads, **own}}, behind)
        found: Arrays = {}
        for name in list({**heads, **own}):
            one: Arrays = {}
            if name in heads:
                one[name] = sums.pop(name) if before is None else self._receive(heads[name], before)
            if name in own:
                add(one, {name: own.pop(name)})
            evaluate(one)
            if behind is None:
                found |= one
            else:
                self._send(one.pop(name), behind)
        return found

    def received(self, number: int, sums: Arrays) -> Arrays:
        """The running sum before micro-batch `number`, for what has to be added to it bit by bit; see `added`."""
        before = self._other(number - 1) if number else None
        if before is None:
            return sums
        return {name: self._receive(head, before) for name, head in self._receive_heads(before).items()}

    def passed_on(self, number: int, count: int, sums: Arrays) -> Arrays:
        """Gives the running sum to the rank that has the next micro-batch; see `added`."""
        behind = self._other(number + 1) if number + 1 < count else None
        if behind is None:
            return sums
        self._send_heads(heads_of(sums), behind)
        for name in list(sums):
            self._send(sums.pop(name), behind)
        return {}

    def total(self, count: int, sums: Arrays) -> Arrays:
        """The whole sum over `count` micro-batches, on every rank; evaluated."""
        return self.shared(sums, self.owner(count - 1))

    def shared(self, arrays: Arrays, owner: int, keep: Callable[[str], bool] = lambda name: True) -> Arrays:
        """One rank's arrays, on every rank those that it keeps; evaluated. They go to both ends of the line of ranks, array by array."""
        here = self.rank
        near = None if here == owner else here - 1 if owner < here else here + 1
        further = passed_to(here, owner, self.size)
        heads = heads_of(arrays) if near is None else self._receive_heads(near)
        for rank in further:
            self._send_heads(heads, rank)
        found: Arrays = {}
        for name, head in heads.items():
            array = arrays[name] if near is None else self._receive(head, near)
            for rank in further:
                self._send(array, rank)
            if keep(name):
                found[name] = array
            del array
        return found

    def _other(self, number: int) -> int | None:
        """The owner of a micro-batch, where that is another rank."""
        owner = self.owner(number)
        return None if owner == self.rank else owner

    # -- MLX's engine ------------------------------------------------------------------------------------------------------------

    def _send_heads(self, heads: Mapping[str, Head], to: int) -> None:
        text = np.frombuffer(json.dumps(heads).encode(), np.uint8)
        self._send(mx.array([len(text)], dtype=mx.uint32), to)
        self._send(mx.array(text), to)

    def _receive_heads(self, source: int) -> dict[str, Head]:
        length = self._receive(((1,), "uint32"), source).item()
        return json.loads(np.asarray(self._receive(((length,), "uint8"), source)).tobytes())

    def _send(self, array: mx.array, to: int) -> None:
        self.bytes_sent += array.nbytes
        with self._in_engine():
            mx.eval(mx.distributed.send(array, to, group=self._group))

    def _receive(self, head: Head, source: int) -> mx.array:
        shape, dtype = head
        with self._in_engine():
            array = mx.distributed.recv(tuple(shape), getattr(mx, dtype), source, group=self._group)
            mx.eval(array)
        return array

    @contextmanager
    def _in_engine(self) -> Iterator[None]:
        started = self._engine_since = time.monotonic()
        try:
            self._channel.check()  # behind the line above: a loss is noticed here, or ends the operation by `_shut_engine`
            yield
        except RuntimeError as error:
            if isinstance(error, FulltuneError):
                raise
            self._channel.lose(f"MLX's engine: {error}", wait=2.0)  # the channel knows the reason in a moment
            raise self._channel.error() from error
        finally:
            self._engine_since = None
            self.seconds += time.monotonic() - started

    def _shut_engine(self) -> None:
        """Has what waits in the engine fail. Called on a thread of the channel when a rank is lost."""
        for number in self._sockets():
            with suppress(OSError):
                own = socket.socket(fileno=os.dup(number))
                own.shutdown(socket.SHUT_RDWR)
                own.close()
        began = self._engine_since
        if began is not None:
            time.sleep(LOST_ENGINE_SECONDS)
            if self._engine_since == began:
                os.write(2, f"error: {self._channel.error()} MLX's engine does not return: this process ends.\n".encode())
                os._exit(1)


def owner_of(number: int, size: int) -> int:
    """See `Ranks.owner`."""
    there_and_back, place = divmod(number, size)
    return place if there_and_back % 2 == 0 else size - 1 - place


def passed_to(here: int, owner: int, size: int) -> list[int]:
    """The neighbours that a rank gives what one rank has for all: away from that."""
    return [rank for rank in (here - 1, here + 1) if 0 <= rank < size and (here == owner or (rank < here) == (here < owner))]


def sendings(size: int, count: int) -> list[int]:
    """How often each rank sends the gradients in a step of so many micro-batches: to who has the next one, and their sum."""
    owners = [owner_of(number, size) for number in range(count)]
    to_next = [here for here, after in zip(owners, owners[1:], strict=False) if here != after]
    return [to_next.count(rank) + len(passed_to(rank, owners[-1], size)) for rank in range(size)]


Head = Sequence[Any]  # shape and dtype of an array


def heads_of(arrays: Arrays) -> dict[str, Head]:
    """Name -> shape and dtype, as JSON values."""
    return {name: (list(array.shape), str(array.dtype).removeprefix("mlx.core.")) for name, array in arrays.items()}


def _added_head(so_far: Head | None, own: mx.array | None) -> Head:
    if own is None:
        return so_far
    shape, dtype = heads_of({"": own})[""]
    return (shape, dtype if so_far is None or on_cpu() else "float32")  # as `gradients.add` does it


def _connected_engine(deadline: float) -> mx.distributed.Group:
    """MLX's engine. Where a rank has ended in this very moment it waits for ever, with Python's lock: no thread of ours could end that.
    So the system's clock does, and the process with it."""
    faulthandler.dump_traceback_later(deadline + CONNECT_SECONDS, exit=True, file=sys.__stderr__ or 2)
    try:
        return mx.distributed.init(strict=True, backend=os.environ.get("FULLTUNE_NB_BACKEND", "any"))
    finally:
        faulthandler.cancel_dump_traceback_later()


def _open_sockets() -> set[int]:
    found = set()
    for name in os.listdir("/dev/fd"):
        with suppress(OSError, ValueError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.add(int(name))
    return found


# -- which ranks there are -----------------------------------------------------------------------------------------------------------

_ranks: Ranks | None = None


def ranks_of_environment() -> Ranks | None:
    """The ranks that this process was started among, connected at the first call; None where it was started alone.

    Raises:
        ConfigError: the environment names ranks, but not where rank 0 listens.
        TrainingError: a rank does not come within the deadline.
    """
    global _ranks
    if _ranks is None and os.environ.get("MLX_RANK"):
        _ranks = connect()
    return _ranks


class Started(Protocol):
    """The other ranks, where this process has started them."""

    def last_words(self, rank: int, within: float) -> str | None:
        """See `RankChannel`."""

    def end(self) -> None:
        """Those that were told to end have a moment; then they are killed."""


def connect(started: Started | None = None) -> Ranks | None:
    """The ranks that the environment names; None where that is this process alone."""
    if (hosts := os.environ.get(HOSTS)) is None:
        return _connected(started)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(hosts)
        file.flush()
        os.environ["MLX_HOSTFILE"] = file.name
        return _connected(started)


def _connected(started: Started | None) -> Ranks | None:
    rank, size, address = rank_of_environment(), size_of_environment(), address_of_environment()
    if size <= 1:
        return None
    if rank >= size:
        raise ConfigError(f"The environment variable MLX_RANK: expected less than the number of ranks, {size}, got {rank}.")
    if started is None:
        return Ranks(RankChannel(rank, size, address))
    return Ranks(RankChannel(rank, size, address, last_words=started.last_words), True, started.end)


def size_of_environment() -> int:
    """How many processes were started together; 1 where it is one alone."""
    if not os.environ.get("MLX_RANK"):
        return 1
    if size := os.environ.get("MLX_WORLD_SIZE"):
        return whole_number_in("MLX_WORLD_SIZE", size, 1)
    for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES", "JACCL_IBV_DEVICES"):
        if path := os.environ.get(name):
            with open(path, encoding="utf-8") as file:
                return len(json.load(file))
    raise ConfigError("MLX_RANK is set, but none of MLX_WORLD_SIZE, MLX_HOSTFILE and MLX_IBV_DEVICES. Start the ranks with mlx.launch.")


def address_of_environment() -> tuple[str, int]:
    """Where rank 0 listens: a thousand ports above where the engine's first rank does, unless a variable says it."""
    if own := os.environ.get(ADDRESS):
        host, _, port = own.rpartition(":")
        return host, whole_number_in(f"{ADDRESS} (host:port)", port, 1)
    if path := os.environ.get("MLX_HOSTFILE"):
        with open(path, encoding="utf-8") as file:
            name, place = "MLX_HOSTFILE", json.load(file)[0][0]
    elif place := os.environ.get("MLX_JACCL_COORDINATOR"):
        name = "MLX_JACCL_COORDINATOR"
    else:
        name, place = "NCCL_PORT", os.environ.get("NCCL_HOST_IP", "") + ":" + os.environ.get("NCCL_PORT", "")
    host, _, port = place.rpartition(":")
    if not host or not port:
        raise ConfigError(f"Where rank 0 listens is not known: set {ADDRESS} to its host and a free port, the same on every rank.")
    return host, whole_number_in(name, port, 1) + 1000
