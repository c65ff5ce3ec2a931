"""The layerwise engine against the whole graph, and what becomes of a step that fails half-way."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.cpu import on_cpu
from fulltune_nb.errors import TornStepError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.model_config import read_config
from fulltune_nb.training import layerwise, vocabulary
from fulltune_nb.training import loss as loss_module
from fulltune_nb.training.engine import WholeGraph
from fulltune_nb.training.layerwise import BlockPasses, Layerwise, expert_gradients
from nbs_tests.memory_held import memory_held
from nbs_tests.models.model_cases import CASES
from nbs_tests.training.conftest import TINY_LLAMA, random_batch

SMALL_RANGES = {"RANGE_ELEMENTS": 32 * 100, "KEPT_ELEMENTS": 0}
FAMILIES = {
    "llama": {}, "mistral": {"sliding_window": 6}, "qwen2": {}, "gemma": {"head_dim": 8}, "olmo": {},
    "phi": {"partial_rotary_factor": 0.5}, "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.fixture(params=["one range", "many ranges"])
def ranges(request, monkeypatch):
    """The vocabulary as one piece, and in several with nothing kept between the passes."""
    if request.param == "many ranges":
        for name, value in SMALL_RANGES.items():
            monkeypatch.setattr(vocabulary, name, value)
        monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 100 * 33)


def weights(lm) -> dict[str, np.ndarray]:
    return {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(lm.model.parameters())}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))


def train(lm, data, config) -> list[float]:
    return [report.loss for report in ft.Trainer(lm, data, config).steps()]


@pytest.mark.parametrize("case", CASES)
def test_the_pieces_are_the_gradients_of_the_whole_graph(case, ranges):
    config = read_config(CASES[case])
    mx.random.seed(3)
    model = Decoder(config)
    mx.eval(model.parameters())
    batches = [random_batch(config.vocab_size, 3, 20, 1), random_batch(config.vocab_size, 2, 13, 2)]
    expected = WholeGraph(model).gradients(1, batches)
    (piece,) = expected.pieces()
    whole = {name: np.array(array) for name, array in piece.gradients.items()}
    gradients, found = Layerwise(model).gradients(1, batches), {}
    assert gradients.norm() == pytest.approx(expected.norm(), rel=1e-5)  # a pass of its own, before that of the pieces
    for piece in gradients.pieces():
        for name, gradient in piece.gradients.items():
            found.setdefault(name, np.full(whole[name].shape, np.nan, np.float32))[piece.rows or slice(None)] = np.array(gradient)
    assert gradients.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.keys() == whole.keys()
    assert max(relative(found[name], whole[name]) for name in whole) < 1e-5


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_are_those_of_the_whole_graph(family, tied, make_lm, make_data):
    """Losses to 1e-5 and weights to 1e-5 relative, in float32."""
    results = {}
    for backward in ("whole", "layerwise"):
        lm = make_lm(model_type=family, tie_word_embeddings=tied, **FAMILIES[family])
        config = ft.TrainConfig(iters=20, learning_rate=1e-4, backward=backward, val_batches=0)
        results[backward] = train(lm, make_data(config=config), config), weights(lm)
    (losses, after), (expected, reference) = results["layerwise"], results["whole"]
    assert losses == pytest.approx(expected, rel=1e-5)
    # A bias of the keys moves all scores of a query alike: its gradient is zero but for rounding, which Adam makes steps of.
    names = [name for name in reference if not name.endswith("k_proj.bias")]
    assert max(relative(after[name], reference[name]) for name in names) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"grad_accumulation_steps": 3}, {"max_grad_norm": 0.1}, {"grad_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"optimizer": "adafactor"}, {"optimizer": "muon"}, {"optimizer": "sgd", "optimizer_config": {"momentum": 0.9}},
        {"freeze": ["model.embed_tokens.*"]}, {"train_only": ["model.layers.1.*"]}, {"train_only": ["lm_head.*"]},
        {"train_only": ["model.embed_tokens.*", "model.layers.0.*.weight"]},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_means_the_same(settings, make_lm, make_data, ranges):
    results = []
    for backward in ("whole", "layerwise"):
        lm = make_lm()
        config = ft.TrainConfig(iters=6, learning_rate=1e-4, backward=backward, val_batches=0, **settings)
        results.append((train(lm, make_data(config=config), config), weights(lm)))
    (expected, reference), (losses, after) = results
    assert losses == pytest.approx(expected, rel=1e-5)
    assert max(relative(after[name], reference[name]) for name in reference) < 2e-5


@pytest.mark.parametrize("part", ["*", "*.experts.*", "*.experts.1.w2.*", "*.gate.*", "post_attention*", "self_attn.*"])
def test_a_lowest_trained_block_with_experts_gives_no_gradient_to_its_input(part, make_lm, make_data, monkeypatch):
    """Nothing below it is trained; whichever part of it is, the weights are those of the whole graph.

    A CPU goes through its experts one by one.
    """
    works = []

    def remember(block, name, work, to_input):
        works.append((name, to_input, work))
        yield from expert_gradients(block, name, work, to_input)

    monkeypatch.setattr(layerwise, "expert_gradients", remember)
    results = []
    for backward in ("whole", "layerwise"):
        lm = make_lm(model_type="mixtral", tie_word_embeddings=False, **FAMILIES["mixtral"])
        config = ft.TrainConfig(
            iters=3, learning_rate=1e-4, backward=backward, val_batches=0, train_only=[f"model.layers.1.{part}", "lm_head.*"]
        )
        results.append((train(lm, make_data(config=config), config), weights(lm)))
    (expected, reference), (losses, after) = results
    assert losses == pytest.approx(expected, rel=1e-5)
    assert max(relative(after[name], reference[name]) for name in reference) < 2e-5
    assert {(name, to_input) for name, to_input, _ in works} == ({("layers.1", False)} if on_cpu() else set())
    assert all(one.cotangent is None for _, _, work in works for one in work)


def test_its_peak_is_lower_than_the_whole_graphs(make_data, tokenizer):
    peaks = {}
    for backward in ("whole", "layerwise"):
        lm = ft.LanguageModel.from_config({**TINY_LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}, tokenizer)
        config = ft.TrainConfig(iters=3, backward=backward, optimizer="adafactor", val_batches=0)
        trainer = ft.Trainer(lm, make_data(config=config), config)
        before = memory_held()
        peaks[backward] = max(report.peak_memory for report in trainer.steps()) - before
    assert peaks["layerwise"] < 0.6 * peaks["whole"]


def test_bfloat16_weights_train_layer_by_layer_as_over_the_whole_graph(make_lm, make_data):
    losses = []
    for backward in ("whole", "layerwise"):
        lm = make_lm()
        lm.model.set_dtype(mx.bfloat16)
        config = ft.TrainConfig(iters=8, learning_rate=1e-3, backward=backward, val_batches=0)
        losses.append(train(lm, make_data(config=config), config))
        assert lm.dtype == "bfloat16"
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)  # a bit in another place of a gradient rounds some weights the other way


def test_a_gradient_that_is_nan_in_a_lower_block_tears_the_step(make_trainer, monkeypatch):
    trainer, backward = make_trainer(backward="layerwise"), BlockPasses.backward

    def with_nan(passes, *inputs):
        cotangent, gradients = backward(passes, *inputs)
        if passes.block is trainer.lm.model.layers[0]:
            gradients = {name: array * mx.nan for name, array in gradients.items()}
        return cotangent, gradients

    monkeypatch.setattr(BlockPasses, "backward", with_nan)
    with pytest.raises(TornStepError, match=r"layers\.0.* is NaN or inf") as raised:
        trainer.step()
    assert isinstance(raised.value.__cause__, ft.errors.NonFiniteError)
    assert trainer.lm.torn and trainer.step_count == 0


def test_a_run_that_does_not_fit_is_refused_unless_forced(make_lm, make_data, monkeypatch):
    monkeypatch.setattr("fulltune_nb.training.memory.machine_limit", lambda: 1000)
    with pytest.raises(ft.errors.MemoryLimitError, match="force=True"):
        ft.Trainer(make_lm(), make_data())
    assert ft.Trainer(make_lm(), make_data(), force=True).step().step == 1


def test_engines_name_themselves(make_trainer):
    assert repr(make_trainer().engine) == "WholeGraph()" and repr(make_trainer(backward="layerwise").engine) == "Layerwise()"


@pytest.mark.parametrize("many", [False, True])
def test_between_ranks_a_heads_bias_travels_without_its_weight(many, monkeypatch):
    if many:
        monkeypatch.setattr(vocabulary, "RANGE_ELEMENTS", 32 * 100)
    model = Decoder(read_config({**TINY_LLAMA, "model_type": "phi", "partial_rotary_factor": 0.5}))
    batches = [random_batch(512, 3, 20, 1), random_batch(512, 2, 13, 2)]
    passed: list[dict[str, mx.array]] = []

    def keep(sums):
        passed.append(dict(sums))
        return sums

    ranks = SimpleNamespace(
        own=enumerate, received=lambda number, sums: sums, passed_on=lambda number, count, sums: keep(sums), total=lambda count, sums: sums,
        added=lambda number, count, sums, own: own if not sums else {name: sums[name] + own[name] for name in own},
        merged=lambda own: list(own.values()),
    )  # fmt: skip
    gradients = Layerwise(model, ranks=ranks).gradients(1, batches)
    gradients.check_finite()
    handed_out = {name for piece in gradients.pieces() for name in piece.gradients}
    assert {"lm_head.weight", "lm_head.bias"} <= handed_out
    assert all(len(sums) == 1 for sums in passed)
    elements = sum(array.size for sums in passed for array in sums.values())
    assert elements == len(batches) * (512 * 32 + 512)  # each once a micro-batch
