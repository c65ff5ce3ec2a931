"""The trainer: one optimizer step at a time, whole after each, resumable from any checkpoint.

Randomness is a function of the seed and the position (epoch, step): nothing has to be remembered but where the run stands.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from fulltune_nb.cpu import cap_cache
from fulltune_nb.data.dataset import DataSet
from fulltune_nb.data.encode import Example
from fulltune_nb.errors import CheckpointError, DataError, TrainingError
from fulltune_nb.html import facts
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.models.parameters import select_trainable
from fulltune_nb.training.callbacks import default_callbacks
from fulltune_nb.training.card import ModelCard
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.gradients import Engine, take_step
from fulltune_nb.training.history import EvalReport, Event, History, StepReport
from fulltune_nb.training.loss import evaluate_split
from fulltune_nb.training.optimizers import Optimizers
from fulltune_nb.training.plan import make_plan
from fulltune_nb.training.run import RESULT_FILE, RunDirectory
from fulltune_nb.training.schedule import LearningRate, make_schedule
from fulltune_nb.training.signals import StoppedAtOnce, interrupts_deferred, termination_pauses
from fulltune_nb.training.state import Branching, Patience, check_whole, resume_run, state_of, step_failed, torn_reason, versions

_METHODS = {StepReport: "on_step", EvalReport: "on_eval", Event: "on_event"}

# -- result: What came out of a run, as JSON values: `result.json` of its directory, for those who compare many r

def result_of(trainer: Trainer) -> dict[str, Any]:
    """Losses in nats, times in seconds, memory in bytes. What there was none of is null."""
    steps, evals = trainer.history.steps, trainer.history.evals
    valid = [report for report in evals if report.split == "valid"]
    finite = [report for report in valid if math.isfinite(report.loss)]
    tests = [report for report in evals if report.split == "test"]
    return {
        "steps": trainer.step_count,
        "total_steps": trainer.total_steps,
        "stopped_early": trainer.stopped_early,
        "epochs": steps[-1].epoch if steps else 0.0,
        "tokens": sum(report.tokens for report in steps),
        "seconds_in_steps": sum(report.seconds for report in steps),
        "peak_memory": max((report.peak_memory for report in steps), default=None),
        "train_loss_last": _finite(steps[-1].loss) if steps else None,
        "valid_last": _eval(valid[-1]) if valid else None,
        "valid_best": _eval(min(finite, key=lambda report: report.loss)) if finite else None,
        "test": _eval(tests[-1]) if tests else None,
        "config": trainer.config.to_dict(),
        "model_source": trainer.lm.source,
        "num_parameters": trainer.lm.num_parameters,
        "data": {"source": trainer.data.source, "fingerprint": trainer.data.fingerprint},
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def write_result(trainer: Trainer) -> None:
    """Writes `result.json`, or anew, where the run is done and has a directory.

    Raises:
        CheckpointError: it cannot be written, and `on_save_error` is "stop".
    """
    if trainer._directory is None or not trainer.done:
        return
    try:
        trainer._directory.write_text(RESULT_FILE, json.dumps(result_of(trainer), indent=1, allow_nan=False) + "\n")
    except CheckpointError as error:
        if trainer.config.on_save_error == "stop":
            raise
        trainer.event("save_failed", str(error))


def _eval(report: EvalReport) -> dict[str, Any]:
    return {"step": report.step, "loss": _finite(report.loss), "perplexity": _finite(report.perplexity), "tokens": report.tokens}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# -- upkeep: What is due between two steps of a run: validation, the best weights, checkpoints, the result; and w

class Upkeep:
    """Does what is due after the steps of one trainer, each thing once.

    Attributes:
        saved_step: the step whose checkpoint was written last by this trainer, or that it was resumed from; -1 for none.
        result_step: the step at which `result.json` was written; -1 for none.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self.forget()

    def forget(self) -> None:
        """After going back to an earlier state: what was written is not of this line."""
        self.saved_step = self.result_step = -1

    def do(self) -> None:
        """Validation, checkpoint and result, if they are due at this step and not done yet."""
        trainer = self._trainer
        at_end = trainer.step_count == trainer.total_steps
        if at_end or trainer.step_count % trainer.config.steps_per_eval == 0:
            self._evaluate_valid()
        if trainer.step_count and (trainer.done or trainer.step_count % trainer.config.save_every == 0):
            with interrupts_deferred():
                self.save_unless_saved()
        if trainer.done and self.result_step != trainer.step_count:
            write_result(trainer)
            self.result_step = trainer.step_count

    def evaluated(self) -> None:
        """An evaluation after the end, such as a test, belongs into the result."""
        if self.result_step == self._trainer.step_count:
            write_result(self._trainer)

    def save_unless_saved(self) -> None:
        """A checkpoint of this step, where there is a directory and none was written."""
        if self._trainer.run_dir and self.saved_step != self._trainer.step_count:
            self._trying(self._trainer.save)

    def _evaluate_valid(self) -> None:
        """The validation that is due, once a step; keeps the best weights and counts towards `patience`."""
        trainer, patience = self._trainer, self._trainer.patience
        if trainer.data.valid is None or trainer.config.val_batches == 0 or patience.last_step == trainer.step_count:
            return
        loss = trainer.evaluate("valid", None if trainer.config.val_batches < 0 else trainer.config.val_batches).loss
        with interrupts_deferred():
            if patience.improved(trainer.step_count, loss):
                if trainer.run_dir and trainer.step_count:
                    self._trying(lambda: trainer._directory.save_best(trainer.lm))
            elif trainer.stopped_early:
                message = f"no better validation loss than {patience.best_loss:.4f} in {patience.waited} evaluations"
                trainer.event("early_stop", message)

    def _trying(self, save: Callable[[], Any]) -> None:
        trainer = self._trainer
        try:
            save()
        except CheckpointError as error:
            if trainer.config.on_save_error == "stop" or not trainer._directory.is_ours:
                raise
            trainer.event("save_failed", str(error))


