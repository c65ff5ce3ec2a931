"""`python -m fulltune_nb.doctor`: what this machine and environment are, how fast they multiply, and what is missing."""

from __future__ import annotations

import argparse
import dataclasses
import json

from fulltune_nb.command_line import Parser, run, start
from fulltune_nb.html import printable


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(prog="python -m fulltune_nb.doctor", description="Says what this machine and environment are, and what is missing.")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = build_parser().parse_args(argv)

    def work() -> int:
        from fulltune_nb.device import machine_limit
        from fulltune_nb.system_info import system_info

        info, limit = system_info(measure=True), machine_limit()
        if arguments.json:
            print(printable(json.dumps({**dataclasses.asdict(info), "memory_limit": limit})))
        else:
            print(printable("\n".join(f"{name:18}{value}" for name, value in info.facts(limit))))
        return 0

    return run(work)


if __name__ == "__main__":
    start(main)
