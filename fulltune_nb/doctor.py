"""`python -m fulltune_nb.doctor`: what this machine and environment are, how fast they multiply, which models fit, and what is missing."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from fulltune_nb.command_line import Parser, run, start
from fulltune_nb.html import human_bytes, printable

_SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
MODELS: dict[str, tuple[str, tuple[int, ...], bool]] = {
    "SmolLM2 360M": ("llama", (960, 32, 2560, 15, 5, 64, 49152), True),
    "Qwen3 0.6B": ("qwen3", (1024, 28, 3072, 16, 8, 128, 151936), True),
    "Llama 3.2 1B": ("llama", (2048, 16, 8192, 32, 8, 64, 128256), True),
    "Qwen3 1.7B": ("qwen3", (2048, 28, 6144, 16, 8, 128, 151936), True),
    "Llama 3.2 3B": ("llama", (3072, 28, 8192, 24, 8, 128, 128256), True),
    "Mistral 7B v0.3": ("mistral", (4096, 32, 14336, 32, 8, 128, 32768), False),
    "Qwen3 8B": ("qwen3", (4096, 36, 12288, 32, 8, 128, 151936), False),
    "Qwen3 32B": ("qwen3", (5120, 64, 25600, 64, 8, 128, 151936), False),
}
"""Model -> its family, its sizes by `_SIZES`, and whether head and embedding are one."""
WAYS: dict[str, dict[str, Any]] = {
    "fast": {"memory": "fast", "grad_checkpoint": True, "optimizer": "adamw8bit"},
    "lean": {"memory": "lean", "optimizer": "adafactor"},
}
"""Two ways to train, from much memory to little: the settings of each."""
TOKENS = 2048
"""Of the one row in a micro-batch."""
_NOT_TOLD = ("cpu", "cuda12", "cuda13", "docs", "frontends", "test")  # of the first three a machine has one; the others are for a checkout


def peaks(config: dict[str, Any]) -> dict[str, int]:
    """Way -> bytes that a run of a model takes at its peak on this machine, counted from shapes; weights in bfloat16.

    Args:
        config: of the model, as `config.json` has it.
    """
    from fulltune_nb.models.decoder import Decoder
    from fulltune_nb.models.model_config import read_config
    from fulltune_nb.training.config import TrainConfig
    from fulltune_nb.training.plan import preflight

    decoder = Decoder(read_config(config))  # nothing is evaluated: arrays are lazy
    lm = SimpleNamespace(model=decoder, config=decoder.config, dtype="bfloat16")
    settings = {way: TrainConfig(batch_size=1, max_seq_length=TOKENS, **own) for way, own in WAYS.items()}
    return {way: preflight(lm, None, own).peak for way, own in settings.items()}


def config_of(model: str) -> dict[str, Any]:
    """What a `config.json` says of one of `MODELS`, as far as memory depends on it."""
    family, sizes, tied = MODELS[model]
    return {"model_type": family, **dict(zip(_SIZES, sizes, strict=True)), "tie_word_embeddings": tied}


def missing() -> Iterator[tuple[str, list[str]]]:
    """Each extra for users, with those of its packages that are not installed, or are too old; none where this package is not installed."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        own = [Requirement(line) for line in metadata.requires("fulltune_nb") or []]
    except metadata.PackageNotFoundError:  # a checkout on the path
        return

    def lacking(extra: str) -> list[str]:
        asked = [line for line in own if line.marker and line.marker.evaluate({"extra": extra}) and not line.marker.evaluate({"extra": ""})]
        included = [name for line in asked if line.name == "fulltune_nb" for part in sorted(line.extras) for name in lacking(part)]
        return [*included, *(line.name for line in asked if not _has(line))]

    for extra in metadata.metadata("fulltune_nb").get_all("Provides-Extra") or []:
        if extra not in _NOT_TOLD:
            yield extra, lacking(extra)


def _has(requirement: Any) -> bool:
    from importlib import metadata

    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def _found() -> tuple[Any, int, dict[str, dict[str, int]], dict[str, list[str]]]:
    from fulltune_nb.device import machine_limit
    from fulltune_nb.system_info import system_info

    return system_info(measure=True), machine_limit(), {model: peaks(config_of(model)) for model in MODELS}, dict(missing())


def page() -> str:
    """All of it as text."""
    info, limit, models, extras = _found()
    lines = [f"{name:18}{value}" for name, value in info.facts(limit)]
    lines += ["", f"Which models fit, weights in bfloat16, one row of {TOKENS:,} tokens at a time; ft.preflight counts it for yours:"]
    lines += [f"  {way}: " + ", ".join(f"{name}={value!r}" for name, value in own.items()) for way, own in WAYS.items()]
    for model, own in models.items():
        cells = [f"{way} {human_bytes(peak):>9} {'fits' if peak <= limit else '-':4}" for way, peak in own.items()]
        lines.append(f"  {model:16}{'   '.join(cells)}".rstrip())
    lines += ["", "Extras:"]
    for extra, lacking in extras.items():
        how = f"missing {', '.join(lacking)}: pip install 'fulltune_nb[{extra}]'" if lacking else "installed"
        lines.append(f"  {extra:16}{how}")
    return "\n".join(lines)


def as_json() -> str:
    """The same as one JSON object; memory in bytes."""
    info, limit, models, extras = _found()
    fits = {model: {way: {"peak": peak, "fits": peak <= limit} for way, peak in own.items()} for model, own in models.items()}
    return json.dumps({**dataclasses.asdict(info), "memory_limit": limit, "models": fits, "missing": extras})


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    what = "Says what this machine and environment are, which models fit, and what is missing."
    parser = Parser(prog="python -m fulltune_nb.doctor", description=what)
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = build_parser().parse_args(argv)

    def work() -> int:
        print(printable(as_json() if arguments.json else page()))
        return 0

    return run(work)


if __name__ == "__main__":
    start(main)
