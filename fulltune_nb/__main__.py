"""`python -m fulltune_nb`: which commands there are."""

from __future__ import annotations

import sys

COMMANDS = """\
Full fine-tuning of language models with MLX. The commands, each with --help:

  python -m fulltune_nb.demo        fine-tunes a tiny model in a notebook, offline, in a few minutes
  python -m fulltune_nb.full        trains and tests a model
  python -m fulltune_nb.generate    answers a prompt
  python -m fulltune_nb.convert     a model file from .npz to .safetensors, or back
  python -m fulltune_nb.export      a model taken elsewhere: quantized for mlx-lm, GGUF, Ollama, the hub
  python -m fulltune_nb.sweep       runs a notebook with many parameters
  python -m fulltune_nb.doctor      says what this machine is, and what is missing
"""


def main() -> int:
    """Prints them; exit code 2, as nothing was done."""
    print(COMMANDS, end="")
    return 2


if __name__ == "__main__":
    sys.exit(main())
