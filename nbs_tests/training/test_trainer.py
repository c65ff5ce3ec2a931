"""One optimizer step against torch; whole steps, pausing, evaluation, interrupts, errors."""

import math
import os
import signal

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.data import DataSet, DataSettings, collate
from fulltune_nb.errors import ConfigError, DataError, NonFiniteError, TrainingError
from fulltune_nb.models.folder import hf_tensors
from fulltune_nb.training.signals import interrupts_deferred
from nbs_tests.benchmarks.many_lengths import random_split
from nbs_tests.training.conftest import make_rows


def weights_of(trainer):
    return {name: np.array(array) for name, array in hf_tensors(trainer.lm.model).items()}


def distance(ours, reference):
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


def torch_loss(model, examples):
    """Summed cross-entropy over trained tokens, one row at a time: no padding, no batching, no chunks."""
    import torch

    total = 0.0
    for example in examples:
        ids = torch.tensor(example.tokens[None].astype(np.int64))
        trained = torch.tensor(example.loss_mask[1:])
        logits = model(ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits[trained], ids[0, 1:][trained], reduction="sum")
    return total


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mask_prompt": False},
        {"grad_accumulation_steps": 3},
        {"max_grad_norm": 0.1},
        {"grad_checkpoint": True},
        {"grad_accumulation_steps": 2, "max_grad_norm": 0.1, "grad_checkpoint": True, "mask_prompt": False},
    ],
    ids=["plain", "all tokens", "accumulation", "clipping", "grad_checkpoint", "everything"],
)
def test_one_adamw_step_equals_torchs(make_trainer, tmp_path, settings):
    torch = pytest.importorskip("torch", reason="the reference is torch, which the test extra does not install")
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(**settings)
    reference = AutoModelForCausalLM.from_pretrained(trainer.lm.save(tmp_path / "base"), dtype=torch.float32)
    decays = [p for p in reference.parameters() if p.ndim > 1]
    rest = [p for p in reference.parameters() if p.ndim <= 1]
    groups = [{"params": decays, "weight_decay": trainer.config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=trainer.config.learning_rate, betas=(0.9, 0.999), eps=1e-8)

    rows = [row for batch in trainer.batches.of_step(trainer.step_count) for row in batch.rows]
    examples = [trainer.data.train[row] for row in rows]
    tokens = sum(int(example.loss_mask.sum()) for example in examples)
    loss = torch_loss(reference, examples) / tokens
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), trainer.config.max_grad_norm or math.inf)
    optimizer.step()

    report = trainer.step()
    assert report.tokens == tokens
    assert report.loss == pytest.approx(loss.item(), rel=1e-5)
    assert report.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    ours = weights_of(trainer)
    assert ours.keys() == reference.state_dict().keys()
    clipped = min(1.0, (trainer.config.max_grad_norm or math.inf) / norm.item())
    gradients = {name: parameter.grad.numpy() / clipped for name, parameter in reference.named_parameters()}
    for name, expected in reference.state_dict().items():
        expected, rate = expected.numpy(), trainer.config.learning_rate
        # Adam's first update is g / (|g| + 1e-8): where g itself is no more than the rounding of its sum, so is the update's size.
        size = np.abs(gradients.get(name, np.ones_like(expected)))
        lost = (size > 0) & (size < 1e-7)
        assert lost.mean() < 0.002 and (np.abs(ours[name] - expected)[lost] <= rate).all(), name
        assert distance(np.where(lost, expected, ours[name]), expected) < 1e-5, name


def test_accumulated_micro_batches_weigh_tokens_not_batches(make_trainer):
    whole = make_trainer(rows=8, batch_size=8)
    pieces = make_trainer(rows=8, batch_size=1, grad_accumulation_steps=8)
    one, other = whole.step(), pieces.step()
    assert one.tokens == other.tokens
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    for name, array in weights_of(whole).items():
        assert distance(weights_of(pieces)[name], array) < 1e-5, name


def test_an_epoch_trains_on_every_row_once(make_trainer):
    trainer = make_trainer(rows=10, batch_size=4, epochs=1, iters=None)
    seen = []
    while not trainer.done:
        seen += [row for batch in trainer.batches.of_step(trainer.step_count) for row in batch.rows]
        trainer.step()
    assert sorted(seen) == list(range(10))
    assert trainer.history.steps[-1].epoch == 1.0
    assert sum(report.tokens for report in trainer.history.steps) == trainer.data.train.trained_tokens


