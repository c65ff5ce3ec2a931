"""A tokenizer from a model folder, and into one."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fulltune_nb.errors import ModelError

if TYPE_CHECKING:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
SENTENCEPIECE = "tokenizer.model"
"""The vocabulary as SentencePiece keeps it: transformers reads it where there is no tokenizer.json, llama.cpp's converter needs it."""


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
    """Writes a tokenizer's files, and `tokenizer.model` as it stands in the folder the tokenizer came from, if it does.

    transformers 5 no longer writes that file itself.
    """
    tokenizer.save_pretrained(str(folder))
    source, target = Path(str(tokenizer.name_or_path or "")) / SENTENCEPIECE, Path(folder) / SENTENCEPIECE
    if tokenizer.name_or_path and source.is_file() and not target.exists():
        shutil.copyfile(source, target)


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
