"""Tokenizers: read from a model folder, written into one, and two facts about their tokens that several modules need.

What transformers writes of a tokenizer is not always what it was read from: settings get lost, such as `legacy: true`, without which other
tokens come of the same text. So the files are kept as they were read, and written again while the tokenizer is what they made.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from logging import LogRecord, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune_nb.errors import ModelError
from fulltune_nb.html import printable
from fulltune_nb.model_json import checked_value, each, read_json, switch
from fulltune_nb.settings import Check, Refused, choice, number, text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SENTENCEPIECE, TEKKEN = "tokenizer.model", "tekken.json"
"""The vocabulary as SentencePiece and mistral-common keep it; llama.cpp's converter reads these too."""
VOCABULARIES = (TOKENIZER, SENTENCEPIECE, "vocab.json", "vocab.txt", TEKKEN)
_SPECIAL = "special_tokens_map.json"
FILES = (*VOCABULARIES, "merges.txt", "added_tokens.json", _SPECIAL, CONFIG, TEMPLATE)

_LOCAL_KEYS = ("is_local", "local_files_only", "mistral_format", "name_or_path", "tokenizer_file", "vocab_file")
_GENERAL = (None, "TokenizersBackend", "PreTrainedTokenizerFast")  # classes that do what tokenizer.json says
_PROBE = "def f(x, y=[1, 2]):\n    return {'a': x != y}  # naïve café 東京 русский\n\tif a->b == 0x1F && !c:   print(\"Hello, world!\")"


# ---- reading


@dataclass
class TokenizerFiles:
    """The files that a tokenizer was read from. A tokenizer of `load_tokenizer` has them as `source_files`."""

    files: dict[str, bytes]
    """By name."""
    model_config: bytes | None
    """`config.json`: transformers chooses the tokenizer's class by it."""
    read_otherwise: bool = field(default=False, init=False)
    """Whether transformers splits texts by a class of its own for the family, where the settings name none and `tokenizer.json` says
    otherwise; known after `as_written`."""
    _as_written: _Written | None = field(default=None, init=False, repr=False)

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Those of a model folder."""
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        config = folder / "config.json"
        return cls(files, config.read_bytes() if config.is_file() else None)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The `tokenizer_config.json`; empty where there is none."""
        return json.loads(self.files.get(CONFIG, b"{}"))

    def as_written(self, place: Path) -> _Written:
        """What transformers writes of the tokenizer that it makes of the files; `place` is a folder for what is written meanwhile."""
        from tokenizers import Tokenizer

        if self._as_written is not None:
            return self._as_written
        with tempfile.TemporaryDirectory(dir=place) as temporary, _without_warnings():  # they were given when it was loaded
            for name, content in self.files.items():
                (Path(temporary) / name).write_bytes(content)
            if self.model_config is not None:
                (Path(temporary) / "config.json").write_bytes(self.model_config)
            fresh = _from_folder(Path(temporary))
        if TOKENIZER in self.files and self.config.get("tokenizer_class") in _GENERAL:
            said = Tokenizer.from_str(self.files[TOKENIZER].decode("utf-8")).encode(_PROBE, add_special_tokens=False)
            self.read_otherwise = said.ids != list(fresh.encode(_PROBE, add_special_tokens=False))
        with _without_warnings():
            written = _Written.of(fresh, place)
        written.files.pop(TOKENIZER, None)  # some have 30 MB; its checksum is enough
        self._as_written = written
        return written


