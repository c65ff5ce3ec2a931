"""`python -m fulltune_nb.ranks`: runs a command on several ranks, and ends with an exit code that says what came of it.

As `mlx.launch` does it for MLX's ring, but for the exit code, which there is 0 whatever happened, and for interrupts: Ctrl-C pauses all
ranks at the same whole step.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

from fulltune_nb.command_line import Parser, run, start
from fulltune_nb.errors import ConfigError
from fulltune_nb.html import printable

EPILOG = """\
examples:
  fulltune ranks -n 2 -- fulltune train --model M --data data --grad-accumulation-steps 4
  fulltune ranks --hosts localhost,mac-2.local -- python train.py

Every rank runs the same command. Other hosts are reached by ssh without a password, and have the same files at the same places.
"""


OWN = {"python": [sys.executable], "fulltune": [sys.executable, "-m", "fulltune_nb"]}
"""What first words of a command stand for."""


def build_parser() -> Parser:
    """The command's arguments."""
    parser = Parser(prog="python -m fulltune_nb.ranks", description="Runs a command on several ranks.", epilog=EPILOG)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("-n", "--ranks", type=int, metavar="N", help="so many processes on this machine")
    where.add_argument("--hosts", metavar="A,B", help="one process on each of these hosts; localhost is this machine")
    parser.add_argument("--address", metavar="HOST", help="under which other hosts reach this machine (default: its name)")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="python stands for the Python that runs here")
    return parser


def work(hosts: list[str], address: str | None, command: list[str]) -> int:
    """Starts all ranks and waits for them; the exit code of the first that failed, or 0."""
    from fulltune_nb.training.start_ranks import end_together, environments, kill, start_rank

    if not command:
        raise ConfigError("What shall run? Give the command behind --, such as: -- fulltune train")
    ranks: list[subprocess.Popen] = []

    def pass_on(number: int, frame: Any) -> None:
        if ranks:
            with suppress(OSError):
                ranks[0].send_signal(number)  # which pauses all at the same step

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    try:
        for host, own in zip(hosts, environments(hosts, address), strict=True):
            first = OWN.get(command[0], [command[0]])
            ranks.append(start_rank(host, [*first, *command[1:]], own, start_new_session=True))  # else Ctrl-C would reach each by itself
        return end_together(ranks, lambda line: print(printable(line), file=sys.stderr))
    finally:
        kill(ranks)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; of a rank that a signal has ended, 128 and the signal's number, as shells have it."""
    given = build_parser().parse_args(argv)
    hosts = ["localhost"] * given.ranks if given.ranks is not None else given.hosts.split(",")
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    code = run(lambda: work(hosts, given.address, command))
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    start(main)
