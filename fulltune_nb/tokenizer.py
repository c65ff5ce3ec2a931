"""Tokenizers: read from a model folder, written into one, and two facts about their tokens that several modules need."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune_nb.errors import ModelError

if TYPE_CHECKING:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
SENTENCEPIECE = "tokenizer.model"
"""The vocabulary as SentencePiece keeps it: transformers reads it where there is no tokenizer.json, llama.cpp's converter needs it."""
TEMPLATE = "chat_template.jinja"
"""The chat template as a file of its own."""

_LOCAL_KEYS = ("is_local", "local_files_only", "name_or_path", "tokenizer_file", "vocab_file")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, without running any code of the folder's.

    Raises:
        ModelError: there is none, or it needs code from the checkpoint, or a package that is not installed.
    """
    if not any((folder / name).exists() for name in VOCABULARIES):  # transformers would make some an empty tokenizer
        raise ModelError(f"{folder}: there is no tokenizer. The folder needs one of {', '.join(VOCABULARIES)}.")
    try:
        return _auto_tokenizer().from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; all mean the same to the reader
        only = (folder / SENTENCEPIECE).exists() and not (folder / "tokenizer.json").exists()
        missing = [name for name, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")) if not _installed(module)]
        if only and missing:
            found = f"{folder}: its tokenizer is a {SENTENCEPIECE} and no tokenizer.json."
            raise ModelError(f"{found} To read it: pip install {' '.join(missing)}") from error
        raise ModelError(f"{folder}: the tokenizer could not be loaded: {error}") from error


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package it would be in
        return False


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike) -> None:
    """Writes a tokenizer's files so that transformers 4 (and what is built on it) reads them as transformers 5 does.

    `tokenizer.model`, which transformers 5 does not write, is copied from the folder the tokenizer came from, if it is there.
    """
    tokenizer.save_pretrained(str(folder))
    config_path = Path(folder) / "tokenizer_config.json"
    if config_path.is_file():
        config = _for_both_versions(json.loads(config_path.read_text(encoding="utf-8")))
        config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    source, target = Path(str(tokenizer.name_or_path or "")) / SENTENCEPIECE, Path(folder) / SENTENCEPIECE
    if tokenizer.name_or_path and source.is_file() and not target.exists():
        shutil.copyfile(source, target)


def _for_both_versions(config: dict[str, Any]) -> dict[str, Any]:
    """A `tokenizer_config.json` of transformers 5 in words that 4 knows too, without paths of this machine."""
    config = {key: value for key, value in config.items() if key not in _LOCAL_KEYS}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list) and "additional_special_tokens" not in config:
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _auto_tokenizer() -> type[AutoTokenizer]:
    """`transformers.AutoTokenizer`, imported without its advice to install PyTorch, which nothing here needs."""
    switch = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        os.environ.pop(switch) if before is None else os.environ.update({switch: before})
    return AutoTokenizer


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens: those that `decode(..., skip_special_tokens=True)` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {token for token, entry in added.items() if getattr(entry, "special", False)}


def _byte_alphabet() -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()
"""Character -> byte in byte-level BPE vocabularies (GPT-2): printable bytes stand for themselves, the others are 256, 257, ..."""