@dataclass
class _Written:
    """What transformers writes of a tokenizer."""

    files: dict[str, bytes]
    checksums: dict[str, str]
    """SHA-256 of each of the files, but for settings and templates."""
    config: dict[str, Any]
    """`tokenizer_config.json`, without the template."""
    template: str | dict[str, str] | None
    """One chat template, or several by name."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, place: Path) -> _Written:
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            backend.no_padding()  # what the last call asked for is no part of the tokenizer
            backend.no_truncation()
        with tempfile.TemporaryDirectory(dir=place) as temporary:
            tokenizer.save_pretrained(temporary)
            files = {path.name: path.read_bytes() for path in Path(temporary).iterdir() if path.is_file()}
        config = json.loads(files.pop(CONFIG, b"{}"))
        config = {key: value for key, value in config.items() if key not in (*_LOCAL_KEYS, "chat_template")}
        files.pop(TEMPLATE, None)
        return cls(files, {name: sha256(content).hexdigest() for name, content in files.items()}, config, tokenizer.chat_template)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, without running any code of the folder's.

    Raises:
        ModelError: there is none, or it needs code from the checkpoint, or a package that is not installed.
    """
    if not any((folder / name).exists() for name in VOCABULARIES):  # transformers would make some an empty tokenizer
        raise ModelError(f"{folder}: there is no tokenizer. The folder needs one of {', '.join(VOCABULARIES)}.")
    if (folder / CONFIG).exists():
        for key, value in read_json(folder / CONFIG).items():
            checked_value(_KINDS, key, value, str(folder / CONFIG))
    try:
        with _printable_logs():
            tokenizer = _from_folder(folder)
            tokenizer.decode(tokenizer.encode("a"))  # settings of a wrong kind may be found when they are used
    except Exception as error:  # transformers raises many kinds here; all mean the same to the reader
        for name, packages in _NEEDED.items():
            missing = [package for package, module in packages.items() if not _installed(module)]
            if (folder / name).exists() and not (folder / TOKENIZER).exists() and missing:
                found = f"{folder}: its tokenizer is a {name} and no {TOKENIZER}."
                raise ModelError(f"{found} To read it: pip install {' '.join(missing)}") from error
        raise ModelError(f"{folder}: the tokenizer could not be loaded: {str(error)[:300]}") from error
    tokenizer.source_files = TokenizerFiles.read(folder)
    if SENTENCEPIECE in tokenizer.source_files.files and TOKENIZER not in tokenizer.source_files.files:
        _compare_with_sentencepiece(tokenizer, folder)
    return tokenizer


def _special_token(value: Any) -> str | Mapping[str, Any]:
    """A token's text, or an object with it."""
    content = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(content, str):
        raise Refused("a text, or an object with a text as its content")
    return value


def _template(value: Any) -> str | list[Any] | Mapping[str, Any]:
    """A chat template, or several with a name each."""
    several = [{"name": name, "template": one} for name, one in value.items()] if isinstance(value, Mapping) else value
    one_each = several if isinstance(several, list) else [{"name": "", "template": value}]
    if not all(isinstance(one, Mapping) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str) for one in one_each):
        raise Refused("a text, or a list of objects with a name and a template")
    return value


