"""The layerwise engine against the whole graph, and what becomes of a step that fails half-way."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.errors import TornStepError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import read_config
from fulltune_nb.training import layerwise, vocabulary
from fulltune_nb.training import loss as loss_module
from fulltune_nb.training.backward import step_gradients
from fulltune_nb.training.layerwise import LayerwiseBackward
from nbs_tests.models.model_cases import CASES
from nbs_tests.training.conftest import TINY_LLAMA

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
    loss, whole = step_gradients(model, batches)
    whole = {name: np.array(array) for name, array in tree_flatten(whole)}
    backward, found = LayerwiseBackward(model, batches), {}
    for piece in backward.pieces():
        for name, gradient in piece.gradients.items():
            found.setdefault(name, np.full(whole[name].shape, np.nan, np.float32))[piece.rows or slice(None)] = np.array(gradient)
    assert backward.loss == pytest.approx(loss.item(), rel=1e-6)
    assert found.keys() == whole.keys()
    assert max(relative(found[name], whole[name]) for name in whole) < 1e-5


def random_batch(vocab_size: int, rows: int, length: int, seed: int):
    from fulltune_nb.data.batching import Batch

    random = np.random.RandomState(seed)
    positions = np.flatnonzero(random.rand(rows * length) < 0.7).astype(np.int32)
    count = len(positions)
    return Batch(
        inputs=random.randint(0, vocab_size, (rows, length)).astype(np.int32),
        target_positions=np.pad(positions, (0, 3)),
        targets=np.pad(random.randint(0, vocab_size, count).astype(np.int32), (0, 3)),
        weights=np.pad(np.ones(count, np.float32), (0, 3)),
        num_tokens=count,
        rows=tuple(range(rows)),
        sources=("",) * rows,
        padded_tokens=rows * length,
        real_tokens=rows * length,
    )


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


def test_its_peak_is_lower_than_the_whole_graphs(make_data, tokenizer):
    peaks = {}
    for backward in ("whole", "layerwise"):
        lm = ft.LanguageModel.from_config({**TINY_LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8}, tokenizer)
        config = ft.TrainConfig(iters=3, backward=backward, optimizer="adafactor", val_batches=0)
        trainer = ft.Trainer(lm, make_data(config=config), config)
        before = mx.get_active_memory()
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


def broken(trainer, block: int, monkeypatch, error: Exception):
    """Makes the update fail when it comes to this block."""
    update = trainer.optimizers.update_tensors

    def fails(model, gradients, rows=None):
        if any(name.startswith(f"layers.{block}.") for name in gradients):
            raise error
        return update(model, gradients, rows)

    monkeypatch.setattr(trainer.optimizers, "update_tensors", fails)


def test_a_step_that_fails_half_way_is_torn_until_the_trainer_goes_back(make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", backward="layerwise", iters=5)
    trainer.step()
    snapshot, before = trainer.snapshot(), weights(trainer.lm)
    with monkeypatch.context() as patch:
        broken(trainer, 0, patch, MemoryError("no more"))
        with pytest.raises(TornStepError, match="no more"):
            trainer.step()
    assert any((weights(trainer.lm)[name] != before[name]).any() for name in before)
    for use in (
        trainer.step, trainer.save, trainer.snapshot, trainer.run, lambda: trainer.lm.generate("a"), lambda: trainer.lm.chat([]),
        lambda: trainer.lm.save(tmp_path / "export"),
    ):  # fmt: skip
        with pytest.raises(TornStepError):
            use()
    trainer.restore(snapshot)
    assert all((weights(trainer.lm)[name] == before[name]).all() for name in before)
    trainer.lm.generate("a", max_tokens=1)
    again = make_trainer(backward="layerwise", iters=5)
    assert [report.loss for report in again.steps()][1:] == [report.loss for report in trainer.steps()]


def test_a_gradient_that_is_nan_in_a_lower_block_tears_the_step(make_trainer, monkeypatch):
    trainer, vjp = make_trainer(backward="layerwise"), layerwise.vjp

    def with_nan(modules, function, inputs, cotangent, sums, to_inputs=True):
        found = vjp(modules, function, inputs, cotangent, sums, to_inputs)
        sums.update({name: array * mx.nan for name, array in sums.items() if name.startswith("layers.0.")})
        return found

    monkeypatch.setattr(layerwise, "vjp", with_nan)
    with pytest.raises(TornStepError, match=r"layers\.0.* is NaN or inf"):
        trainer.step()
    assert trainer.lm.torn and trainer.step_count == 0


def test_a_loss_that_is_nan_changes_nothing(make_trainer):
    trainer = make_trainer(backward="layerwise")
    trainer.lm.model.layers[1].mlp.down_proj.weight = mx.full(trainer.lm.model.layers[1].mlp.down_proj.weight.shape, mx.nan)
    before = weights(trainer.lm)
    with pytest.raises(ft.errors.NonFiniteError):
        trainer.step()
    after = weights(trainer.lm)
    assert all(np.array_equal(before[name], after[name], equal_nan=True) for name in before)
    assert trainer.lm.torn is None


def test_a_run_that_does_not_fit_is_refused_unless_forced(make_lm, make_data, monkeypatch):
    monkeypatch.setattr("fulltune_nb.training.memory.machine_limit", lambda: 1000)
    with pytest.raises(ft.errors.MemoryLimitError, match="force=True"):
        ft.Trainer(make_lm(), make_data())
    assert ft.Trainer(make_lm(), make_data(), force=True).step().step == 1


def test_engines_name_themselves(make_trainer):
    assert repr(make_trainer().engine) == "WholeGraph()" and repr(make_trainer(backward="layerwise").engine) == "Layerwise()"
