"""The whole graph's gradients: with kernels of our own between its halves, compiled, checkpointed; all the same."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

import fulltune_nb as ft
from fulltune_nb.cpu import KernelFolder, on_cpu
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.model_config import read_config
from fulltune_nb.models.parameters import parameters_of
from fulltune_nb.training import engine as engine_module
from fulltune_nb.training import plan
from fulltune_nb.training.engine import WholeGraph
from fulltune_nb.training.layerwise import BlockPasses
from nbs_tests.memory_held import memory_held
from nbs_tests.models.model_cases import CASES
from nbs_tests.models.parity import relative_error
from nbs_tests.training.conftest import loss_and_gradients, random_batch

CONFIGS = {name: read_config(values) for name, values in CASES.items()}
WITHOUT_EXPERTS = [name for name, config in CONFIGS.items() if not config.num_experts]
ONE_OF_EACH_FAMILY = {CONFIGS[name].family: name for name in WITHOUT_EXPERTS}
LLAMA_AND_THE_OTHERS_IN_CI = [
    name if family == "llama" else pytest.param(name, marks=pytest.mark.ci) for family, name in ONE_OF_EACH_FAMILY.items()
]
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
SHAPES = ((3, 20), (2, 13), (3, 20))


def decoder(case: str, **changes) -> Decoder:
    mx.random.seed(5)
    model = Decoder(read_config(CASES[case] | changes))
    mx.eval(model.parameters())
    return model


def assert_same(engine: WholeGraph, model: Decoder, *batches, tolerance: float = 1e-5) -> None:
    """As MLX's own graph, which is not compiled, computes loss and gradients."""
    (loss, gradients), (expected_loss, expected) = loss_and_gradients(engine, *batches), loss_and_gradients(WholeGraph(model), *batches)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    for name, array in expected.items():
        one, other = np.array(gradients[name]), np.array(array)
        assert one.shape == other.shape and np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other) + 1e-9, name


# ---------------------------------------------------------------- a kernel between the halves


@pytest.fixture(params=["one chunk", "many chunks"])
def chunked(request, monkeypatch):
    """The logits as one piece, and in several; a chunk has 32 positions at least."""
    if request.param == "many chunks":
        monkeypatch.setattr(engine_module, "CHUNK_ELEMENTS", 1)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("case", WITHOUT_EXPERTS)
def test_with_kernels_they_are_the_same_in_every_family(kernels, chunked, case, checkpoint):
    model = decoder(case)
    assert_same(WholeGraph(model, checkpoint, kernels=kernels), model, random_batch(model.config.vocab_size, 4, 21, 1))


@pytest.mark.parametrize("frozen", [["embed_tokens"], ["lm_head"], ["norm", "layers"], ["embed_tokens", "norm", "layers"]], ids=str)
def test_frozen_parts_have_no_gradients(kernels, frozen):
    model = decoder("phi_old_dialect")
    for name in frozen:
        for module in model.layers if name == "layers" else [model[name]]:
            module.freeze()
    assert_same(WholeGraph(model, kernels=kernels), model, random_batch(model.config.vocab_size, 3, 20, 1))


def test_micro_batches_are_summed(kernels):
    model = decoder(WITHOUT_EXPERTS[0])
    batches = [random_batch(model.config.vocab_size, rows, length, seed) for seed, (rows, length) in enumerate([(3, 20), (2, 13), (1, 5)])]
    assert_same(WholeGraph(model, kernels=kernels), model, *batches)


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=pytest.mark.long), False])
def test_the_model_is_left_as_it_was(kernels, with_kernels, compiled):
    model = decoder(WITHOUT_EXPERTS[0])
    before = parameters_of(model)
    engine = WholeGraph(model, compiled=compiled, kernels=kernels if with_kernels else None)
    engine.gradients(1, [random_batch(model.config.vocab_size, 3, 20, 1)])
    after = parameters_of(model)
    assert all(after[name] is array for name, array in before.items())