def test_leaving_the_loop_pauses_at_a_whole_step_and_changes_nothing(make_trainer):
    straight, paused = make_trainer(), make_trainer()
    straight.run()
    for report in paused.steps():
        if report.step == 3:
            break
    assert paused.step_count == 3
    assert len(list(paused.steps(2))) == 2
    paused.run()
    assert [r.loss for r in paused.history.steps] == [r.loss for r in straight.history.steps]
    for name, array in weights_of(straight).items():
        assert np.array_equal(weights_of(paused)[name], array), name


def test_run_returns_at_once_when_done(make_trainer):
    trainer = make_trainer(iters=3)
    trainer.run()
    assert trainer.done
    entries = len(trainer.history)
    trainer.run()
    trainer.run(5)
    assert trainer.step_count == 3 and len(trainer.history) == entries


def test_evaluation_is_the_token_weighted_mean_of_the_whole_split(make_trainer):
    for batch_size in (1, 2, 4, 16):
        trainer = make_trainer(batch_size=batch_size)
        report = trainer.evaluate("test")
        total, tokens, right, entropy = 0.0, 0, 0, 0.0
        for example in trainer.data.test:
            logits = trainer.lm.model(mx.array(example.tokens[None]))[0]
            log_probabilities = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            for position in np.flatnonzero(example.loss_mask):
                total -= log_probabilities[position - 1, example.tokens[position]]
                right += log_probabilities[position - 1].argmax() == example.tokens[position]
                entropy -= (np.exp(log_probabilities[position - 1]) * log_probabilities[position - 1]).sum()
                tokens += 1
        assert report.tokens == tokens
        assert report.accuracy == right / tokens and report.entropy == pytest.approx(entropy / tokens, rel=1e-5)
        assert report.loss == pytest.approx(total / tokens, rel=1e-5)
        assert report.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_an_evaluation_of_many_lengths_takes_few_shapes_and_gives_the_loss_of_the_rows_by_themselves(make_lm, batch_size):
    split = random_split(range(2, 202), share=0.4)
    data = DataSet({"train": split, "valid": split}, DataSettings(), None, [], None)
    trainer, shapes = ft.Trainer(make_lm(), data, ft.TrainConfig(batch_size=batch_size)), set()
    hidden_states = type(trainer.lm.model).hidden_states

    def seen(self, ids, **options):
        shapes.add(ids.shape)
        return hidden_states(self, ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.lm.model), "hidden_states", seen)
        report = trainer.evaluate("valid")
    assert len(shapes) <= 16
    total = 0.0
    for index in range(len(split)):
        batch = collate(split, [index])
        logits = np.array(trainer.lm.model(mx.array(batch.inputs)), dtype=np.float64)[0]
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        real = batch.weights > 0
        total -= log_probabilities[batch.target_positions[real], batch.targets[real]].sum()
    assert report.tokens == split.trained_tokens and report.loss == pytest.approx(total / report.tokens, rel=1e-6)


def test_evaluates_before_the_first_step_when_due_and_at_the_end(make_trainer):
    trainer = make_trainer(iters=7, steps_per_eval=3)
    trainer.run()
    assert [(r.split, r.step) for r in trainer.history.evals] == [("valid", 0), ("valid", 3), ("valid", 6), ("valid", 7)]


def test_step_neither_evaluates_nor_needs_valid(make_lm, tokenizer):
    config = ft.TrainConfig(iters=2, batch_size=2)
    trainer = ft.Trainer(make_lm(), ft.load_data({"train": make_rows(3)}, tokenizer), config)
    trainer.step()
    trainer.run()
    assert trainer.history.evals == []


def test_patience_ends_the_run_early(make_trainer):
    trainer = make_trainer(iters=50, steps_per_eval=1, patience=2, learning_rate=10.0, max_grad_norm=1.0)
    trainer.run()
    assert trainer.stopped_early and trainer.done and trainer.step_count < 50
    assert trainer.history.events[-1].kind == "early_stop"