# -- trainer_view: What a trainer shows in a cell

def trainer_html(trainer: Trainer) -> str:
    """Where it stands, as a table."""
    last = trainer.history.steps[-1].loss if trainer.history.steps else None
    per_epoch = trainer.steps_per_epoch
    return facts(
        "Trainer",
        [
            ("step", f"{trainer.step_count:,} of {trainer.total_steps:,}"),
            ("epoch", f"{trainer.step_count / per_epoch:.2f} ({per_epoch:,} steps each)"),
            ("last loss", "none yet" if last is None else f"{last:.4f}"),
            ("next learning rate", f"{trainer.learning_rate:.3g}"),
            ("optimizer", trainer.config.optimizer),
            ("run_dir", trainer.run_dir or "none: nothing is written"),
        ],
    )


# -- trainer: The trainer: one optimizer step at a time, whole after each, resumable from any checkpoint

class Trainer(Branching):
    """Trains every weight of a model, one whole step at a time.

    Attributes:
        lm: the language model; its weights change in place.
        data: the data set; `data.train` is trained on.
        config: the settings.
        step_count: optimizer steps taken.
        total_steps: steps of the whole run.
        patience: the count of validation losses.
        optimizer_steps_before: steps taken before the optimizer was begun anew, in a fork with another one.
        backward: "whole" or "layerwise": how gradients are computed, from `config.memory` and `config.backward`.
        interrupted: whether the last `run` was ended by an interrupt.
    """

    def __init__(
        self,
        lm: LanguageModel,
        data: DataSet,
        config: TrainConfig | None = None,
        run_dir: str | os.PathLike | None = None,
        force: bool = False,
    ):
        """
        Args:
            lm: the model; its weights take the dtype that `config.weights` asks for.
            data: needs a train split; its settings must agree with the config's.
            config: the settings; the defaults where left out.
            run_dir: a new folder for checkpoints and metrics, locked while this trainer lives; None writes nothing.
            force: go on even where `preflight` says that the run does not fit into this machine's memory.

        Raises:
            ConfigError: settings that disagree with the data's, or patterns that match nothing.
            DataError: no train split.
            MemoryLimitError: the run does not fit; the message says what would make it fit.
            CheckpointError: `run_dir` already holds a run, or lies in the source model's folder.
        """
        self._set_up(lm, data, config or TrainConfig(), force)
        if run_dir is not None:
            self._write_into(RunDirectory.create(run_dir, self.config, lm.source))

    @classmethod
    def resume(
        cls,
        run_dir: str | os.PathLike,
        lm: LanguageModel | None = None,
        data: DataSet | str | os.PathLike | None = None,
        force: bool = False,
    ) -> Trainer:
        """The run of a folder, at its newest whole checkpoint; it goes on bit for bit as if it had never stopped.

        Args:
            run_dir: the folder given to the `Trainer` that began the run.
            lm: takes the checkpoint's weights; loaded from the checkpoint where left out.
            data: the same data, or the folder where it is now; loaded from its old folder where left out. Data that was in
                memory must be passed again.
            force: go on even though data, model or `config.yaml` differ from what the run began with.

        Raises:
            CheckpointError: no whole checkpoint, a process that has the run in its hands, or (unless forced) a difference in data,
                model or settings that matters.
        """
        return resume_run(cls, run_dir, lm, data, force)

    def _set_up(self, lm: LanguageModel, data: DataSet, config: TrainConfig, force: bool = False, backward: str | None = None) -> None:
        if data.train is None:
            raise DataError("Training needs a train split; this data has none. Add train.jsonl (or the key 'train').")
        config = config.for_data(data.settings)
        self.lm, self.data, self.config = lm, data, config
        self.interrupted = False
        self.step_count = 0
        self.optimizer_steps_before = 0
        self.history = History()
        self.listeners: list[Any] = []
        self._callbacks: tuple[Any, ...] = ()
        self._directory: RunDirectory | None = None
        self._loops, self._failed, self._metrics_fail = 0, False, False
        lm.card = ModelCard(lm.source, data, config, self.history)
        self._upkeep = Upkeep(self)
        self.patience = Patience(config.patience)
        plan = make_plan(lm, data, config, force, backward)
        for kind, message in plan.notes:
            self.event(kind, message)
        self.batches, self.total_steps, self.backward = plan.batches, plan.total_steps, plan.backward
        self._rate = LearningRate(make_schedule(config, self.total_steps))
        if plan.dtype != lm.model.embed_tokens.weight.dtype:
            lm.model.set_dtype(plan.dtype)
            mx.eval(lm.model.parameters())
        select_trainable(lm.model, config.train_only, config.freeze)
        cap_cache(lean=plan.gives_back)
        self._optimizers = Optimizers(lm.model, config)
        self._engine = plan.make_engine(lm.model)

    @property
    def optimizers(self) -> Optimizers:
        """What updates the weights; its `observers` see each tensor's update."""
        return self._optimizers

    @property
    def engine(self) -> Engine:
        """What computes the gradients: forward and backward."""
        return self._engine

    @property
    def run_dir(self) -> Path | None:
        """Where checkpoints and metrics go, or None."""
        return self._directory.path if self._directory else None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every row is trained on once."""
        return self.batches.steps_per_epoch

    @property
    def stopped_early(self) -> bool:
        """Whether `patience` evaluations have passed without improvement."""
        return self.patience.at_end

    @property
    def done(self) -> bool:
        """Whether the run has taken all its steps or was stopped early."""
        return self.stopped_early or self.step_count >= self.total_steps

    @property
    def state(self) -> str:
        """"ready" before the first step, "running", "paused", "done", "stopped early", or "failed" after an error."""
        if self._loops:
            return "running"
        if self._failed or torn_reason(self):
            return "failed"
        if self.done:
            return "stopped early" if self.stopped_early else "done"
        return "paused" if self.step_count or self.interrupted else "ready"

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        """Within the block the state is "running"; an error that leaves it makes it "failed"."""
        self._loops, self._failed = self._loops + 1, False
        try:
            yield
        except Exception:
            self._failed = True
            raise
        finally:
            self._loops -= 1

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self) -> StepReport:
        """One optimizer step: forward, backward, update. Nothing is evaluated or saved here.

        An interrupt that arrives meanwhile is raised when the step is whole.

        Raises:
            NonFiniteError: loss or gradient is NaN or inf; weights, optimizer and data position are as before.
            TornStepError: it failed when a part of the weights had been updated, now or before; go back to a snapshot or checkpoint.
        """
        with self._under_way(), interrupts_deferred():
            check_whole(self)
            if self.step_count == 0 and self._directory and not self._directory.checkpoints():
                self.save()  # a run can always go back to where it began
            started = time.perf_counter()
            mx.reset_peak_memory()
            batches = self.batches.of_step(self.step_count)
            rate = self.learning_rate
            try:
                limit = self.config.max_grad_norm
                result = take_step(self.lm.model, self._engine, self._optimizers, self.step_count + 1, batches, rate, limit)
            except BaseException as error:
                step_failed(self, error)
                raise
            self.step_count += 1
            report = self._report(result.loss, result.grad_norm, rate, sum(batch.num_tokens for batch in batches), started)
            self.record(report)
        return report

    def _report(self, loss: float, norm: float, rate: float, tokens: int, started: float) -> StepReport:
        seconds = time.perf_counter() - started
        return StepReport(
            step=self.step_count,
            epoch=self.step_count / self.batches.steps_per_epoch,
            loss=loss,
            tokens=tokens,
            learning_rate=rate,
            grad_norm=norm,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            peak_memory=mx.get_peak_memory(),
            active_memory=mx.get_active_memory(),
            cache_memory=mx.get_cache_memory(),
        )

    def batch_at(self, step: int) -> list[Example]:
        """The rows that step `step` trains on; counted as in its report (from 1), steps to come too."""
        return self.batches.examples_of(step)

    # -- many steps -----------------------------------------------------------------------------------------------

    def steps(self, n: int | None = None) -> Iterator[StepReport]:
        """Yields after every step, to the end of the run or for `n` more; leaving the loop is a pause.

        Evaluates and saves when due, before the step's report is handed out.
        """
        target = self._target(n)
        check_whole(self)
        with self._under_way():
            if self.step_count or not self.done:
                self._upkeep.do()  # what an interrupt kept from being done after the last step
            while self.step_count < target and not self.stopped_early:
                report = self.step()
                self._upkeep.do()
                yield report

    def _target(self, n: int | None) -> int:
        """The step count at which `n` more steps end."""
        return self.total_steps if n is None else min(self.total_steps, self.step_count + n)

    def run(self, n: int | None = None, callbacks: Sequence[Any] = ()) -> None:
        """Trains to the end of the run, or `n` more steps; returns at once when the run is done.

        An interrupt (Ctrl-C, the notebook's stop button) pauses at the end of the step and saves: `interrupted` is True then, and
        `run()` goes on from there. A second one stops at once: then the last checkpoint is what is whole. SIGTERM pauses and
        saves too, before it takes effect.

        Args:
            n: steps; None for all that are left.
            callbacks: objects with any of `on_step(trainer, report)`, `on_eval(trainer, report)`, `on_save(trainer, path)`,
                `on_event(trainer, event)`; also `on_start(trainer, target)`, with the step count at which this call will end, and
                `on_end(trainer)`, which comes after an error too.

        Raises:
            NonFiniteError: see `step`.
            CheckpointError: something cannot be written, and `config.on_save_error` is "stop".
            KeyboardInterrupt: a second interrupt.
        """
        self.interrupted = False
        before, self._callbacks = self._callbacks, (*callbacks, *(make() for make in default_callbacks))
        with termination_pauses():
            try:
                self.tell("on_start", self._target(n))
                for _ in self.steps(n):
                    pass
            except StoppedAtOnce:
                raise
            except KeyboardInterrupt:
                self.interrupted = True
                self.event("pause", f"interrupted; paused after step {self.step_count} of {self.total_steps}")
                self._upkeep.save_unless_saved()
            finally:
                try:
                    self.tell("on_end")
                finally:
                    self._callbacks = before

    # -- evaluation, learning rate, saving ------------------------------------------------------------------------

    def evaluate(self, split: str = "valid", batches: int | None = None) -> EvalReport:
        """Loss and perplexity over a split, every trained token counting the same.

        Args:
            split: `"train"`, `"valid"` or `"test"`.
            batches: at most so many batches of `config.batch_size` rows; None for the whole split.

        Raises:
            DataError: there is no such split.
        """
        report = evaluate_split(self.lm.model, self.data, split, self.step_count, self.config.batch_size, batches)
        self.record(report)
        self._upkeep.evaluated()
        return report

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self._rate.at(self.step_count)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Makes this the rate of the next step; the schedule goes on from there, scaled alike. Recorded as an event.

        Raises:
            ConfigError: not a positive number, or the schedule has come to zero, which nothing can scale.
        """
        before = self.learning_rate
        self._rate.set(self.step_count, learning_rate)
        self.event("learning_rate", f"learning rate changed from {before:.6g} to {learning_rate:.6g}")

    def save(self) -> Path:
        """Writes a checkpoint into `run_dir/checkpoints` and returns its folder.

        Raises:
            TrainingError: the trainer has no `run_dir`.
            CheckpointError: it cannot be written; earlier ones are untouched.
        """
        if self._directory is None:
            raise TrainingError("This trainer has no run_dir, so there is nowhere to save. Make it with Trainer(..., run_dir='runs/a').")
        check_whole(self)
        path = self._directory.save_checkpoint(self.lm, self._optimizers.state_arrays(), state_of(self), self.config.keep)
        self._upkeep.saved_step = self.step_count
        self.tell("on_save", path)
        return path

    # -- telling --------------------------------------------------------------------------------------------------

    def record(self, report: StepReport | EvalReport | Event) -> None:
        """Adds an entry to the history and to the run's folder, and tells callbacks and listeners."""
        self.history.append(report)
        if self._directory is not None:
            try:
                self._directory.append(report)
                self._metrics_fail = False
            except CheckpointError as error:
                if self.config.on_save_error == "stop" or not self._directory.is_ours:
                    raise
                if not self._metrics_fail:  # one event tells that nothing can be written
                    self._metrics_fail = True
                    self.event("save_failed", str(error))
        self.tell(_METHODS[type(report)], report)

    def event(self, kind: str, message: str) -> None:
        """Records that something happened now."""
        self.record(Event(self.step_count, kind, message, time.time()))

    def tell(self, method: str, *subject: Any) -> None:
        """Calls `method(trainer, *subject)` on every callback of the run and every listener that has it."""
        for callback in (*self._callbacks, *self.listeners):
            if (function := getattr(callback, method, None)) is not None:
                function(self, *subject)

    def _write_into(self, directory: RunDirectory) -> None:
        """Writes into a directory from now on, and what there is already first."""
        self._directory = directory
        for entry in self.history:
            directory.append(entry)
        for note in directory.notes:
            self.event("run_dir", note)

    def __repr__(self) -> str:
        return f"Trainer(step {self.step_count} of {self.total_steps}, {self.lm!r}, run_dir={self.run_dir and str(self.run_dir)!r})"

    def _repr_html_(self) -> str:
        return trainer_html(self)