def test_logits_of_all_positions_never_exist_at_once(kernels, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNK_ELEMENTS", 32 * 16384)
    model = decoder(WITHOUT_EXPERTS[0], vocab_size=16384)
    batch = random_batch(16384, 32, 20, 1)
    engine = WholeGraph(model, kernels=kernels)
    engine.gradients(1, [batch])
    before = memory_held()
    engine.gradients(1, [batch])
    assert mx.get_peak_memory() - before < len(batch.targets) * 16384 * 4


# ---------------------------------------------------------------- compiled


def assert_same_after_every_change(model: Decoder, **settings) -> None:
    model.embed_tokens.freeze()
    engine = WholeGraph(model, compiled=True, **settings)
    for rows, length in SHAPES:
        assert_same(engine, model, random_batch(model.config.vocab_size, rows, length, seed=length), tolerance=1e-5 if settings else 1e-6)
        model.embed_tokens.weight = model.embed_tokens.weight * 1.5  # a frozen one: it must not be a constant of the program
        model.norm.update({name: array + 0.25 for name, array in model.norm.parameters().items()})


@pytest.mark.long
@pytest.mark.parametrize("case", LLAMA_AND_THE_OTHERS_IN_CI)
def test_compiled_they_are_the_same_for_every_shape_and_after_every_change_of_a_weight(case):
    assert_same_after_every_change(decoder(case))


@pytest.mark.long
def test_so_they_are_with_kernels(kernels):
    assert_same_after_every_change(decoder(WITHOUT_EXPERTS[0]), kernels=kernels)


@pytest.mark.long
@pytest.mark.parametrize("with_kernels", [True, False])
def test_grad_checkpoint_saves_memory_compiled_too(kernels, with_kernels):
    model, peaks = decoder(WITHOUT_EXPERTS[0], num_hidden_layers=8), {}
    batch = random_batch(model.config.vocab_size, 16, 120, 1)
    expected = loss_and_gradients(WholeGraph(model), batch)
    for checkpoint in (False, True):
        engine = WholeGraph(model, checkpoint, compiled=True, kernels=kernels if with_kernels else None)
        for _ in range(2):
            before = memory_held()
            loss, gradients = loss_and_gradients(engine, batch)
            peaks[checkpoint] = mx.get_peak_memory() - before
            assert loss == pytest.approx(expected[0], rel=1e-6)
            assert all(relative_error(gradients[name], gradient) < 1e-5 for name, gradient in expected[1].items())
            del gradients
    assert peaks[True] < 0.6 * peaks[False]


@pytest.mark.long
def test_a_block_s_passes_are_the_same_for_every_shape_and_after_every_change_of_a_weight():
    model = decoder(ONE_OF_EACH_FAMILY["llama"])
    block = model.layers[0]
    block.attention.freeze()
    plain, together = BlockPasses(block), BlockPasses(block, compiled=True)
    for rows, length in SHAPES:
        x, cotangent = (mx.random.normal((rows, length, model.config.hidden_size)) for _ in range(2))
        context = model.context(length)[0]
        (to_x, got), (expected_to_x, expected) = together.backward(x, cotangent, context), plain.backward(x, cotangent, context)
        assert got.keys() == expected.keys() and not any(name.startswith("attention") for name in got)
        pairs = [(together.forward(x, context), plain.forward(x, context)), (to_x, expected_to_x)]
        for one, other in pairs + [(got[name], expected[name]) for name in expected]:
            assert np.linalg.norm(np.array(one) - np.array(other)) <= 1e-6 * np.linalg.norm(np.array(other))
        block.update(tree_map(lambda array: array * 1.25, block.parameters()))  # frozen ones too: none is a constant of the program


@pytest.mark.ci
@pytest.mark.parametrize("backward", ["whole", "layerwise"])
def test_a_compiled_run_is_the_same_and_goes_on_from_a_checkpoint(make_trainer, tmp_path, backward):
    settings = {"iters": 4, "learning_rate": 1e-3, "packing": True, "grad_accumulation_steps": 2, "backward": backward}
    plain, together = make_trainer(**settings), make_trainer(**settings, compile=True, run_dir=tmp_path / "run")
    plain.run()
    together.run(2)
    together.save()
    losses = [report.loss for report in together.history.steps]
    del together
    resumed = ft.Trainer.resume(tmp_path / "run", data=plain.data)
    resumed.run()
    assert resumed.config.compile and not compile_events(resumed)
    losses += [report.loss for report in resumed.history.steps[len(losses) :]]
    assert losses == pytest.approx([report.loss for report in plain.history.steps], rel=1e-6)


# ---------------------------------------------------------------- whether a run is compiled


def compile_events(trainer) -> list[str]:
    return [event.message for event in trainer.history.events if event.kind == "compile"]


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        (MIXTRAL, {}, "expert"), (MIXTRAL, {"backward": "layerwise"}, "expert"),
    ],
    ids=["experts", "experts, layerwise"],
)  # fmt: skip
def test_where_compiling_has_no_effect_an_event_says_so_and_training_goes_on(make_lm, make_data, model, settings, reason):
    """On a GPU it has."""
    config = ft.TrainConfig(iters=1, compile=True, **settings)
    trainer = ft.Trainer(make_lm(**model), make_data(config=config), config)
    messages = compile_events(trainer)
    assert len(messages) == on_cpu() and all(reason in message and "no effect" in message for message in messages)
    trainer.run()
    assert trainer.done


def test_without_a_compiler_the_event_says_what_to_install(make_trainer, monkeypatch):
    monkeypatch.setattr(plan, "lacks_compiler", lambda: True)
    (message,) = compile_events(make_trainer(compile=True))
    assert "apt-get install g++" in message


def test_where_no_folder_for_kernels_was_found_the_event_says_why(make_trainer, monkeypatch):
    monkeypatch.setattr(plan, "ensure_kernel_folder", lambda: KernelFolder(None, "the disk is full"))
    (message,) = compile_events(make_trainer(compile=True))
    assert "compile=True has no effect" in message and "the disk is full" in message


def test_left_to_the_trainer_long_runs_are_compiled_and_short_ones_not(kernels, make_trainer, monkeypatch):
    assert compile_events(make_trainer(iters=1000)) == []
    monkeypatch.setattr(plan, "COMPILING_PAYS_FROM", 1e9)
    (message,) = compile_events(make_trainer(iters=1000))
    assert "compile=False" in message
    assert compile_events(make_trainer(iters=1)) == []
    assert compile_events(make_trainer(iters=1000, compile=False)) == []
    assert compile_events(make_trainer(iters=1000, grad_checkpoint=True)) == []
    monkeypatch.setenv("FULLTUNE_KERNELS", "off")  # as where nothing can be compiled or loaded
    assert compile_events(make_trainer(iters=1000)) == []


@pytest.mark.long
@pytest.mark.parametrize("backward", ["whole", "layerwise"])
def test_a_run_that_the_trainer_compiles_is_the_one_that_the_user_has_compiled(kernels, make_trainer, monkeypatch, backward):
    monkeypatch.setattr(plan, "COMPILING_PAYS_FROM", 0)
    own, theirs = make_trainer(iters=3, backward=backward), make_trainer(iters=3, backward=backward, compile=True)
    assert [report.loss for report in own.steps()] == [report.loss for report in theirs.steps()]
