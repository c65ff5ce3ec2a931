"""A model taken elsewhere: quantized for mlx-lm, as GGUF, for Ollama, or to the hub.

All begin with the Hugging Face folder that `lm.save` writes, made beside the target (for the hub among the temporary files) and removed
afterwards. What is made appears in one go when it is whole.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune_nb.errors import ConfigError, ModelError, listed, nearest, optional_import
from fulltune_nb.files import flush_to_disk, is_empty, put_in_place, unfinished_folder, write_text
from fulltune_nb.html import counted, human_bytes, printable
from fulltune_nb.models.folder import INDEX_FILE
from fulltune_nb.models.gguf import check_tools, checked_quantization, write_gguf
from fulltune_nb.models.ollama import modelfile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BITS = {"mlx-4bit": 4, "mlx-8bit": 8}
TARGETS = ("hf", *BITS, "gguf", "ollama", "hub")
_WEIGHTS = ("model*.safetensors", INDEX_FILE)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_QUANTIZED = ("gguf", "ollama")  # the targets that a quantization can be named for

WriteFolder = Callable[[Path], Any]
"""Writes a complete Hugging Face folder into a new one."""


def export(
    where: str | os.PathLike,
    to: str,
    write: WriteFolder,
    tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[str],
    quantization: str | None = None,
    private: bool = True,
    confirm: Callable[[str], bool] | None = None,
) -> Path | str:
    """`LanguageModel.export`, which says what the arguments are, for a target other than `"hf"`.

    Args:
        write: see `WriteFolder`.
        tokenizer: whose chat template Ollama is told.
        stops: texts that end an answer.

    Raises:
        ConfigError, MissingDependencyError, ModelError: as there.
    """
    if to not in TARGETS:
        raise ConfigError(f"export: there is no target {to!r:.80}. {nearest(to, TARGETS)}")
    if quantization is not None and to not in _QUANTIZED:
        raise ConfigError(f"export: quantization={quantization!r:.80} is for {' and '.join(_QUANTIZED)}, not for {to}.")
    if to == "hub":
        return _upload(os.fspath(where), write, private, confirm)
    place = Path(where).expanduser()
    if to == "gguf" and place.suffix != ".gguf":
        raise ConfigError(f"export: a GGUF file's name ends with .gguf, found {place}.")
    if place.exists() and (to == "gguf" or not is_empty(place)):
        raise ModelError(f"{place} exists already; nothing was written. Name a new place: nothing is overwritten.")
    try:
        with unfinished_folder(place) as work:
            made = work / "made"
            if to in BITS:
                _quantize(work, write, made, BITS[to])
            else:
                _make_gguf(work, write, made, checked_quantization(quantization), (tokenizer, stops) if to == "ollama" else None)
            for path in made.iterdir() if made.is_dir() else (made,):
                flush_to_disk(path)
            put_in_place(made, place)
    except OSError as error:
        raise ModelError(f"{place} could not be written: {error}. Check free space and permissions.") from error
    return place


def _quantize(work: Path, write: WriteFolder, made: Path, bits: int) -> None:
    """By mlx-lm, which knows what each family leaves unquantized. Tokenizer, card and ends are those of our own folder."""
    with optional_import("quantizing for MLX", "mlx-lm"):
        from mlx_lm import convert
    full = work / "hf"
    write(full)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            convert(str(full), mlx_path=str(made), quantize=True, q_bits=bits)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a family that it has not, or reads otherwise
        raise ModelError(
            f"mlx-lm could not quantize this model: {type(error).__name__}: {error}. Save it unquantized, or try a newer mlx-lm."
        ) from error
    for path in full.iterdir():
        if path.name != "config.json" and not any(map(path.match, _WEIGHTS)):
            shutil.copyfile(path, made / path.name)
    if not (full / "README.md").exists():
        (made / "README.md").unlink(missing_ok=True)  # mlx-lm's speaks of a hub repository


def _make_gguf(
    work: Path, write: WriteFolder, made: Path, quantization: str, for_ollama: tuple[PreTrainedTokenizerBase, Sequence[str]] | None
) -> None:
    check_tools(quantization)  # before the weights are written for nothing
    full = work / "hf"
    write(full)
    if for_ollama is None:
        write_gguf(full, work / "model.gguf", quantization)
        os.rename(work / "model.gguf", made)
        return
    made.mkdir()
    write_gguf(full, made / "model.gguf", quantization)
    write_text(made / "Modelfile", modelfile("model.gguf", *for_ollama))


def _upload(repository: str, write: WriteFolder, private: bool, confirm: Callable[[str], bool] | None) -> str:
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"export: a hub repository is named like 'me/my-model', found {repository!r:.80}.")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    of_the_network = HfHubHTTPError.__bases__[0]  # httpx's or httpx2's, by the hub's version; no connection at all is such an error
    api = HfApi()
    try:
        try:
            there = api.repo_info(repository)  # before the weights are written for nothing
        except RepositoryNotFoundError:
            there = None
        if there is not None and private and not there.private:
            raise ModelError(f"{repository} is there, and public. Nothing was uploaded. Pass private=False, or name another one.")
        with tempfile.TemporaryDirectory() as work:
            full = Path(work) / "hf"
            write(full)
            if not (confirm or _ask)(_announced(full, repository, private, there)):
                raise ModelError(f"Nothing was uploaded to {repository}: it was not agreed to.")
            api.create_repo(repository, private=private, exist_ok=True)
            message = "Upload by fulltune_nb"
            api.upload_folder(repo_id=repository, folder_path=str(full), commit_message=message, delete_patterns=list(_WEIGHTS))
    except HFValidationError as error:
        raise ConfigError(f"export: {repository} cannot be the name of a hub repository: {error}") from error
    except (of_the_network, OSError) as error:
        raise ModelError(
            f"{repository} could not be uploaded: {error}\nCheck the network, and log in by `hf auth login`, with a token that may write."
        ) from error
    return f"https://huggingface.co/{repository}"


def _announced(folder: Path, repository: str, private: bool, there: Any) -> str:
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    files = listed([f"{name} ({human_bytes(size)})" for name, size in sizes.items()], 20)
    kind = "private" if (there.private if there is not None else private) else "public"
    old = "an existing" if there is not None else "a new"
    total = f"{counted(len(sizes), 'file')}, {human_bytes(sum(sizes.values()))}"
    replaces = " Its weights are replaced." if there is not None else ""
    return f"To {old} {kind} repository {repository} on the Hugging Face hub go {total}: {files}.{replaces}"


def _ask(text: str) -> bool:
    """Asks who sits at the terminal or the notebook; where nobody does, an error says what to pass."""
    try:
        return input(printable(f"{text}\nUpload? [y/N] ")).strip().lower() in ("y", "yes")
    except (EOFError, RuntimeError) as error:  # no standard input, or a notebook that is executed
        raise ModelError(f"{text} Nothing was uploaded: nobody could be asked. Pass confirm=lambda text: True, or --yes.") from error