def test_set_learning_rate_is_the_peak_of_the_schedule_and_an_event(make_trainer):
    settings = {"lr_schedule": "cosine", "warmup": 4, "iters": 10}
    trainer, other = make_trainer(**settings), make_trainer(learning_rate=3e-5, **settings)
    for _ in trainer.steps(2):  # in the warm-up
        pass
    trainer.set_learning_rate(3e-5)
    assert trainer.peak_learning_rate == pytest.approx(3e-5)
    other.run()
    trainer.run()
    rates, expected = ([report.learning_rate for report in t.history.steps[2:]] for t in (trainer, other))
    assert rates == pytest.approx(expected)
    event = next(event for event in trainer.history.events if event.kind == "learning_rate")
    assert event.message == "peak learning rate changed from 0.001 to 3e-05"


@pytest.mark.parametrize("schedule", [
    {"name": "linear_schedule", "arguments": [1e-6, 1e-3, 10]}, {"name": "cosine_decay", "arguments": [1e-3, 10], "warmup": 3},
    {"name": "exponential_decay", "arguments": [1e-3, 0.9]}, {"name": "constant", "arguments": [1e-3], "warmup": 2, "warmup_init": 2e-3},
])  # fmt: skip
def test_the_peak_of_mlx_lms_form_is_the_highest_rate_of_its_run(make_trainer, schedule):
    trainer = make_trainer(lr_schedule=schedule, learning_rate=1.0, iters=11)
    trainer.run()
    assert trainer.peak_learning_rate == pytest.approx(max(report.learning_rate for report in trainer.history.steps))


def test_set_next_learning_rate_is_the_next_steps_rate_and_the_schedule_goes_on_from_it(make_trainer):
    trainer = make_trainer(lr_schedule="cosine", iters=10)
    trainer.run(3)
    trainer.set_next_learning_rate(3e-5)
    assert trainer.step().learning_rate == pytest.approx(3e-5)
    assert trainer.step().learning_rate < 3e-5 < trainer.peak_learning_rate
    event = trainer.history.events[-1]
    assert event.kind == "learning_rate" and event.message.startswith("learning rate changed") and "3e-05" in event.message


@pytest.mark.parametrize("name", ["set_learning_rate", "set_next_learning_rate"])
def test_a_learning_rate_that_cannot_be_is_refused_and_nothing_changes(make_trainer, name):
    trainer = make_trainer(lr_schedule="cosine", iters=10)
    trainer.run(3)
    before = trainer.learning_rate
    for bad in (0, -1.0, math.nan, math.inf, 10**400, "1e-5", True):
        with pytest.raises(ConfigError, match=f"expected a finite number larger than 0, got .*{str(bad)[:4]}"):
            getattr(trainer, name)(bad)
    with pytest.raises(ConfigError, match="cannot be scaled to 1e\\+308"):  # the factor would be infinite
        getattr(trainer, name)(1e308)
    assert trainer.learning_rate == before and not trainer.history.events


def test_a_loss_that_is_not_finite_changes_nothing_and_names_the_rows(make_trainer):
    trainer = make_trainer()
    trainer.run(2)
    before, good = weights_of(trainer), trainer.lm.model.layers[0].mlp.up_proj.weight
    state = {name: np.array(array) for name, array in trainer.optimizers.state_arrays().items()}
    trainer.lm.model.layers[0].mlp.up_proj.weight = good * math.nan
    with pytest.raises(NonFiniteError, match=r"step 3.*train:\d+"):
        trainer.step()
    trainer.lm.model.layers[0].mlp.up_proj.weight = good
    assert trainer.step_count == 2
    for name, array in weights_of(trainer).items():
        assert np.array_equal(array, before[name])
    for name, array in trainer.optimizers.state_arrays().items():
        assert np.array_equal(np.array(array), state[name])
    trainer.step()


@pytest.mark.parametrize("when", ["in the step", "in an evaluation"])
def test_an_interrupt_pauses_run_at_a_whole_step(make_trainer, when):
    straight, interrupted = make_trainer(steps_per_eval=3), make_trainer(steps_per_eval=3)
    straight.run()

    class Interrupt:
        def on_step(self, trainer, report):  # called inside the step, where a signal must wait
            if when == "in the step" and report.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

        def on_eval(self, trainer, report):
            if when == "in an evaluation" and report.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    interrupted.run(callbacks=[Interrupt()])
    assert interrupted.interrupted and interrupted.step_count == 3
    assert interrupted.history.events[-1].kind == "pause"
    interrupted.run()
    assert not interrupted.interrupted
    assert [r.loss for r in interrupted.history.steps] == [r.loss for r in straight.history.steps]


