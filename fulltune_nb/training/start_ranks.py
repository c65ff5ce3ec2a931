"""Starting ranks: a command on each of some hosts, with what tells each process which rank it is."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

from fulltune_nb.errors import ConfigError
from fulltune_nb.training.parallel import HOSTS, Ranks, connect
from fulltune_nb.training.rank_channel import ADDRESS, TOKEN

LOCAL = ("localhost", "127.0.0.1")
REMOTE_PORTS = range(21000, 31000)
PATIENCE_SECONDS = 3.0
"""Between the end of a rank that failed and that of the others, which have noticed it, or hang."""
WORKER = [sys.executable, "-m", "fulltune_nb.training.worker"]
"""What a rank runs that a notebook has started."""
_LAST_LINES, _LAST_BYTES = 5, 2000  # of what a rank said
PASSED_ON = ("FULLTUNE_NB_DEADLINE", "MLX_ENABLE_TF32", "PYTHONPATH", "HF_HOME")
"""Variables that processes on other machines get too."""


def environments(hosts: Sequence[str], address: str | None = None) -> list[dict[str, str]]:
    """What each rank's environment must have: rank r runs on `hosts[r]`.

    Args:
        hosts: names or addresses; "localhost" as often as ranks are to run here.
        address: under which the others reach this machine, where some are elsewhere; None: its name.

    Raises:
        ConfigError: no list of at least two names.
    """
    if isinstance(hosts, str) or len(hosts) < 2 or not all(isinstance(host, str) and host and host[0] != "-" for host in hosts):
        raise ConfigError(f'hosts: expected at least two names, such as ["localhost", "localhost"], got {hosts!r:.200}.')
    local = all(host in LOCAL for host in hosts)
    own = "127.0.0.1" if local else address or socket.gethostname()
    ports = _free_ports(len(hosts) + 1) if local else _random_ports(len(hosts) + 1)
    places = [f"{own if host in LOCAL else host}:{port}" for host, port in zip(hosts, ports, strict=False)]
    first = places[0].rpartition(":")[0]
    common = {
        HOSTS: json.dumps([[socket_address(place)] for place in places]),
        ADDRESS: f"{first}:{ports[-1]}",
        TOKEN: secrets.token_hex(16),
        "MLX_WORLD_SIZE": str(len(hosts)),
    }
    return [{**common, "MLX_RANK": str(rank)} for rank in range(len(hosts))]


def start_rank(host: str, command: Sequence[str], environment: dict[str, str], **options: Any) -> subprocess.Popen:
    """One rank's process; `options` as for `subprocess.Popen`. On another host it is started by `ssh`, in the folder of the same name.

    Raises:
        ConfigError: there is no such command here, or no ssh.
    """
    try:
        return _started(host, command, environment, options)
    except OSError as error:
        raise ConfigError(f"A rank on {host} cannot be started: {error}. Is {'the command' if host in LOCAL else 'ssh'} there?") from error


def _started(host: str, command: Sequence[str], environment: dict[str, str], options: dict[str, Any]) -> subprocess.Popen:
    if host in LOCAL:
        return subprocess.Popen(command, env={**os.environ, **environment}, **options)
    environment = {**{name: os.environ[name] for name in PASSED_ON if name in os.environ}, **environment}
    secret = environment.pop(TOKEN)
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    script = f"read -r {TOKEN}; export {TOKEN} {exports}; cd {shlex.quote(os.getcwd())} 2>/dev/null; exec {shlex.join(command)}"
    process = subprocess.Popen(["ssh", "-o", "BatchMode=yes", host, script], **{**options, "stdin": subprocess.PIPE})
    process.stdin.write(f"{secret}\n".encode())
    process.stdin.flush()
    return process


_launched = False


def launch(hosts: Sequence[str], address: str | None = None) -> Ranks:
    """Ranks for `Trainer(..., parallel=...)`, with this process as rank 0. They get model, data and settings from the trainer, and end with
    this process, with `.close()`, or at the end of a `with` block.

    Args:
        hosts: where they run, this machine first: `["localhost", "localhost"]` are two ranks here. Others are reached by ssh without a
            password, and have the same Python with this package at the same place.
        address: under which the others reach this machine; None: its name.

    Raises:
        ConfigError: no such hosts, or this process has launched ranks before: MLX's engine connects once a process.
        TrainingError: a rank does not come.
    """
    global _launched
    if _launched or os.environ.get("MLX_RANK"):
        raise ConfigError("This process has its ranks: MLX's engine connects once a process. Restart Python (the kernel) for others.")
    if not hosts or hosts[0] not in LOCAL:
        raise ConfigError(f'hosts: expected "localhost" first, which is this process, got {hosts!r:.200}.')
    own, *others = environments(hosts, address)
    started = StartedRanks()
    before = {name: os.environ.get(name) for name in (*own, "MLX_HOSTFILE")}
    try:
        for host, one in zip(hosts[1:], others, strict=True):
            started.start(host, WORKER, one)
        os.environ.update(own)  # where MLX looks for it, too
        ranks = connect(started)
        _launched = True
        return ranks
    except BaseException:
        started.kill()
        raise
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


class StartedRanks:
    """The processes of all ranks but 0, and what they say of errors."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen] = []
        self._said: list[IO[bytes]] = []

    def start(self, host: str, command: Sequence[str], environment: dict[str, str]) -> None:
        """The next rank; arguments as for `start_rank`."""
        self._said.append(tempfile.TemporaryFile())
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": self._said[-1]}
        self._processes.append(start_rank(host, command, environment, start_new_session=True, **streams))

    def last_words(self, rank: int, within: float = 0.0) -> str | None:
        """How a rank's process has ended, and the last lines that it said; None where it still runs after so many seconds."""
        try:
            code = self._processes[rank - 1].wait(within)
        except subprocess.TimeoutExpired:
            return None
        said = self._said[rank - 1]
        size = os.fstat(said.fileno()).st_size
        text = os.pread(said.fileno(), _LAST_BYTES, max(size - _LAST_BYTES, 0)).decode("utf-8", "replace")
        return "; ".join([_how_it_ended(code), *(line.strip() for line in text.splitlines()[-_LAST_LINES:] if line.strip())])

    def end(self) -> None:
        """Those that were told to end have a moment; then they are killed."""
        end = time.monotonic() + PATIENCE_SECONDS
        while any([process.poll() is None for process in self._processes]) and time.monotonic() < end:
            time.sleep(0.02)
        self.kill()

    def kill(self) -> None:
        """Ends those that are still there, at once."""
        kill(self._processes)


