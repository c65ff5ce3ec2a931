"""Training and generation on this machine's GPU, beside mlx-lm where it is installed: a table in Markdown.

Models are random, of real shapes, in bfloat16 with AdamW and clipping, on rows of one length, all of whose tokens are trained; mlx-lm
takes its own compiled step, full tuning, on as many tokens. A model that would not fit is named and left out. MFU is the share of what a
large product of bfloat16 reaches on the same device, or of --tflops; counted are 6 operations a parameter and token, and attention's.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fulltune_nb as ft
from fulltune_nb.device import machine_limit
from fulltune_nb.errors import FulltuneError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.model_config import read_config

BASE = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096}
WORDS = 500


@dataclass(frozen=True)
class Case:
    """A model, and rows x tokens of a step."""

    name: str
    config: dict[str, Any]
    rows: int
    tokens: int
    bytes_a_parameter: int = 16  # weights, gradients, moments, and what is left for activations

    @property
    def family(self) -> dict[str, Any]:
        return {**BASE, **self.config}


def shape(layers: int, hidden: int, inner: int, heads: int, groups: int, vocab: int, tied: bool, **more: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocab}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": groups, "tie_word_embeddings": tied, **more}


EXPERTS = {"model_type": "mixtral", "num_experts_per_tok": 2, "sliding_window": None}
CASES = [
    Case("135M", shape(30, 576, 1536, 9, 3, 49152, True), 16, 1024),
    Case("1.2B", shape(16, 2048, 8192, 32, 8, 128256, True), 8, 1024),
    Case("7B", shape(32, 4096, 14336, 32, 8, 32000, False), 4, 1024),
    Case("8 experts, 0.8B", shape(8, 1024, 3584, 16, 8, 32000, False, num_local_experts=8, **EXPERTS), 8, 1024),
]
DRY = [
    Case("tiny", shape(2, 64, 128, 4, 2, 512, True), 2, 64),
    Case("tiny experts", shape(2, 64, 128, 4, 2, 512, False, num_local_experts=4, **EXPERTS), 2, 64),
]
WAYS: dict[str, dict[str, Any]] = {
    "fulltune_nb": {},
    "fulltune_nb, grad_checkpoint": {"grad_checkpoint": True},
    "fulltune_nb, layerwise": {"backward": "layerwise"},
}


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    """A token a word: "w0" to "w499", so that rows have the length that is wanted."""
    words = {name: place for place, name in enumerate(["<unk>", "</s>", "<pad>", *(f"w{i}" for i in range(WORDS))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def ids_of(case: Case) -> np.ndarray:
    """(rows, tokens + 1): words, drawn once."""
    return np.random.default_rng(0).integers(3, 3 + WORDS, (case.rows, case.tokens + 1)).astype(np.int32)


def model_of(case: Case) -> ft.LanguageModel:
    """Random weights in bfloat16, made one after the other: no copy of all in float32 stands beside."""
    model = Decoder(read_config(case.family))
    model.set_dtype(mx.bfloat16)
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)
    return ft.LanguageModel(model, tokenizer_of_words())


def num_parameters(case: Case) -> int:
    """Without making any of them."""
    return sum(array.size for _, array in tree_flatten(Decoder(read_config(case.family)).parameters()))


def operations(case: Case) -> float:
    """Of a step, forward and backward."""
    model = Decoder(read_config(case.family))
    c, arrays = model.config, dict(tree_flatten(model.parameters()))
    multiplied = sum(array.size for array in arrays.values())
    if not c.tie_word_embeddings:
        multiplied -= c.vocab_size * c.hidden_size  # looked up
    if c.num_experts:
        experts = sum(array.size for name, array in arrays.items() if ".experts" in name)
        multiplied -= experts * (1 - c.num_experts_per_token / c.num_experts)
    attention = 12 * c.num_layers * c.num_heads * c.head_dim * case.tokens / 2  # causal: half
    return case.rows * case.tokens * (6 * multiplied + attention)


def timed(call: Callable[[], object], warm: int, runs: int) -> tuple[float, int]:
    """(seconds a call, peak bytes)."""
    for _ in range(warm):
        call()
    mx.synchronize()
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    began = time.perf_counter()
    for _ in range(runs):
        call()
    mx.synchronize()
    return (time.perf_counter() - began) / runs, mx.get_peak_memory()


def product_speed(size: int) -> float:
    """Operations a second of a product in bfloat16."""
    a = mx.random.normal((size, size)).astype(mx.bfloat16)
    mx.eval(a)
    return 2 * size**3 / timed(lambda: mx.eval(a @ a), 2, 5)[0]


def our_step(case: Case, settings: dict[str, Any]) -> Callable[[], object]:
    """A step of a run such as `TrainConfig` makes it."""
    lm = model_of(case)
    names = {i: f"w{i - 3}" for i in range(3, 3 + WORDS)}
    texts = [{"text": " ".join(names[i] for i in row)} for row in ids_of(case)[:, : case.tokens].tolist()]  # and the end after it
    config = ft.TrainConfig(batch_size=case.rows, iters=1000, learning_rate=1e-5, max_grad_norm=1.0, weights="bfloat16", **settings)
    return ft.Trainer(lm, ft.load_data({"train": texts}, lm.tokenizer, max_seq_length=case.tokens + 1), config).step


def their_model(case: Case) -> nn.Module:
    """mlx-lm's."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(case.family)
    model = model_class(arguments.from_dict(case.family))
    model.set_dtype(mx.bfloat16)
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)
    return model