def test_an_interrupt_in_step_is_raised_when_the_step_is_whole(make_trainer):
    trainer = make_trainer()
    original = trainer.optimizers.update_tensors

    def update(*args, **rows):
        os.kill(os.getpid(), signal.SIGINT)
        original(*args, **rows)

    trainer.optimizers.update_tensors = update
    with pytest.raises(KeyboardInterrupt):
        trainer.step()
    assert trainer.step_count == 1 and len(trainer.history.steps) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_bfloat16_weights_stay_bfloat16(make_lm, make_data):
    lm = make_lm()
    lm.model.set_dtype(mx.bfloat16)
    trainer = ft.Trainer(lm, make_data(), ft.TrainConfig(iters=1))
    trainer.step()
    assert lm.dtype == "bfloat16"
    assert not trainer.history.events


def test_weights_are_turned_into_float32_when_asked_with_a_note(make_lm, make_data):
    lm = make_lm()
    lm.model.set_dtype(mx.bfloat16)
    trainer = ft.Trainer(lm, make_data(), ft.TrainConfig(iters=1, weights="float32"))
    assert lm.dtype == "float32"
    assert [event.kind for event in trainer.history.events] == ["dtype"]


def test_rounding_to_nearest_comes_with_a_warning(make_lm, make_data):
    lm = make_lm()
    lm.model.set_dtype(mx.bfloat16)
    trainer = ft.Trainer(lm, make_data(), ft.TrainConfig(iters=1, rounding="nearest"))
    assert "4.080" in trainer.history.events[0].message


def test_every_weight_is_trained(make_trainer):
    trainer = make_trainer(rows=40, iters=1, batch_size=40)
    before = weights_of(trainer)
    trainer.step()
    for name, array in weights_of(trainer).items():
        assert not np.array_equal(array, before[name]), name


def test_freeze_and_train_only_choose_by_name(make_lm, make_data):
    for settings, expected in (
        ({"freeze": ("model.embed_tokens.*", "*norm*")}, lambda name: "embed_tokens" not in name and "norm" not in name),
        ({"train_only": ("model.layers.1.*",)}, lambda name: name.startswith("model.layers.1.")),
    ):
        trainer = ft.Trainer(make_lm(), make_data(), ft.TrainConfig(iters=1, learning_rate=1e-2, **settings))
        before = weights_of(trainer)
        trainer.step()
        changed = {name for name, array in weights_of(trainer).items() if not np.array_equal(array, before[name])}
        assert changed == {name for name in before if expected(name)}


def test_a_second_trainer_on_the_same_model_trains_everything_again(make_lm, make_data):
    lm = make_lm()
    ft.Trainer(lm, make_data(), ft.TrainConfig(iters=1, freeze=("*norm*",)))
    ft.Trainer(lm, make_data(), ft.TrainConfig(iters=1))
    assert len(tree_flatten(lm.model.trainable_parameters())) == len(tree_flatten(lm.model.parameters()))


def test_patterns_that_match_nothing_are_refused(make_lm, make_data):
    for settings in ({"freeze": ("model.embed_tokens",)}, {"train_only": ("nothing",)}, {"freeze": ("*",)}):
        with pytest.raises(ConfigError, match="train_only|freeze"):
            ft.Trainer(make_lm(), make_data(), ft.TrainConfig(**settings))


def test_training_needs_a_train_split_and_evaluation_the_split_named(make_lm, make_trainer, tokenizer):
    with pytest.raises(DataError, match="train"):
        ft.Trainer(make_lm(), ft.load_data({"test": make_rows(3)}, tokenizer), ft.TrainConfig())
    with pytest.raises(DataError, match="'dev'"):
        make_trainer().evaluate("dev")


def test_save_needs_a_run_dir(make_trainer):
    with pytest.raises(TrainingError, match="run_dir"):
        make_trainer().save()


