"""LanguageModel: a decoder with its tokenizer and configuration; load, save, generate, chat."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from fulltune_nb.chat_template import Prompt, answer_end, chat_ids, ensure_chat_template, prompt_ids
from fulltune_nb.errors import (
    IN_LOADING,
    IN_TRAINING,
    ConfigError,
    DeviceError,
    GenerationError,
    TornStepError,
    device_errors,
    listed,
    readable,
    tells_device_errors,
)
from fulltune_nb.files import absolute, is_empty
from fulltune_nb.html import facts, human_bytes, printable
from fulltune_nb.model_json import read_json
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.dequantize import quantization_of
from fulltune_nb.models.export import export
from fulltune_nb.models.folder import check_not_source, load_decoder, load_model_file, resolve_model_path, save_folder
from fulltune_nb.models.generation import AnswerStream, Sampling, answer_many, new_answer, warn_of_length
from fulltune_nb.models.model_config import ModelConfig, read_config
from fulltune_nb.models.parameters import parameters_of
from fulltune_nb.models.token_rows import set_token_rows
from fulltune_nb.models.unread_keys import check_unread
from fulltune_nb.settings import show, whole_number
from fulltune_nb.tokenizer import load_tokenizer, special_ids_named

if TYPE_CHECKING:
        from transformers import PreTrainedTokenizerBase

class LanguageModel:
    """A model, its tokenizer and its configuration.

    Attributes:
        model: the decoder, an `mlx.nn.Module`: ids (B, T) -> logits (B, T, V).
        tokenizer: the `transformers` tokenizer.
        source: where it was loaded from: folder or hub id; None for random weights.
        generation_config: `generation_config.json` of the source, with the ends that were trained; None where there is neither.
        torn: why the weights cannot be used, when a training step was broken off half-way; else None.
        update_under_way: a step's update was sent to the GPU and is not known to be through.
        trained_as: the tensors that its latest trainer trains, and their dtype; None before.
        trained_ends: token ids that end what the last trainer's rows train, first the one that ends a conversation's last answer; not
            stored. `save` makes it the tokenizer's EOS where that was not trained.
        dequantized: the quantization that its weights, or those it was trained from, were turned back from, in words; else None.
        card: how the weights came about, as `.files()`, texts by file name that `save` writes too; None where nothing is known.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        source: str | None = None,
        generation_config: dict[str, Any] | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.generation_config = generation_config
        self.torn: str | None = None
        self.update_under_way = False
        self.trained_as: tuple[frozenset[str], Any] | None = None
        self.trained_ends: tuple[int, ...] = ()
        self.dequantized: str | None = None
        self.card: Any = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> LanguageModel:
        """A model with random weights (MLX's default initialisation), float32.

        Args:
            config: what a `config.json` holds.
            tokenizer: its tokenizer.
            seed: of the weights.
        """
        mx.random.seed(seed)
        read = read_config(config)
        check_unread(read, "config")
        model = Decoder(read)
        mx.eval(model.parameters())
        return cls(model, tokenizer)

    @property
    def config(self) -> ModelConfig:
        """Sizes and mechanisms of the model."""
        return self.model.config

    @property
    def num_parameters(self) -> int:
        """How many weights the model has; tied ones count once."""
        return sum(array.size for array in parameters_of(self.model).values())

    @property
    def dtype(self) -> str:
        """Storage dtype of the weights, such as `"float32"`."""
        return str(self.model.embed_tokens.weight.dtype).removeprefix("mlx.core.")

    @property
    def context_length(self) -> int | None:
        """Tokens of the longest text that the model was made for, as its config says, else its tokenizer; None: neither does."""
        of_tokenizer = self.tokenizer.model_max_length  # a number beyond all texts where it was not told
        return self.config.positions or (int(of_tokenizer) if 0 < of_tokenizer < 10**9 else None)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer: from `generation_config`, else the tokenizer's EOS. A trainer adds the ends that it trains."""
        ids = (self.generation_config or {}).get("eos_token_id")
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return valid_ends(ids, int)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer, from `generation_config`: ends that are several tokens."""
        return valid_ends((self.generation_config or {}).get("stop_strings"), str)

    def add_ends(self, ids: Sequence[int], strings: Sequence[str] = ()) -> None:
        """Makes ends that are trained stops of every answer, here and, by `generation_config.json`, for whoever reads a saved model.

        Args:
            ids: token ids; they come behind those that are stops already.
            strings: texts, for ends that are several tokens. `generate` of transformers stops there when it is given the tokenizer.
        """
        ends = {"eos_token_id": (*self.stop_ids, *ids), "stop_strings": (*self.stop_strings, *strings)}
        ends = {name: list(dict.fromkeys(values)) for name, values in ends.items() if values}
        if ends:
            self.generation_config = {**(self.generation_config or {}), **ends}

    def add_tokens(self, tokens: Sequence[str], pad_to_multiple_of: int | None = None, seed: int = 0) -> dict[str, int]:
        """Makes texts such as `"<|im_start|>"` special tokens, and gives the model a row for each token of the tokenizer that has none.

        Rows beyond the tokenizer's tokens, as padded vocabularies have them, are used first; then embedding and head grow. A new row is
        the mean of those of the known tokens plus a little noise. `save` writes model and tokenizer with them. Load the data and make the
        trainer afterwards: a trainer that there is already goes no further, since its optimizer's state no longer fits.

        Args:
            tokens: those that the tokenizer knows already stay as they are; a warning names them.
            pad_to_multiple_of: the number of rows becomes a multiple of this.
            seed: of the noise.

        Returns:
            Token -> id, of all that were given.

        Raises:
            ConfigError: no list of texts, or a number that is none.
        """
        self.check_whole()
        if isinstance(tokens, str) or not all(isinstance(token, str) and token for token in tokens):
            raise ConfigError(f'add_tokens: expected a list of texts such as ["<|im_start|>"], none of them empty, got {tokens!r:.80}.')
        multiple = 1 if pad_to_multiple_of is None else whole_number("pad_to_multiple_of", pad_to_multiple_of, low=1)
        seed = whole_number("seed", seed, low=0)
        before, rows = self.tokenizer.get_vocab(), self.config.vocab_size
        if there := [token for token in dict.fromkeys(tokens) if before.get(token, rows) < rows]:
            warnings.warn(printable(f"The tokenizer knows {', '.join(map(repr, there))} already: nothing of it was changed."), stacklevel=2)
        added = [token for token in dict.fromkeys(tokens) if token not in before]
        self.tokenizer.add_tokens(added, special_tokens=True)
        now = self.tokenizer.get_vocab()
        wanted = -(-max(rows, max(now.values()) + 1) // multiple) * multiple
        if added or wanted > rows:
            set_token_rows(self.model, wanted, [now[token] for token in added], min(rows, max(before.values()) + 1), seed)
        return {token: now[token] for token in tokens}

    def generate(
        self,
        prompt: Prompt,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
    ) -> str:
        """The text that follows a prompt.

        Args:
            prompt: a text, which gets the special tokens its tokenizer adds (a BOS where the family has one), or token ids.
            max_tokens: after which the answer ends in any case.
            temperature: 0 takes the likeliest token each time, 1 draws from the model's own probabilities.
            top_p: draw among the fewest likeliest tokens that hold this much probability.
            top_k: draw among this many likeliest tokens; 0: all.
            min_p: draw among tokens with at least this share of the likeliest one's probability.
            stop: texts that end the answer and are no part of it; special tokens too, by their names.
            seed: of the drawing; the global random state is neither used nor changed. None: another one each time.

        Raises:
            GenerationError: a prompt or a setting that cannot be used.
        """
        return "".join(self.stream(prompt, max_tokens, temperature, top_p, top_k, min_p, stop, seed))

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """`generate`, as pieces of text while they come. May be left at any time.

        Raises:
            GenerationError: a prompt or a setting that cannot be used.
        """
        self.check_whole()
        sampling, ends = self._with_ends(Sampling(max_tokens, temperature, top_p, top_k, min_p, stop, seed))
        return self._stream(prompt_ids(self.tokenizer, prompt, self.config.vocab_size), sampling, ends)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The assistant's answer to a conversation, through the tokenizer's chat template (ChatML where it has none).

        It ends where the template ends an assistant's turn, too.

        Args:
            messages: dicts such as `{"role": "user", "content": "Hello"}`; the last one is usually the user's.
            max_tokens: this and the other settings are those of `generate`.
            tools: what the template may offer the model, as `transformers` takes it.

        Raises:
            GenerationError: messages the template refuses, or a setting that cannot be used.
        """
        return "".join(self.stream_chat(messages, max_tokens, temperature, top_p, top_k, min_p, stop, seed, tools))

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        tools: Sequence[Any] | None = None,
    ) -> Iterator[str]:
        """`chat`, as pieces of text while they come. May be left at any time.

        Raises:
            GenerationError: messages the template refuses, or a setting that cannot be used.
        """
        self.check_whole()
        sampling = Sampling(max_tokens, temperature, top_p, top_k, min_p, stop, seed)
        tokens = self.chat_tokens(messages, tools)  # may give the tokenizer its template, which says where answers end
        return self._stream(tokens, *self._with_ends(sampling, chat=True), continues=False)

    def generate_many(self, prompts: Sequence[Prompt], batch_size: int = 32, **settings: Any) -> list[str]:
        """`generate` for many prompts, side by side: some ten times as fast.

        Greedy answers are those of `generate`, up to rounding; with a temperature, prompt `i` draws as with `seed + i`.

        Args:
            prompts: texts or token ids.
            batch_size: how many are decoded at a time.
            settings: those of `generate`, by name.

        Raises:
            GenerationError: a prompt or a setting that cannot be used; the message says which prompt.
        """
        self.check_whole()
        if isinstance(prompts, str):
            raise GenerationError("generate_many takes a list of prompts, found one text. Use generate, or put it into a list.")
        tokens = _each(prompts, lambda prompt: prompt_ids(self.tokenizer, prompt, self.config.vocab_size), "prompts")
        return self._many(tokens, batch_size, settings, chat=False)

    def chat_many(
        self,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        batch_size: int = 32,
        tools: Sequence[Sequence[Any] | None] | None = None,
        **settings: Any,
    ) -> list[str]:
        """`chat` for many conversations, side by side; see `generate_many`. `tools`: those of each conversation.

        Raises:
            GenerationError: messages the template refuses, or a setting that cannot be used; the message says which conversation.
        """
        pairs = list(zip(conversations, tools or [None] * len(conversations), strict=True))
        tokens = _each(pairs, lambda pair: self.chat_tokens(*pair), "conversations")
        return self._many(tokens, batch_size, settings, chat=True)

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> list[int]:
        """A conversation as token ids, up to where the assistant's answer begins: what `chat` gives the model to read.

        Raises:
            GenerationError: messages the template refuses.
        """
        if note := ensure_chat_template(self.tokenizer):
            warnings.warn(printable(note), stacklevel=3)
        return chat_ids(self.tokenizer, messages, tools, self.config.vocab_size)

    def _stream(self, prompt: list[int], sampling: Sampling, ends: frozenset[int], continues: bool = True) -> AnswerStream:
        warn_of_length([prompt], self.context_length)
        answer = new_answer(self.tokenizer, prompt, sampling, ends, continues)
        return AnswerStream(self.model, answer, prompt, sampling, self.context_length)

    def _many(self, prompts: list[list[int]], batch_size: int, settings: Mapping[str, Any], chat: bool) -> list[str]:
        warn_of_length(prompts, self.context_length)
        sampling, ends = self._with_ends(Sampling(**settings), chat)
        return answer_many(self.model, self.tokenizer, prompts, sampling, ends, continues=not chat, batch_size=max(1, batch_size))

    def _with_ends(self, sampling: Sampling, chat: bool = False) -> tuple[Sampling, frozenset[int]]:
        """The sampling with every stop string of an answer, and the ids that end one."""
        ids, strings = answer_end(self.tokenizer) if chat else ((), ())
        ids = (*ids, *special_ids_named(self.tokenizer, sampling.stop))  # which are no part of an answer's text
        return replace(sampling, stop=(*sampling.stop, *self.stop_strings, *strings)), frozenset((*self.stop_ids, *ids))

    def check_whole(self) -> None:
        """Returns when the weights are those of a whole step: a GPU may still be at the last update.

        Raises:
            TornStepError: they are not.
        """
        if self.torn:
            raise TornStepError(self.torn)
        try:
            if self.update_under_way:
                with device_errors(IN_TRAINING):
                    mx.eval(self.model.parameters())
                self.update_under_way = False
        except DeviceError as error:
            self.torn = (
                f"The GPU failed in the middle of an update, by {type(error).__name__}: {error} Some weights may be new and some old, so"
                " they are neither trained on, nor used, nor saved. Go back to a snapshot or checkpoint."
            )
            raise TornStepError(self.torn) from error

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes a complete Hugging Face folder that `transformers`, `mlx-lm` and `load_model` read.

        A model that was trained gets a `README.md` that says how: base, data, settings, losses, versions. Its `tokenizer_config.json` names
        the end of turn that was trained as `eos_token`, where the tokenizer's own EOS was not trained and the template does not write it;
        the tokenizer in memory stays as it is.

        Args:
            folder: new or empty.

        Raises:
            ModelError: the folder is not empty, lies in the folder this model was loaded from, or cannot be written.
        """
        self.check_whole()
        folder = Path(folder).expanduser()
        if not folder.is_dir() or is_empty(folder):  # one with something in it is refused in any case
            check_not_source(folder, self.source, "The folder")
        save_folder(folder, self.model, self.tokenizer, **self.beside_weights())
        return folder

    def export(
        self,
        where: str | os.PathLike,
        to: str = "hf",
        quantization: str | None = None,
        private: bool = True,
        confirm: Callable[[str], bool] | None = None,
    ) -> Path | str:
        """Takes the model elsewhere; `docs/howto/use_the_result.md` has what each target needs.

        Args:
            where: a new or empty folder; for `"gguf"` a new file, for `"hub"` a repository such as `"me/my-model"`.
            to: `"hf"`: as `save`. `"mlx-4bit"` or `"mlx-8bit"`: quantized by mlx-lm. `"gguf"`: by llama.cpp's converter. `"ollama"`: GGUF
                and a Modelfile with the chat template and the ends. `"hub"`: uploaded to the Hugging Face hub.
            quantization: of GGUF, such as `"q8_0"` or `"Q4_K_M"`; None: bf16.
            private: whether a repository that is made is private. One that is there has to be what this says, or less public.
            confirm: is told what will be uploaded, and says whether to; None asks by `input`.

        Returns:
            The place; of the hub the repository's address.

        Raises:
            ConfigError: an unknown target or quantization, or a name that does not do.
            MissingDependencyError: mlx-lm or llama.cpp is not there; the message has the commands.
            ModelError: the place is taken or cannot be written, a converter failed, or the upload was refused.
        """
        if to == "hf" and quantization is None:
            return self.save(where)
        self.check_whole()
        sampling, ends = self._with_ends(Sampling(), chat=bool(self.tokenizer.chat_template))
        stops = tuple(dict.fromkeys((*self.tokenizer.convert_ids_to_tokens(sorted(ends)), *sampling.stop)))
        return export(where, to, self.save, self.tokenizer, stops, quantization, private, confirm)

    def beside_weights(self) -> dict[str, Any]:
        """What a saved folder has besides weights and tokenizer: arguments of `fill_folder`."""
        texts = self.card.files() if self.card is not None else {}
        return {"generation_config": self.generation_config, "texts": texts, "ends": self.trained_ends}

    def __repr__(self) -> str:
        before = "" if self.dequantized is None else f", dequantized: {self.dequantized!r:.80}"
        return f"LanguageModel({self.config.family}, {self.num_parameters:,} parameters, {self.dtype}, source={self.source!r}{before})"

    def _repr_html_(self) -> str:
        config = self.config
        size = sum(array.nbytes for array in parameters_of(self.model).values())
        experts = [("experts", f"{config.num_experts}, {config.num_experts_per_token} a token")] if config.num_experts else []
        window = [("sliding window", f"{config.sliding_window:,} tokens")] if config.sliding_window else []
        return facts(
            f"{config.family}, {self.num_parameters:,} parameters",
            [
                ("source", self.source or "random weights"),
                *([("part of", f"{config.part_of}; what is not text is left aside")] if config.part_of else []),
                ("weights", f"{human_bytes(size)} in {self.dtype}"),
                *([("dequantized from", self.dequantized)] if self.dequantized else []),
                ("layers × hidden", f"{config.num_layers} × {config.hidden_size}"),
                ("heads (key/value)", f"{config.num_heads} ({config.num_kv_heads}) of {config.head_dim}"),
                *experts,
                *window,
                ("vocabulary", f"{config.vocab_size:,}" + (", tied to the head" if config.tie_word_embeddings else "")),
                ("chat template", "yes" if self.tokenizer.chat_template else "none"),
            ],
        )


def valid_ends(values: Any, kind: type) -> tuple[Any, ...]:
    """One value or several of a `generation_config.json`, each once; what is of another kind is left out."""
    values = values if isinstance(values, (list, tuple)) else (values,)
    return tuple(dict.fromkeys(value for value in values if isinstance(value, kind) and not isinstance(value, bool) and value != ""))


def _with_valid_ends(generation_config: dict[str, Any], vocab_size: int, where: str) -> dict[str, Any]:
    """A `generation_config.json` without ends that are none, of which a warning tells."""
    found, left_out = dict(generation_config), []
    ids = [one for one in valid_ends(found.get("eos_token_id"), int) if 0 <= one < vocab_size]
    for key, valid in (("eos_token_id", ids), ("stop_strings", valid_ends(found.get("stop_strings"), str))):
        given = found.get(key)
        several = given if isinstance(given, list) else [] if given is None else [given]
        if bad := [one for one in several if one not in valid or isinstance(one, (bool, float))]:
            left_out.append(f"{key} has {listed(list(map(show, bad)), 3)}")
            found[key] = list(valid) or None
    if left_out:
        what = f"an id is a whole number from 0 to {vocab_size - 1:,}, a stop string a text that is not empty"
        warnings.warn(printable(f"{where}: {', '.join(left_out)}, left out here: {what}."), stacklevel=4)
    return found


def _each(items: Sequence[Any], convert: Callable[[Any], list[int]], name: str) -> list[list[int]]:
    """Every item converted; an error says which one it was."""
    converted = []
    for number, item in enumerate(items):
        try:
            converted.append(convert(item))
        except GenerationError as error:
            raise GenerationError(f"{name}[{number}]: {error}") from error
    return converted


@tells_device_errors(IN_LOADING)
def load_model(
    path: str | os.PathLike, model_file: str | os.PathLike | None = None, dtype: str | None = None, dequantize: bool = False
) -> LanguageModel:
    """Loads a model folder or a hub repository, with a model file laid on top where given.

    Args:
        path: a Hugging Face model folder, or a hub id such as `"mistralai/Mistral-7B-v0.1"`.
        model_file: `.safetensors` or `.npz` with Hugging Face tensor names; its weights replace the folder's.
        dtype: `"float32"` or `"bfloat16"`; None keeps the checkpoint's (float16 becomes float32).
        dequantize: turn the weights of a folder that MLX quantized (2 to 8 bits), or of one in MXFP4, into bfloat16. What quantization took
            away does not come back. The model is saved unquantized.

    Raises:
        ModelError: not found, not supported, or not readable; the message says what to do.
        WeightsError: tensors missing, unexpected or mis-shaped.
    """
    folder = resolve_model_path(os.fspath(path))
    with readable(folder):
        model = load_decoder(folder, dtype, dequantize)
        if model_file is not None:
            load_model_file(model, Path(model_file).expanduser())
        generation_path = folder / "generation_config.json"
        generation_config = None
        if generation_path.exists():
            generation_config = _with_valid_ends(read_json(generation_path), model.config.vocab_size, str(generation_path))
        source = str(absolute(path)) if Path(path).expanduser().exists() else os.fspath(path)
        lm = LanguageModel(model, load_tokenizer(folder), source, generation_config)
        lm.dequantized = quantization_of(read_json(folder / "config.json"))
    return lm
