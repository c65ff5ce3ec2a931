"""The trainer: one optimizer step at a time, whole after each, resumable from any checkpoint.

Randomness is a function of the seed and the position (epoch, step): nothing has to be remembered but where the run stands.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from fulltune_nb.data.batching import Batch
from fulltune_nb.data.dataset import DataSet
from fulltune_nb.errors import DataError, NonFiniteError, TrainingError
from fulltune_nb.html import facts
from fulltune_nb.language_model import LanguageModel
from fulltune_nb.models.names import to_hf
from fulltune_nb.training.allocator import cap_cache
from fulltune_nb.training.backward import clip_scale, global_norm, step_gradients
from fulltune_nb.training.callbacks import default_callbacks
from fulltune_nb.training.config import TrainConfig, check_agreement
from fulltune_nb.training.evaluate import evaluate_loss
from fulltune_nb.training.history import EvalReport, History, StepReport
from fulltune_nb.training.interrupts import interrupts_deferred
from fulltune_nb.training.journal import Journal
from fulltune_nb.training.model_card import ModelCard
from fulltune_nb.training.optimizers import Optimizers
from fulltune_nb.training.patience import Patience
from fulltune_nb.training.run_directory import RunDirectory, restore
from fulltune_nb.training.schedule import LearningRate, make_schedule
from fulltune_nb.training.selection import select_trainable
from fulltune_nb.training.step_batches import StepBatches


class Trainer:
    """Trains every weight of a model, one whole step at a time.

    Attributes:
        lm: the language model; its weights change in place.
        data: the data set; `data.train` is trained on.
        config: the settings.
        step_count: optimizer steps taken.
        total_steps: steps of the whole run.
        interrupted: whether the last `run` was ended by an interrupt.
    """

    def __init__(self, lm: LanguageModel, data: DataSet, config: TrainConfig | None = None, run_dir: str | os.PathLike | None = None):
        """
        Args:
            lm: a model in float32, or in bfloat16, which is turned into float32 here.
            data: needs a train split; its settings must agree with the config's.
            config: the settings; the defaults where left out.
            run_dir: a new folder for checkpoints and metrics; None writes nothing.

        Raises:
            ConfigError: settings that disagree with the data's, or patterns that match nothing.
            DataError: no train split.
            CheckpointError: `run_dir` already holds a run.
        """
        self._set_up(lm, data, config or TrainConfig())
        if run_dir is not None:
            self._journal.directory = RunDirectory.create(run_dir, self.config)

    @classmethod
    def resume(
        cls, run_dir: str | os.PathLike, lm: LanguageModel | None = None, data: DataSet | None = None, force: bool = False
    ) -> Trainer:
        """The run of a folder, at its newest whole checkpoint; it goes on bit for bit as if it had never stopped.

        Args:
            run_dir: the folder given to the `Trainer` that began the run.
            lm: takes the checkpoint's weights; loaded from the checkpoint where left out.
            data: the same data; loaded from its folder where left out. Data that was in memory must be passed again.
            force: go on even though the data differs from what the run began with.

        Raises:
            CheckpointError: no whole checkpoint, or data that differs (unless forced).
        """
        trainer = cls.__new__(cls)
        restored = restore(Path(run_dir).expanduser(), lm, data, force)
        trainer._set_up(restored.lm, restored.data, restored.config)
        trainer._journal.directory = restored.directory
        trainer._load_state(restored.state, restored.optimizer_arrays)
        for message in restored.notes:
            trainer._event("resume", message)
        trainer._event("resume", f"resumed at step {trainer.step_count} from {restored.folder}")
        return trainer

    def _set_up(self, lm: LanguageModel, data: DataSet, config: TrainConfig) -> None:
        if data.train is None:
            raise DataError("Training needs a train split; this data has none. Add train.jsonl (or the key 'train').")
        check_agreement(data.settings, config)
        self.lm, self.data, self.config = lm, data, config
        self.interrupted, self.step_count, self._journal = False, 0, Journal(self)
        lm.card = ModelCard(lm.source, data, config, self.history)
        self._patience = Patience(config.patience)
        self._batches = StepBatches(data.train, config)
        self.total_steps = config.total_steps(self._batches.steps_per_epoch)
        self._rate = LearningRate(make_schedule(config, self.total_steps))
        cap_cache()
        if lm.dtype != "float32":
            self._event("dtype", f"weights were {lm.dtype} and are trained in float32: bfloat16 would lose small updates")
            lm.model.set_dtype(mx.float32)
            mx.eval(lm.model.parameters())
        select_trainable(lm.model, config.train_only, config.freeze)
        self._optimizers = Optimizers(lm.model, config, lambda name: to_hf(name, lm.config.family))

    @property
    def history(self) -> History:
        """Every report and event so far, oldest first."""
        return self._journal.history

    @property
    def journal(self) -> Journal:
        """Where reports and events go; its `listeners` are told of each, whoever takes the steps."""
        return self._journal

    @property
    def _directory(self) -> RunDirectory | None:
        return self._journal.directory

    @property
    def run_dir(self) -> Path | None:
        """Where checkpoints and metrics go, or None."""
        return self._directory.path if self._directory else None

    @property
    def stopped_early(self) -> bool:
        """Whether `patience` evaluations have passed without improvement."""
        return self._patience.at_end

    @property
    def done(self) -> bool:
        """Whether the run has taken all its steps or was stopped early."""
        return self.stopped_early or self.step_count >= self.total_steps

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self) -> StepReport:
        """One optimizer step: forward, backward, update. Nothing is evaluated or saved here.

        An interrupt that arrives meanwhile is raised when the step is whole.

        Raises:
            NonFiniteError: loss or gradient is NaN or inf; weights, optimizer and data position are as before.
        """
        with interrupts_deferred():
            if self.step_count == 0 and self._directory and not self._directory.checkpoints():
                self.save()  # a run can always go back to where it began
            started = time.perf_counter()
            mx.reset_peak_memory()
            batches = self._batches.of_step(self.step_count)
            loss, gradients = step_gradients(self.lm.model, batches, self.config.grad_checkpoint)
            mx.eval(loss, gradients)  # before the norm: in one graph with it, grad_checkpoint's peak doubles
            norm = global_norm(gradients)
            self._check_finite(loss.item(), norm.item(), batches)
            rate = self.learning_rate
            self._optimizers.update(self.lm.model, gradients, rate, clip_scale(norm.item(), self.config.max_grad_norm))
            del gradients
            self.step_count += 1
            report = self._report(loss.item(), norm.item(), rate, sum(batch.num_tokens for batch in batches), started)
            self._journal.record(report)
        return report

    def _check_finite(self, loss: float, norm: float, batches: Sequence[Batch]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        rows = ", ".join(source for batch in batches for source in batch.sources)
        raise NonFiniteError(
            f"step {self.step_count + 1}: the loss is {loss} and the gradient's norm {norm}; nothing was updated. The batch's rows: {rows}."
            " Look at these rows, lower the learning rate, or set max_grad_norm."
        )

    def _report(self, loss: float, norm: float, rate: float, tokens: int, started: float) -> StepReport:
        seconds = time.perf_counter() - started
        return StepReport(
            step=self.step_count,
            epoch=self.step_count / self._batches.steps_per_epoch,
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

    # -- many steps -----------------------------------------------------------------------------------------------

    def steps(self, n: int | None = None) -> Iterator[StepReport]:
        """Yields after every step, to the end of the run or for `n` more; leaving the loop is a pause.

        Evaluates and saves when due, before the step's report is handed out.
        """
        target = self._target(n)
        if self.step_count == 0 and not self.done:
            self._evaluate_valid()
        while self.step_count < target and not self.stopped_early:
            report = self.step()
            self._evaluate_and_save_when_due()
            yield report

    def _target(self, n: int | None) -> int:
        """The step count at which `n` more steps end."""
        return self.total_steps if n is None else min(self.total_steps, self.step_count + n)

    def run(self, n: int | None = None, callbacks: Sequence[Any] = ()) -> None:
        """Trains to the end of the run, or `n` more steps; returns at once when the run is done.

        An interrupt (Ctrl-C, the notebook's stop button) pauses at the end of the step: `interrupted` is True then, and
        `run()` goes on from there.

        Args:
            n: steps; None for all that are left.
            callbacks: objects with any of `on_step(trainer, report)`, `on_eval(trainer, report)`, `on_save(trainer, path)`,
                `on_event(trainer, event)`; also `on_start(trainer, target)`, with the step count at which this call will end, and
                `on_end(trainer)`, which comes after an error too.

        Raises:
            NonFiniteError: see `step`.
        """
        self.interrupted = False
        with self._journal.calling([*callbacks, *(make() for make in default_callbacks)]):
            self._journal.tell("on_start", self._target(n))
            try:
                for _ in self.steps(n):
                    pass
            except KeyboardInterrupt:
                self.interrupted = True
                self._event("pause", f"interrupted; paused after step {self.step_count} of {self.total_steps}")
                if self._directory:
                    self.save()
            finally:
                self._journal.tell("on_end")

    def _evaluate_and_save_when_due(self) -> None:
        at_end = self.step_count == self.total_steps
        if at_end or self.step_count % self.config.steps_per_eval == 0:
            self._evaluate_valid()
        if self._directory and (at_end or self.stopped_early or self.step_count % self.config.save_every == 0):
            self.save()

    def _evaluate_valid(self) -> None:
        """The validation that is due, once a step; keeps the best weights and counts towards `patience`."""
        if self.data.valid is None or self.config.val_batches == 0 or self._patience.last_step == self.step_count:
            return
        loss = self.evaluate("valid", None if self.config.val_batches < 0 else self.config.val_batches).loss
        if self._patience.improved(self.step_count, loss):
            if self._directory and self.step_count:
                self._directory.save_best(self.lm)
        elif self.stopped_early:
            best, waited = self._patience.best_loss, self._patience.waited
            self._event("early_stop", f"no better validation loss than {best:.4f} in {waited} evaluations")

    # -- evaluation, learning rate, saving ------------------------------------------------------------------------

    def evaluate(self, split: str = "valid", batches: int | None = None) -> EvalReport:
        """Loss and perplexity over a split, every trained token counting the same.

        Args:
            split: `"train"`, `"valid"` or `"test"`.
            batches: at most so many batches of `config.batch_size` rows; None for the whole split.

        Raises:
            DataError: there is no such split.
        """
        if split not in ("train", "valid", "test") or getattr(self.data, split) is None:
            there = [name for name in ("train", "valid", "test") if getattr(self.data, name) is not None]
            raise DataError(f"No split {split!r} in this data; there are {', '.join(there)}.")
        started = time.perf_counter()
        loss, tokens = evaluate_loss(self.lm.model, getattr(self.data, split), self.config.batch_size, batches)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        report = EvalReport(split, self.step_count, loss, perplexity, tokens, time.perf_counter() - started)
        self._journal.record(report)
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
        self._event("learning_rate", f"learning rate changed from {before:.6g} to {learning_rate:.6g}")

    def save(self) -> Path:
        """Writes a checkpoint into `run_dir/checkpoints` and returns its folder.

        Raises:
            TrainingError: the trainer has no `run_dir`.
            CheckpointError: it cannot be written; earlier ones are untouched.
        """
        if self._directory is None:
            raise TrainingError("This trainer has no run_dir, so there is nowhere to save. Make it with Trainer(..., run_dir='runs/a').")
        path = self._directory.save_checkpoint(self.lm, self._optimizers.state_arrays(), self._state(), self.config.keep)
        self._journal.tell("on_save", path)
        return path

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step_count,
            "rate_factor": self._rate.factor,
            "patience": self._patience.to_dict(),
            "config": self.config.to_dict(),
            "model_source": self.lm.source,
            "data": {"source": self.data.source, "fingerprint": self.data.fingerprint},
            "history": self.history.to_jsonable(),
        }

    def _load_state(self, state: dict[str, Any], optimizer_arrays: dict[str, mx.array]) -> None:
        self._journal.history[:] = History.from_jsonable(state["history"])
        self.step_count = state["step"]
        self._rate.factor = state["rate_factor"]
        self._patience.load(state["patience"])
        self._optimizers.load_state_arrays(optimizer_arrays)
        self._directory.rewrite_metrics(self.history)

    def _event(self, kind: str, message: str) -> None:
        self._journal.event(self.step_count, kind, message)

    def __repr__(self) -> str:
        where = str(self.run_dir) if self.run_dir else None
        return f"Trainer(step {self.step_count} of {self.total_steps}, {self.lm!r}, run_dir={where!r})"

    def _repr_html_(self) -> str:
        last = self.history.steps[-1].loss if self.history.steps else None
        return facts(
            "Trainer",
            [
                ("step", f"{self.step_count:,} of {self.total_steps:,}"),
                ("epoch", f"{self.step_count / self._batches.steps_per_epoch:.2f} ({self._batches.steps_per_epoch:,} steps each)"),
                ("last loss", "none yet" if last is None else f"{last:.4f}"),
                ("next learning rate", f"{self.learning_rate:.3g}"),
                ("optimizer", self.config.optimizer),
                ("run_dir", self.run_dir or "none: nothing is written"),
            ],
        )