def test_nothing_is_written_without_a_run_dir(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer(iters=2, save_every=1).run()
    assert list(tmp_path.iterdir()) == []


def test_callbacks_are_told_of_everything(make_trainer, tmp_path):
    told = []

    class Listener:
        def on_step(self, trainer, report):
            told.append(("step", report.step))

        def on_eval(self, trainer, report):
            told.append(("eval", report.step))

        def on_save(self, trainer, path):
            told.append(("save", path.name))

    trainer = make_trainer(iters=2, save_every=1, steps_per_eval=2, run_dir=tmp_path / "run")
    trainer.run(callbacks=[Listener()])
    assert told == [
        ("eval", 0), ("save", "step-000000"), ("step", 1), ("save", "step-000001"), ("step", 2), ("eval", 2), ("save", "step-000002"),
    ]


def test_reports_show_time_rate_and_memory(make_trainer):
    trainer = make_trainer()
    report = trainer.step()
    assert report.seconds > 0 and report.tokens_per_second == pytest.approx(report.tokens / report.seconds)
    weight_bytes = sum(array.nbytes for _, array in tree_flatten(trainer.lm.model.parameters()))
    assert report.peak_memory > report.active_memory >= 3 * weight_bytes  # weights and two moments stay
    assert "Trainer(step 1 of 8" in repr(trainer)
    assert "<table" in trainer._repr_html_()


def test_of_blocks_that_hold_an_interrupt_back_the_outermost_raises_it():
    passed = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts_deferred():
            with interrupts_deferred():
                os.kill(os.getpid(), signal.SIGINT)
                passed.append("inner")
            passed.append("outer")
    assert passed == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_listeners_are_told_also_outside_run(make_trainer):
    trainer, told = make_trainer(), []

    class Listener:
        def on_step(self, trainer, report):
            told.append(report.step)

        def on_eval(self, trainer, report):
            told.append(report.split)

    trainer.listeners.append(Listener())
    trainer.step()
    trainer.evaluate("test")
    trainer.run(1)
    trainer.listeners.clear()
    trainer.step()
    assert told == [1, "test", 2]


def test_the_state_says_where_a_run_stands_and_how_it_ended(make_trainer):
    trainer, seen = make_trainer(iters=4), []

    class Sees:
        def on_step(self, trainer, report):
            seen.append(trainer.state)
            if report.step == 2:
                os.kill(os.getpid(), signal.SIGINT)

        def on_end(self, trainer):
            seen.append(trainer.state)

    assert trainer.state == "ready"
    for _ in trainer.steps(2):
        assert trainer.state == "running"
        break
    assert trainer.state == "paused"
    trainer.run(callbacks=[Sees()])
    trainer.run(callbacks=[Sees()])
    assert seen == ["running", "paused", "running", "running", "done"] and trainer.state == "done"
    stopped = make_trainer(iters=50, steps_per_eval=1, patience=1, learning_rate=10.0)
    stopped.run()
    assert stopped.state == "stopped early"


def test_the_state_is_failed_after_an_error_until_the_run_goes_on(make_trainer):
    class Fails:
        def on_eval(self, trainer, report):
            raise RuntimeError("no")

    trainer = make_trainer(iters=2)
    with pytest.raises(RuntimeError):
        trainer.run(callbacks=[Fails()])
    assert trainer.state == "failed"
    trainer.step()
    assert trainer.state == "paused"
    trainer.optimizers.step += 1  # as an update leaves it that does not come to its end
    assert trainer.state == "failed"


@pytest.mark.parametrize("settings", [{"train_only": ("*norm*",)}, {"weights": "bfloat16"}])
def test_a_trainer_does_not_go_on_with_what_a_later_one_has_selected_in_the_same_model(make_trainer, settings):
    first = make_trainer(freeze=("*embed*",))
    first.run(2)
    same = ft.Trainer(first.lm, first.data, first.config)
    first.run(1)
    assert same.step().step == 1
    later = ft.Trainer(first.lm, first.data, first.config.replace(freeze=(), **settings))
    before = dict(tree_flatten(first.lm.model.parameters()))
    with pytest.raises(TrainingError, match="later trainer of this model trains other tensors"):
        first.run(1)
    assert first.step_count == 3 and all(array is before[name] for name, array in tree_flatten(first.lm.model.parameters()))
    assert later.step().step == 1
