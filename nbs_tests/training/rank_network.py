"""Ranks on one machine whose messages cross network interfaces: each in a network namespace of its own, with a cable to a common switch.

Linux, as root, with `ip` of iproute2. All of it lies in namespaces named after this process; the machine's own network stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fulltune_nb.training.start_ranks import end_together, environments, kill, start_rank

INTERFACE = "eth0"
"""The name of a rank's interface within its namespace."""


class Network:
    """So many namespaces, each with an interface that a cable joins to a switch; within a `with` block.

    Attributes:
        hosts: the address of each rank.
    """

    def __init__(self, size: int):
        self.hosts = [f"10.77.0.{rank + 1}" for rank in range(size)]
        self._names = [f"ft{os.getpid()}-{rank}" for rank in range(size)]
        self._switch = f"ft{os.getpid()}-switch"

    def __enter__(self) -> Network:
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "switch", "up")
            for rank, (name, host) in enumerate(zip(self._names, self.hosts, strict=True)):
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
                cable = ("link", "add", f"port{rank}", "type", "veth", "peer", "name", INTERFACE, "netns", name)
                _ip("-n", self._switch, *cable)
                _ip("-n", self._switch, "link", "set", f"port{rank}", "master", "switch", "up")
                _ip("-n", name, "address", "add", f"{host}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", INTERFACE, "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes all of it away."""
        for name in (self._switch, *self._names):
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)

    def start(self, rank: int, command: Sequence[str], environment: dict[str, str], **options: Any) -> subprocess.Popen:
        """As `start_rank`, in the rank's namespace; the process is the command's own."""
        return start_rank("localhost", ["ip", "netns", "exec", self._names[rank], *command], environment, **options)

    def cut(self, rank: int) -> None:
        """Pulls the rank's cable: nothing arrives any more, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"port{rank}", "down")

    def mend(self, rank: int) -> None:
        """Puts it back."""
        _ip("-n", self._switch, "link", "set", f"port{rank}", "up")


def start_ranks(
    command: Sequence[str], folder: Path, size: int, network: Network | None = None, environment: Mapping[str, str] = MappingProxyType({})
) -> list[subprocess.Popen]:
    """The command on so many ranks, in a network or else over the loopback. What rank R says of errors goes to FOLDER/said-R."""
    owns, ranks = environments(["localhost"] * size if network is None else network.hosts), []
    for rank, own in enumerate(owns):
        with open(folder / f"said-{rank}", "w") as said:
            start = partial(start_rank, "localhost") if network is None else partial(network.start, rank)
            ranks.append(start(command, {**own, **environment}, stdout=subprocess.DEVNULL, stderr=said))
    return ranks


def bytes_sent(interface: str = INTERFACE) -> int | None:
    """What has left an interface of this process's network so far, headers included, as the kernel counts it; None without such a one."""
    count = Path(f"/sys/class/net/{interface}/statistics/tx_bytes")
    return int(count.read_text()) if count.exists() else None


def why_no_network() -> str | None:
    """Why there can be no `Network` here; None where there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid():
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` (iproute2)"
    try:
        with Network(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not to be had here: {error.stderr.decode(errors='replace').strip():.200}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


if __name__ == "__main__":  # RANKS COMMAND...: the command on so many ranks, in a network
    with Network(int(sys.argv[1])) as made:
        processes = [made.start(rank, sys.argv[2:], own) for rank, own in enumerate(environments(made.hosts))]
        try:
            sys.exit(end_together(processes))
        finally:
            kill(processes)