def their_step(case: Case) -> Callable[[], object]:
    """A step as mlx-lm's trainer makes it."""
    from mlx.optimizers import AdamW
    from mlx_lm.tuner.trainer import default_loss

    model, optimizer = their_model(case), AdamW(1e-5)
    optimizer.init(model.trainable_parameters())
    batch, state = (mx.array(ids_of(case)), mx.array([[0, case.tokens]] * case.rows)), [model.state, optimizer.state]

    def step(*batch: mx.array) -> mx.array:
        (loss, _), gradients = nn.value_and_grad(model, default_loss)(model, *batch)
        optimizer.update(model, gradients)
        return loss

    compiled = mx.compile(step, inputs=state, outputs=state)
    return lambda: mx.eval(compiled(*batch), state)


def our_tokens(case: Case) -> Iterator[object]:
    """Tokens of an answer, one by one."""
    lm, prompt = model_of(case), ids_of(case)[0][: case.tokens // 2].tolist()
    return iter(lm.stream(prompt, max_tokens=case.tokens // 4))


def their_tokens(case: Case) -> Iterator[object]:
    """mlx-lm's."""
    from mlx_lm.generate import generate_step

    prompt = mx.array(ids_of(case)[0][: case.tokens // 2])
    return generate_step(prompt, their_model(case), max_tokens=case.tokens // 4)


def row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def attempt(measure: Callable[[], tuple[object, ...]], cells: int) -> tuple[object, ...]:
    """What was measured; where that fails, why, so that the rest of the table is there."""
    try:
        return measure()
    except ImportError as error:
        return f"not installed: {error.name}", *[""] * (cells - 1)
    except (FulltuneError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}", *[""] * (cells - 1)
    finally:
        gc.collect()
        mx.clear_cache()


def training_rows(case: Case, peak: float) -> Iterator[str]:
    """A row a way."""

    def measured(make: Callable[[], Callable[[], object]]) -> tuple[object, ...]:
        step = make()
        seconds, memory = timed(step, 2, 4)
        done = operations(case) / seconds
        return round(case.rows * case.tokens / seconds), f"{done / peak:.0%}", f"{memory / 1e9:.2f}"

    for way, settings in WAYS.items():
        yield row(case.name, f"{case.rows} x {case.tokens}", way, *attempt(lambda s=settings: measured(lambda: our_step(case, s)), 3))
    yield row(case.name, f"{case.rows} x {case.tokens}", "mlx-lm", *attempt(lambda: measured(lambda: their_step(case)), 3))


def generation_rows(case: Case) -> Iterator[str]:
    """A row each: milliseconds to the first token, tokens a second afterwards."""

    def measured(make: Callable[[Case], Iterator[object]]) -> tuple[object, ...]:
        for _ in range(2):  # the first time kernels are compiled
            tokens, began = make(case), time.perf_counter()
            next(tokens)
            first = time.perf_counter()
            count = sum(1 for _ in tokens)
        return f"{(first - began) * 1e3:.0f}", round(count / (time.perf_counter() - first))

    for way, make in (("fulltune_nb", our_tokens), ("mlx-lm", their_tokens)):
        yield row(case.name, way, *attempt(lambda make=make: measured(make), 2))


def table(dry: bool = False, tflops: float | None = None) -> Iterator[str]:
    """The lines of the report, each as soon as it is measured."""
    peak, limit = tflops * 1e12 if tflops else product_speed(256 if dry else 8192), machine_limit()
    yield f"{ft.system_info()}\n\nA product in bfloat16: {peak / 1e12:.1f} TFLOPS{' (given)' if tflops else ''}\n"
    sized = [(case, num_parameters(case) * case.bytes_a_parameter) for case in (DRY if dry else CASES)]
    fitting = [case for case, needed in sized if needed <= limit]
    yield from (row("model", "rows x tokens", "way", "tokens/s", "MFU", "peak GB"), row(*["---"] * 6))
    for case, needed in sized:
        if case in fitting:
            yield from training_rows(case, peak)
        else:
            yield row(case.name, "", f"left out: needs some {needed / 1e9:.0f} GB, the device allows {limit / 1e9:.0f}", "", "", "")
    yield from ("", row("model", "way", "first token, ms", "tokens/s"), row(*["---"] * 4))
    for case in fitting:
        yield from generation_rows(case)
