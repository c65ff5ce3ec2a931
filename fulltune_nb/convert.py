"""`python -m fulltune_nb.convert IN OUT`: a model file from npz to safetensors or back, tensor by tensor."""

from __future__ import annotations

import argparse
from pathlib import Path

from fulltune_nb.command_line import Parser, run, start
from fulltune_nb.errors import WeightsError
from fulltune_nb.files import atomic_path
from fulltune_nb.html import human_bytes, printable
from fulltune_nb.models.model_file import metadata_path, read_metadata, with_metadata
from fulltune_nb.tensor_files import FORMAT, check_ending, open_tensors, write_npz, write_safetensors


def convert(source: Path, target: Path, force: bool = False) -> tuple[int, int]:
    """Copies a model file into the other format: the same names, dtypes, shapes and bytes, and what it says about itself.

    At most one tensor is in memory, and mostly only a piece of one. The target appears when it is whole.

    Args:
        source: `.npz` or `.safetensors`.
        target: the other one.
        force: replace a target that exists.

    Returns:
        Number of tensors and their bytes.

    Raises:
        WeightsError: the source cannot be read, the target exists, or an ending is wrong.
    """
    check_ending(source)
    check_ending(target)
    if source.suffix == target.suffix:
        raise WeightsError(f"{source} and {target} are both {source.suffix}; one has to be .npz and the other .safetensors.")
    if not source.is_file():
        raise WeightsError(f"No weights file at {source}.")
    taken = [path for path in (target, metadata_path(target)) if path.exists() and (path == target or target.suffix == ".npz")]
    if taken and not force:
        raise WeightsError(f"{taken[0]} exists already; nothing was written. Give another name, or --force to replace it.")
    metadata = read_metadata(source)
    tensors = open_tensors(source)
    own = {key: value for key, value in metadata.items() if key != "format"}
    try:
        with with_metadata(target, own), atomic_path(target) as temporary:
            if target.suffix == ".npz":
                write_npz(temporary, tensors)
            else:
                write_safetensors(temporary, tensors, {**metadata, **FORMAT})
    except OSError as error:
        raise WeightsError(f"{target} could not be written: {error}. Check free space and permissions.") from error
    return len(tensors), sum(tensor.nbytes for tensor in tensors)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(prog="python -m fulltune_nb.convert", description="Converts a model file between .npz and .safetensors, either way.")
    parser.add_argument("source", metavar="IN", type=Path, help="the file to read")
    parser.add_argument("target", metavar="OUT", type=Path, help="the file to write; the ending says as what")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = build_parser().parse_args(argv)

    def work() -> int:
        count, size = convert(arguments.source, arguments.target, arguments.force)
        print(printable(f"Wrote {arguments.target}: {count} tensors, {human_bytes(size)}."))
        return 0

    return run(work)


if __name__ == "__main__":
    start(main)
