"""A step that fails: nothing happened, or everything refuses until the trainer has gone back. The same with both engines."""

import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.errors import NonFiniteError, TornStepError

ENGINES = pytest.mark.parametrize("backward", ["whole", "layerwise"])


class Breaks:
    """An observer of updates that raises before or after the first one of a parameter of this block."""

    def __init__(self, error: BaseException, before: str | None = None, after: str | None = None):
        self.error, self.at_before, self.at_after = error, before, after

    def before(self, update) -> None:
        if self.at_before is not None and update.name.startswith(self.at_before):
            raise self.error

    def after(self, name, first_row, array) -> None:
        if self.at_after is not None and name.startswith(self.at_after):
            raise self.error


def arrays_of(trainer) -> dict[str, np.ndarray]:
    """Copies of weights and optimizer state."""
    weights = dict(tree_flatten(trainer.lm.model.parameters()))
    return {name: np.array(array) for name, array in {**weights, **trainer.optimizers.state_arrays()}.items()}


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@ENGINES
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_step_that_fails_half_way_is_torn_until_the_trainer_goes_back(make_trainer, tmp_path, backward, optimizer):
    trainer = make_trainer(run_dir=tmp_path / "run", backward=backward, optimizer=optimizer, iters=5)
    trainer.step()
    snapshot, before = trainer.snapshot(), arrays_of(trainer)
    error = MemoryError("no more")
    trainer.optimizers.observers.append(Breaks(error, after="layers.1."))
    with pytest.raises(TornStepError, match=r"Step 2 was broken off .* by MemoryError: no more.*Trainer\.resume\('.*run'\)") as raised:
        trainer.step()
    assert raised.value.__cause__ is error and not equal(arrays_of(trainer), before)
    for use in (
        trainer.step, trainer.save, trainer.snapshot, trainer.run, trainer.fork, lambda: trainer.lm.generate("a"),
        lambda: trainer.lm.chat([]), lambda: trainer.lm.save(tmp_path / "export"),
        lambda: ft.trace(trainer.lm, "a"), lambda: ft.trace(trainer.lm, [5]), lambda: ft.inspect(trainer, trainer.data.train[0]),
        lambda: ft.token_losses(trainer.lm, trainer.data.train[0]),
    ):  # fmt: skip
        with pytest.raises(TornStepError, match="no more"):
            use()
    trainer.optimizers.observers.clear()
    trainer.restore(snapshot)
    assert equal(arrays_of(trainer), before)
    trainer.lm.generate("a", max_tokens=1)
    again = make_trainer(backward=backward, optimizer=optimizer, iters=5)
    assert [report.loss for report in again.steps()][1:] == [report.loss for report in trainer.steps()]


@ENGINES
@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_a_step_that_fails_before_its_first_update_has_changed_nothing(make_trainer, backward, error):
    straight, trainer = make_trainer(backward=backward), make_trainer(backward=backward)
    trainer.step()
    before = arrays_of(trainer)
    trainer.optimizers.observers.append(Breaks(error, before=""))
    with pytest.raises(type(error)):
        trainer.step()
    assert trainer.lm.torn is None and trainer.step_count == 1 and equal(arrays_of(trainer), before)
    trainer.optimizers.observers.clear()
    trainer.run()
    straight.run()
    assert [report.loss for report in trainer.history.steps] == [report.loss for report in straight.history.steps]


@ENGINES
def test_an_interrupt_in_the_middle_of_an_update_stays_one_and_the_trainer_is_torn(make_trainer, backward):
    trainer = make_trainer(backward=backward)
    trainer.optimizers.observers.append(Breaks(KeyboardInterrupt(), after="layers.1."))
    with pytest.raises(KeyboardInterrupt):
        trainer.step()
    with pytest.raises(TornStepError, match="by KeyboardInterrupt"):
        trainer.step()


@ENGINES
def test_a_gradient_the_optimizer_refuses_changes_nothing(make_trainer, backward, monkeypatch):
    trainer = make_trainer(backward=backward)
    before = arrays_of(trainer)

    def refuses(*arguments):
        raise ft.TrainingError("another shape")

    monkeypatch.setattr(trainer.optimizers, "_check_gradients", refuses)
    with pytest.raises(ft.TrainingError, match="another shape") as raised:
        trainer.step()
    assert type(raised.value) is ft.TrainingError and trainer.lm.torn is None and equal(arrays_of(trainer), before)


@ENGINES
def test_a_loss_that_is_nan_changes_nothing(make_trainer, backward):
    trainer = make_trainer(backward=backward)
    weight = trainer.lm.model.layers[1].mlp.down_proj
    weight.weight = weight.weight * float("nan")
    before = arrays_of(trainer)
    with pytest.raises(NonFiniteError):
        trainer.step()
    after = arrays_of(trainer)
    assert all(np.array_equal(before[name], after[name], equal_nan=True) for name in before)
    assert trainer.lm.torn is None


@ENGINES
def test_in_a_search_for_a_learning_rate_too_an_error_is_that_error_and_all_is_as_before(make_trainer, backward, monkeypatch):
    trainer = make_trainer(backward=backward)
    before, update = arrays_of(trainer), trainer.optimizers.update_tensors

    def fails(model, gradients, rows=None):
        update(model, gradients, rows)
        if trainer.optimizers.step == 3:
            raise MemoryError("no more")

    monkeypatch.setattr(trainer.optimizers, "update_tensors", fails)
    with pytest.raises(MemoryError, match="no more"):
        ft.find_lr(trainer, steps=12)
    assert equal(arrays_of(trainer), before) and trainer.lm.torn is None and trainer.optimizers.step == 0


@pytest.mark.parametrize("settings", [{}, {"grad_checkpoint": True}, {"backward": "layerwise"}], ids=str)
@pytest.mark.parametrize("error", [MemoryError("no more"), KeyboardInterrupt()], ids=repr)
def test_a_forward_pass_that_is_broken_off_changes_nothing(make_trainer, monkeypatch, settings, error):
    settings = {**settings, "compile": False}  # a compiled pass does not come by the modules again
    straight, trainer = make_trainer(**settings), make_trainer(**settings)
    for one in (straight, trainer):
        one.step()
    before, mlp, calls = arrays_of(trainer), type(trainer.lm.model.layers[0].mlp), []
    compute = mlp.__call__

    def fails(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return compute(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(mlp, "__call__", fails)
        trainer.step()
    assert trainer.lm.torn is None and trainer.step_count == 1 and equal(arrays_of(trainer), before)
    trainer.lm.generate("a", max_tokens=2)
    trainer.run()
    straight.run()
    assert [report.loss for report in trainer.history.steps] == [report.loss for report in straight.history.steps]
