"""GGUF, by llama.cpp's own converter, in a process of its own: it needs PyTorch, which this package does not.

The converter knows a BPE tokenizer by what it makes of a test sentence, and only those of published models. Of others it is told which of
llama.cpp's ways to cut texts is theirs, where `tokenizer.json` says the same.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fulltune_nb.errors import ConfigError, MissingDependencyError, ModelError, nearest
from fulltune_nb.model_json import read_json

CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
FOLDER, PYTHON = "LLAMA_CPP", "LLAMA_CPP_PYTHON"
"""Environment variables: a checkout of llama.cpp, and the Python that runs its converter."""
WRITTEN = ("f32", "f16", "bf16", "q8_0")
"""What the converter writes by itself; of the others the quantizer makes one from a file in `_BETWEEN`."""
QUANTIZED = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k",
    "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq4_nl", "iq4_xs",
)  # fmt: skip
DEFAULT = "bf16"
_BETWEEN = "bf16"
_SHOWN = 2000  # last characters of what a process said
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}
"""Regular expression of a `tokenizer.json` -> llama.cpp's name for it."""

# Runs the converter; where that does not know the tokenizer, it is told the name. Arguments: its folder, the name, then its own.
_WITH_NAME = """
import importlib, sys
folder, name, *arguments = sys.argv[1:]
sys.path.insert(0, folder)
converter = importlib.import_module("convert_hf_to_gguf")
model = getattr(converter, "TextModel", None) or importlib.import_module("conversion").TextModel
known = model.get_vocab_base_pre
def named(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return name
model.get_vocab_base_pre = named
sys.argv = ["convert_hf_to_gguf.py", *arguments]
converter.main()
"""


def checked_quantization(name: str | None) -> str:
    """A quantization's name in lower case, `DEFAULT` for None.

    Raises:
        ConfigError: llama.cpp has none of that name.
    """
    if name is None:
        return DEFAULT
    if str(name).lower() not in (*WRITTEN, *QUANTIZED):
        raise ConfigError(f"quantization: llama.cpp has none called {str(name)[:80]!r}. {nearest(name, (*WRITTEN, *QUANTIZED))}")
    return str(name).lower()


def check_tools(quantization: str) -> tuple[Path, str | None]:
    """The converter, and the quantizer where one is needed.

    Raises:
        MissingDependencyError: not found; the message has the commands.
    """
    folder = Path(os.environ[FOLDER]).expanduser() if os.environ.get(FOLDER) else None
    found = folder / CONVERTER if folder else Path(shutil.which(CONVERTER) or "")
    if not found.is_file():
        raise MissingDependencyError(_commands(f"its converter was not found ({_looked(folder, CONVERTER)})", quantization))
    if quantization in WRITTEN:
        return found, None
    places = [folder / "build" / "bin" / QUANTIZER, folder / QUANTIZER] if folder else []
    quantizer = next((str(place) for place in places if place.is_file()), shutil.which(QUANTIZER))
    if quantizer is None:
        missing = f"{QUANTIZER}, which makes {quantization}, was not found ({_looked(folder, QUANTIZER)})"
        raise MissingDependencyError(_commands(missing, quantization))
    return found, quantizer


def write_gguf(model: Path, target: Path, quantization: str) -> None:
    """A model folder as one GGUF file.

    Args:
        model: a folder that `lm.save` wrote.
        target: the file; there is none yet. What is made on the way stands beside it.
        quantization: as `checked_quantization` gives it.

    Raises:
        MissingDependencyError: llama.cpp's converter or quantizer was not found.
        ModelError: one of them failed; the message has the end of what it said.
    """
    converter, quantizer = check_tools(quantization)
    if quantizer is None:
        _run_converter(converter, model, target, quantization)
    else:
        between = target.with_name(f"{_BETWEEN}.gguf")
        _run_converter(converter, model, between, _BETWEEN)
        _run([quantizer, str(between), str(target), quantization.upper()], QUANTIZER)
        between.unlink()
    with target.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError("What llama.cpp wrote is no GGUF file. Nothing was kept. Update llama.cpp.")


def _run_converter(converter: Path, model: Path, target: Path, kind: str) -> None:
    arguments = [str(model), "--outfile", str(target), "--outtype", kind]
    name = pre_tokenizer_name(read_json(model / "tokenizer.json")) if (model / "tokenizer.json").is_file() else None
    begin = [str(converter)] if name is None else ["-c", _WITH_NAME, str(converter.parent), name]
    _run([_python(converter.parent), *begin, *arguments], CONVERTER)


def _python(folder: Path) -> str:
    """The Python that has what the converter needs: the one told, one of an environment in the checkout, else this one."""
    own = [folder / name / "bin" / "python" for name in (".venv", "venv")]
    return os.environ.get(PYTHON) or next((str(path) for path in own if path.is_file()), sys.executable)


def _run(command: Sequence[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except OSError as error:
        raise ModelError(f"{what} of llama.cpp could not be run: {error}. Check {FOLDER} and {PYTHON}.") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-_SHOWN:]
        raise ModelError(
            f"{what} of llama.cpp ended with {done.returncode}; nothing was written. The converter needs torch, transformers, sentencepiece"
            f" and gguf in the Python that runs it ({command[0]}; {PYTHON} names another). The end of what was said:\n{said}"
        )


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a `tokenizer.json` cuts texts before BPE; None where it has another way, or normalizes texts."""
    if tokenizer.get("normalizer") is not None:
        return None
    parts = tokenizer.get("pre_tokenizer") or {}
    steps = parts.get("pretokenizers", []) if parts.get("type") == "Sequence" else [parts]
    steps = [step for step in steps if isinstance(step, dict)]
    if not steps or any(step.get("add_prefix_space") for step in steps):
        return None
    *first, last = steps
    if last.get("type") != "ByteLevel":
        return None
    if not first and last.get("use_regex", True):
        return "gpt-2"
    if len(first) == 1 and first[0] == {"type": "Digits", "individual_digits": True} and last.get("use_regex", True):
        return "smollm"
    if len(first) == 1 and first[0].get("type") == "Split" and first[0].get("behavior") == "Isolated" and not first[0].get("invert"):
        pattern = first[0].get("pattern")
        return _SPLITS.get(pattern.get("Regex")) if isinstance(pattern, dict) and last.get("use_regex") is False else None
    return None


def _looked(folder: Path | None, name: str) -> str:
    return f"{FOLDER} names {folder}" if folder else f"{FOLDER} is not set, and no {name} is on the PATH"


def _commands(missing: str, quantization: str) -> str:
    steps = [
        "  git clone --depth 1 https://github.com/ggml-org/llama.cpp",
        "  pip install torch transformers sentencepiece gguf      # or in an environment llama.cpp/.venv, which is used then",
    ]
    by_hand = [f"  python llama.cpp/{CONVERTER} my-model --outfile model.gguf --outtype {quantization}"]
    if quantization not in WRITTEN:
        steps.append("  cmake -S llama.cpp -B llama.cpp/build && cmake --build llama.cpp/build --target llama-quantize")
        by_hand = [
            f"  python llama.cpp/{CONVERTER} my-model --outfile between.gguf --outtype {_BETWEEN}",
            f"  llama.cpp/build/bin/{QUANTIZER} between.gguf model.gguf {quantization.upper()}",
        ]
    return "\n".join([
        f"GGUF is written by llama.cpp, and {missing}. Install it, and export again:",
        *steps,
        f'  export {FOLDER}="$PWD/llama.cpp"',
        'Or save the model by lm.save("my-model"), and convert that:',
        *by_hand,
    ])  # fmt: skip
