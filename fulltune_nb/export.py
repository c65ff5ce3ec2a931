"""`python -m fulltune_nb.export MODEL WHERE --to TARGET`: a model taken elsewhere.

The place goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import sys

from fulltune_nb.command_line import Parser, add_weights, run, start
from fulltune_nb.html import printable

TARGETS = {
    "hf": "a Hugging Face folder",
    "mlx-4bit": "a folder that mlx-lm loads, quantized to 4 bits",
    "mlx-8bit": "the same with 8 bits",
    "gguf": "a GGUF file, by llama.cpp's converter (LLAMA_CPP names its checkout)",
    "ollama": "a folder with a GGUF file and a Modelfile, for `ollama create NAME -f WHERE/Modelfile`",
    "hub": "a repository on the Hugging Face hub, such as me/my-model; what will be uploaded is said first",
}
EPILOG = """\
examples:
  python -m fulltune_nb.export model_hf my-model-4bit --to mlx-4bit
  python -m fulltune_nb.export model_hf my-model.gguf --to gguf --quantization Q4_K_M
  python -m fulltune_nb.export model_hf my-model-ollama --to ollama --quantization q8_0
  python -m fulltune_nb.export model_hf me/my-model --to hub
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    targets = "".join(f"  {name:9} {meaning}\n" for name, meaning in TARGETS.items())
    parser = Parser(prog="python -m fulltune_nb.export", description="Takes a model elsewhere.", epilog=f"targets:\n{targets}\n{EPILOG}")
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder or hub id")
    add("where", metavar="WHERE", help="a new folder, file or repository, by the target")
    add("--to", choices=tuple(TARGETS), default="hf", help="the target (default: %(default)s)")
    add("--quantization", metavar="NAME", help="of gguf and ollama, such as q8_0 or Q4_K_M (default: bf16)")
    add_weights(parser)
    add("--public", action="store_true", help="a repository that is made on the hub is public")
    add("--yes", action="store_true", help="upload without asking")
    return parser


def _agreed(text: str) -> bool:
    print(printable(text), file=sys.stderr)
    return True


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = build_parser().parse_args(argv)

    def work() -> int:
        from fulltune_nb.models.model_file import load_with_model_file

        lm = load_with_model_file(arguments.model, arguments.model_file, arguments.dtype, arguments.dequantize)
        confirm = _agreed if arguments.yes else None
        place = lm.export(arguments.where, arguments.to, arguments.quantization, not arguments.public, confirm)
        print(printable(place))
        return 0

    return run(work)


if __name__ == "__main__":
    start(main)