def end_together(processes: Sequence[subprocess.Popen], tell: Callable[[str], None] = lambda line: None) -> int:
    """Waits for all ranks; when one has failed, the others have some seconds to end. The exit code of the first that failed, or 0.

    Args:
        tell: hears of the first that failed, and of those that had to be killed then, which may have said nothing.
    """
    code, end = 0, None
    while None in (codes := [process.poll() for process in processes]):
        failed = [rank for rank, found in enumerate(codes) if found]
        if failed and end is None:
            code, end = codes[failed[0]], time.monotonic() + PATIENCE_SECONDS
            tell(f"Rank {failed[0]} has ended with {_how_it_ended(code)}.")
        if end is not None and time.monotonic() > end:
            left = ", ".join(str(rank) for rank, found in enumerate(codes) if found is None)
            tell(f"Rank {left} did not end within {PATIENCE_SECONDS:.0f} s of that, and is killed.")
            kill(processes)
        time.sleep(0.05)
    return code or next((process.returncode for process in processes if process.returncode), 0)


def _how_it_ended(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def kill(processes: Sequence[subprocess.Popen]) -> None:
    """Ends those that are still there, at once."""
    for process in processes:
        with suppress(OSError):
            process.kill()
        process.wait()


def socket_address(place: str) -> str:
    """host:port with the host's address: MLX's ring binds to it."""
    host, _, port = place.rpartition(":")
    try:
        return f"{socket.gethostbyname(host)}:{port}"
    except OSError as error:
        raise ConfigError(f"host {host!r} is not known here: {error}. Give its address.") from error


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _random_ports(count: int) -> list[int]:
    return secrets.SystemRandom().sample(REMOTE_PORTS, count)