_KINDS: dict[str, Check] = {
    "model_max_length": number(above=0),
    **dict.fromkeys(("padding_side", "truncation_side"), choice("left", "right")),
    **dict.fromkeys(("clean_up_tokenization_spaces", "split_special_tokens", "add_bos_token", "add_eos_token", "legacy"), switch),
    **dict.fromkeys((f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")), _special_token),
    "tokenizer_class": text,
    "model_input_names": each(text, "names"),
    "chat_template": _template,
}
"""Keys of `tokenizer_config.json`."""
_NEEDED = {  # vocabulary -> package: module, which transformers reads it with
    SENTENCEPIECE: {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"},
    TEKKEN: {"mistral-common": "mistral_common"},
}


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    """Where mistral-common is installed, transformers would make a tekken.json a tokenizer of its, which takes no chat template."""
    tekken = (folder / TEKKEN).exists()
    options = {"mistral_format": False} if tekken else {}
    tokenizer = from_transformers("AutoTokenizer").from_pretrained(str(folder), trust_remote_code=False, local_files_only=True, **options)
    for name, token in (("bos_token", "<s>"), ("eos_token", "</s>")):  # which transformers takes from no tekken.json
        if tekken and getattr(tokenizer, name) is None and token in tokenizer.get_vocab():
            setattr(tokenizer, name, token)
    return tokenizer


def _compare_with_sentencepiece(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Some classes of transformers 5 make other merges of a `tokenizer.model` than SentencePiece, with which the model was trained."""
    try:
        from sentencepiece import SentencePieceProcessor

        theirs = SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE)).encode(_PROBE)
    except Exception:  # not installed, or a file that only transformers can read: there is nothing to compare with
        return
    ours = tokenizer.encode(_PROBE, add_special_tokens=False)
    if ours != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
        a, b = (tokenizer.convert_ids_to_tokens(ids[at : at + 4]) for ids in (ours, theirs))
        warnings.warn(
            printable(
                f"{folder}: transformers does not split texts as SentencePiece does with this {SENTENCEPIECE}: {a} instead of {b}, on which"
                f" the model was trained. Get the model's {TOKENIZER}, which is read in its place; many repositories have both."
            ),
            stacklevel=3,
        )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package it would be in
        return False


# ---- writing


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike, ends: Sequence[int] = ()) -> None:
    """Writes a tokenizer's files so that transformers 4 (and what is built on it) reads them as transformers 5 does.

    The files that it was read from are written as they were, byte for byte; where something has changed, only what has. A chat template
    stands in `chat_template.jinja` and in `tokenizer_config.json`; several, as older readers know them, in the latter alone.

    Args:
        tokenizer: stays as it is.
        folder: where the files will stand.
        ends: token ids that a model was trained to end its turns with. The files name the first as `eos_token` where the tokenizer's own
            EOS is none of them and means nothing else: no template writes it, and `encode` puts it behind no text.

    Raises:
        OSError, ModelError: something cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        files = _files_of(tokenizer, folder)
    except OSError:
        raise
    except Exception as error:  # a full disk is a bare Exception of tokenizers
        raise ModelError(f"the tokenizer could not be written into {folder}: {error}. Check free space and permissions.") from error
    if ends and tokenizer.eos_token_id not in ends and not _writes_eos(tokenizer):
        eos = tokenizer.convert_ids_to_tokens(ends[0])
        files |= {name: _with_eos(files[name], eos) for name in (CONFIG, _SPECIAL) if name in files}
    for name, content in files.items():
        (folder / name).write_bytes(content)


def bytes_to_save(tokenizer: PreTrainedTokenizerBase) -> int:
    """Room that `save_tokenizer` needs on the disk, in bytes: its files, and as much meanwhile. 0 where it was read from none."""
    source = getattr(tokenizer, "source_files", None)
    return 2 * sum(map(len, source.files.values())) if source else 0


def _writes_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether texts or conversations would become other tokens with another EOS."""
    template = tokenizer.chat_template or ""
    templates = template.values() if isinstance(template, dict) else [template]
    return any("eos_token" in text for text in templates) or tokenizer.encode("a")[-1:] == [tokenizer.eos_token_id]


def _with_eos(content: bytes, eos: str) -> bytes:
    """A file of settings with another `eos_token`; the rest byte for byte where it had one."""
    text = content.decode("utf-8")
    wanted = {**json.loads(text), "eos_token": eos}
    for found in re.finditer(r'"eos_token"\s*:\s*', text):
        end = json.JSONDecoder().raw_decode(text, found.end())[1]
        changed = text[: found.end()] + json.dumps(eos, ensure_ascii=False) + text[end:]
        if json.loads(changed) == wanted:  # and not one within another setting
            return changed.encode("utf-8")
    return (json.dumps(wanted, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _files_of(tokenizer: PreTrainedTokenizerBase, place: Path) -> dict[str, bytes]:
    """By name; `place` is a folder for what is written meanwhile, so that no other disk can be full."""
    now, source = _Written.of(tokenizer, place), _source_of(tokenizer)
    fresh = source and source.as_written(place)
    if fresh and _same_tokens(now, fresh):
        # Where readers differ over a vocabulary, the tokenizer.json that is written says how it was read here.
        files = {name: content for name, content in now.files.items() if name == TOKENIZER} | source.files
        files |= {TOKENIZER: now.files[TOKENIZER]} if source.read_otherwise else {}
        config = source.config or now.config
    else:
        files = now.files | {name: content for name, content in (source.files if source else {}).items() if name == SENTENCEPIECE}
        config = _changed(source.config, fresh.config, now.config, tokenizer) if hasattr(tokenizer, "source_files") else now.config
    return _with_template(files, _for_both_versions(config), now.template)


def _source_of(tokenizer: PreTrainedTokenizerBase) -> TokenizerFiles | None:
    """The files that a tokenizer was read from: those it has with it, or those in the folder it names."""
    if (found := getattr(tokenizer, "source_files", None)) is not None:
        return found
    folder = Path(str(tokenizer.name_or_path or ""))
    if not tokenizer.name_or_path or not any((folder / name).is_file() for name in VOCABULARIES):
        return None
    return TokenizerFiles.read(folder)


def _same_tokens(one: _Written, other: _Written) -> bool:
    """Whether two tokenizers differ in nothing but their templates."""
    return one.checksums == other.checksums and one.config == other.config


def _changed(source: dict[str, Any], fresh: dict[str, Any], now: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The source's settings with what was changed since: the difference between what is written of the source's and of the tokenizer."""
    changed = {key: value for key, value in now.items() if key not in fresh or fresh[key] != value}
    config = {key: value for key, value in {**now, **source, **changed}.items() if key in now or key not in fresh}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {str(token): entry.__getstate__() for token, entry in tokenizer.added_tokens_decoder.items()}
    return config


def _with_template(files: dict[str, bytes], config: dict[str, Any], template: str | dict[str, str] | None) -> dict[str, bytes]:
    """The files with their settings, and the template where readers look for it. What says so already stays as it is."""
    config.pop("chat_template", None)
    file = files.pop(TEMPLATE, b"")
    if isinstance(template, dict):
        config["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    elif template is not None:
        config["chat_template"] = template
        files[TEMPLATE] = file if file.decode("utf-8", "replace") == template else template.encode("utf-8")
    if CONFIG not in files or json.loads(files[CONFIG]) != config:
        files[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    return files


def _for_both_versions(config: dict[str, Any]) -> dict[str, Any]:
    """A `tokenizer_config.json` of transformers 5 in words that 4 knows too, without paths of this machine."""
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])  # 4 would give generate token_type_ids too
    if isinstance(config.get("extra_special_tokens"), list) and "additional_special_tokens" not in config:
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def from_transformers(name: str) -> Any:
    """What `transformers` has under a name, imported without its advice to install PyTorch, which nothing here needs."""
    switch = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        import transformers

        return getattr(transformers, name)
    finally:
        os.environ.pop(switch) if before is None else os.environ.update({switch: before})


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Within it transformers logs errors only."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _printable_logs() -> Iterator[None]:
    """Within it what transformers logs, where it quotes files, is safe on a terminal."""

    def spell(record: LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        return True

    handlers = list(getLogger("transformers").handlers)
    for handler in handlers:
        handler.addFilter(spell)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(spell)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens: those that `decode(..., skip_special_tokens=True)` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {token for token, entry in added.items() if getattr(entry, "special", False)}


def special_ids_named(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Ids of the special tokens whose names are among texts."""
    return [token for token in special_ids(tokenizer) if tokenizer.convert_ids_to_tokens(token) in texts] if texts else []


def _byte_alphabet() -> dict[str, int]:
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_ALPHABET = _byte_alphabet()
"""Character -> byte in byte-level BPE vocabularies (GPT-2): printable bytes stand for themselves, the others are 256, 257, ..."""
