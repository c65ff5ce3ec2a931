"""The loop: one optimizer step at a time, whole after each, with evaluations and checkpoints when they are due.

Randomness is a function of the seed and the position (epoch, step): nothing has to be remembered but where the run stands.
"""

from __future__ import annotations

import functools
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import mlx.core as mx

from fulltune_nb.cpu import cap_cache, on_cpu
from fulltune_nb.data.batches import Batch
from fulltune_nb.data.dataset import DataSet, load_data
from fulltune_nb.data.example import Example
from fulltune_nb.device import memory_limits
from fulltune_nb.errors import (
    IN_EVALUATION,
    IN_TRAINING,
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    FulltuneError,
    TornStepError,
    TrainingError,
    device_errors,
)
from fulltune_nb.files import absolute
from fulltune_nb.html import cut, facts, printable
from fulltune_nb.models.language_model import LanguageModel, load_model
from fulltune_nb.models.parameters import Arrays, parameters_of, put_parameters, select_trainable, swapped_in, trainable_of
from fulltune_nb.training.callbacks import default_callbacks
from fulltune_nb.training.card import ModelCard
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.gradients import clip_scale
from fulltune_nb.training.history import EvalReport, Event, History, StepReport
from fulltune_nb.training.lock import have_holder_save
from fulltune_nb.training.loss import evaluate_split
from fulltune_nb.training.objective import Loss, name_of
from fulltune_nb.training.parallel import Ranks, ranks_of_environment
from fulltune_nb.training.plan import make_plan
from fulltune_nb.training.rank_channel import Abandoned
from fulltune_nb.training.run import (
    RunDirectory,
    StoredRun,
    best_is_older_than,
    best_weights,
    check_holds_no_run,
    check_long_enough,
    check_same_data,
    holds_run,
)
from fulltune_nb.training.schedule import NEXT, PEAK, LearningRate, RateSet, peak_of
from fulltune_nb.training.signals import StoppedAtOnce, interrupts_deferred, interrupts_passed_on, termination_pauses
from fulltune_nb.training.state import (
    Patience,
    Snapshot,
    TrainerState,
    checkpoint_name,
    copied,
    copy_of,
    other_arithmetic,
    random_state,
    read_checkpoint,
    set_random_state,
    versions,
)
from fulltune_nb.training.together import Together

_METHODS = {StepReport: "on_step", EvalReport: "on_eval", Event: "on_event"}
_TELL_SECONDS = 0.25  # how often callbacks hear how far an evaluation is
_NEW_SCHEDULE = {"learning_rate", "lr_schedule", "warmup", "lr_floor", "lr_decay"}
_NEW_OPTIMIZER = {"optimizer", "optimizer_config", "train_only", "freeze", "ema_decay"}


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _on_all_ranks(method: _Method) -> _Method:
    """A call in which rank 0 leads. On the others it does what rank 0 says meanwhile, and gives None."""

    @functools.wraps(method)
    def call(self: Trainer, *args: Any, **settings: Any) -> Any:
        if self._followed():
            return None
        with self._leading():
            return method(self, *args, **settings)

    return cast(_Method, call)


class Trainer:
    """Trains every weight of a model, one whole step at a time.

    Attributes:
        lm: the language model; its weights change in place.
        data: the data set; `data.train` is trained on.
        config: the settings.
        loss: what is minimized in place of the cross-entropy, or None.
        run_dir: where checkpoints and metrics go, or None.
        history: every report and event so far, oldest first.
        listeners: callbacks that are told of every report and event for as long as they stand here, in `run` and outside.
        batches: the micro-batches of every step.
        engine: computes the gradients.
        optimizers: updates the weights; its `observers` see each tensor's update.
        backward: "whole" or "layerwise": how gradients are computed, from `config.memory` and `config.backward`.
        step_count: optimizer steps taken.
        total_steps: steps of the whole run.
        patience: the count of validation losses.
        optimizer_steps_before: steps taken before the optimizer was begun anew, in a fork with another one.
        interrupted: whether the last `run` was ended by an interrupt.
        pausing: whether the run under way is to end after its step; see `pause`.
        doing: what is done beside steps at this moment, such as "evaluating valid 12 of 50" (batches) or "saving"; "" for nothing.
        failure: why the state is "failed", in a line; "" where it is not.
        loaded_best: the step whose weights the model has been given at the end of the run, with `load_best`; None: it has the last ones.
    """

    def __init__(
        self,
        lm: LanguageModel,
        data: DataSet,
        config: TrainConfig | None = None,
        run_dir: str | os.PathLike | None = None,
        force: bool = False,
        resume: str | StoredRun | None = None,
        parallel: Ranks | bool | None = None,
        loss: Loss | None = None,
    ):
        """
        Args:
            lm: the model; its weights take the dtype that `config.weights` asks for.
            data: needs a train split; its settings must agree with the config's.
            config: the settings; the defaults where left out.
            run_dir: a new folder for checkpoints and metrics, locked while this trainer lives; None writes nothing.
            force: go on even where `preflight` says that the run does not fit into this machine's memory; with `resume`, even
                though data, model or settings differ from what the run began with.
            resume: "auto" goes on with the run that `run_dir` holds, from its newest checkpoint, and begins it where there is none. A
                trainer of this process that has the run saves first, so that none of its steps are lost when a cell is run again.
            parallel: the processes that train together, from `ft.launch`; None: those that this one was started among (by `mlx.launch`);
                False: this one alone. Rank 0 leads: settings, weights and `run_dir` are its own; on the others every call does what
                rank 0 does in the same call, and nothing is shown or written.
            loss: in place of the cross-entropy: a function of a `LossInput`, the log-probabilities of a micro-batch's trained tokens, that
                gives its share of the step's loss as an `mx.array` number. A run that goes on needs it again.

        Raises:
            ConfigError: settings that disagree with the data's, or patterns that match nothing.
            DataError: no train split.
            MemoryLimitError: the run does not fit; the message says what would make it fit.
            CheckpointError: `run_dir` already holds a run (with `resume`: another one than this), or lies in the source model's folder.
        """
        if data.train is None:
            raise DataError("Training needs a train split; this data has none. Add train.jsonl (or the key 'train').")
        config = (config or TrainConfig()).for_data(data.settings)
        if resume not in (None, "auto") and not isinstance(resume, StoredRun):
            raise ConfigError(f'resume: expected "auto" or None, got {resume!r:.80}. Trainer.resume(run_dir) goes on with a run.')
        run_dir = None if run_dir is None else absolute(run_dir)
        self._together, self.loss = Together((ranks_of_environment() if parallel is None else parallel) or None), loss
        if self._together.follows:
            self._join(lm, data)
        elif isinstance(resume, StoredRun):
            self._begin(lm, data, config, force, resume)
        elif resume == "auto" and run_dir is not None and holds_run(run_dir):
            have_holder_save(run_dir)
            with StoredRun(run_dir, force) as stored:
                config, lm = stored.config(stored.of_its_day(config, data)), stored.model(lm)
                self._begin(lm, stored.data(data, lm, config), config, force, stored)
            stored.directory.write_config(config)
        else:
            if run_dir is not None:
                check_holds_no_run(run_dir)
            self._begin(lm, data, config, force, run_dir=run_dir)

    @classmethod
    def resume(
        cls,
        run_dir: str | os.PathLike,
        lm: LanguageModel | None = None,
        data: DataSet | str | os.PathLike | None = None,
        force: bool = False,
        loss: Loss | None = None,
    ) -> Trainer:
        """The run of a folder, at its newest whole checkpoint; it goes on bit for bit as if it had never stopped.

        Args:
            run_dir: the folder given to the `Trainer` that began the run.
            lm: takes the checkpoint's weights; loaded from the checkpoint where left out.
            data: the same data, or the folder where it is now; loaded from its old folder where left out. Data that was in
                memory must be passed again.
            force: go on even though data, model or `config.yaml` differ from what the run began with.
            loss: the one that the run was trained with, where it had one of its own.

        Raises:
            CheckpointError: no whole checkpoint, a process that has the run in its hands, or (unless forced) a difference in data,
                model or settings that matters.
        """
        if (ranks := ranks_of_environment()) is not None and ranks.rank:
            return cls._joined_run(ranks, lm, data, loss)
        with StoredRun(run_dir, force) as stored:
            config = stored.config()
            lm = stored.model(lm)
            return cls(lm, stored.data(data, lm, config), config, force=force, resume=stored, loss=loss)

    def _begin(
        self,
        lm: LanguageModel,
        data: DataSet,
        config: TrainConfig,
        force: bool,
        stored: StoredRun | None = None,
        run_dir: Path | None = None,
        backward: str | None = None,
    ) -> None:
        """At step 0, or where a stored run stands. What may be refused comes first: a living trainer may be training the model."""
        self.lm, self.data, self.config = lm, data, config
        self.history, self.listeners, self.patience = History(), [], Patience(config.patience)
        self.step_count = self.optimizer_steps_before = 0
        self.interrupted = self.pausing = False
        self.doing = self.failure = ""
        self._directory: RunDirectory | None = None
        self._callbacks: tuple[Any, ...] = ()
        self._loops_open = 0
        self._told_failures: set[str] = set()
        self._forget_what_is_written()
        if stored is not None:
            stored.check_loss(self.loss)
            stored.put_weights(lm, data, config)
        size = 1 if self.ranks is None else self.ranks.size
        plan = make_plan(lm, data, config, force, backward or (stored and stored.backward(config)), self.loss, size)
        of_ranks = self._together.begin(lm, data, config, self.loss, plan.backward, stored and str(stored.checkpoint))
        directory = None if run_dir is None else RunDirectory.create(run_dir, config, lm.source)
        if not self._together.follows:
            self._tell_what_is_trained([*of_ranks, *plan.notes], resumed=stored is not None)
        self.batches, self.total_steps, self.backward = plan.batches, plan.total_steps, plan.backward
        schedule = config.schedule(self.total_steps)
        self._rate = LearningRate(schedule, peak_of(config.lr_schedule, config.learning_rate, schedule, self.total_steps))
        if plan.dtype != lm.model.embed_tokens.weight.dtype:
            lm.model.set_dtype(plan.dtype)
            mx.eval(lm.model.parameters())
        select_trainable(lm.model, config.train_only, config.freeze)
        self._trained_as = lm.trained_as = frozenset(trainable_of(lm.model)), plan.dtype
        cap_cache(plan.gives_back)
        self._memory_plan = plan.memory
        self.optimizers, self._vocab_size = self._together.optimizers(lm.model, config), lm.config.vocab_size
        self.engine = plan.make_engine(lm.model, self.optimizers.in_stacks, self.ranks)
        if stored is not None:
            self._go_on_with(stored)
        else:
            self._together.share_state(lm.model, self.step_count, self.history)
            if directory is not None:
                self._write_into(directory)

    def _tell_what_is_trained(self, notes: Iterable[tuple[str, str]], resumed: bool) -> None:
        """To the model, what becomes of it, and to the history what there is to know; of a rank that neither saves nor shows, nothing."""
        lm, data = self.lm, self.data
        trained_before = lm.card.history.steps if lm.card is not None and not resumed else []
        lm.card = ModelCard(lm.source, data, self.config, self.history, lm.dequantized)
        ends, strings = data.trained_ends
        lm.add_ends(ends, strings)
        lm.trained_ends = () if strings else ends  # the first becomes the EOS of a tokenizer that is saved, which is one token
        for kind, message in (*(("data", note) for note in data.notes), *notes):
            self.event(kind, message)
        if trained_before:
            steps = f"{len(trained_before):,} step{'s' * (len(trained_before) > 1)}"
            self.event("model", f"this model was trained before, {steps} by an earlier trainer: the run begins with these weights")

    def _go_on_with(self, stored: StoredRun) -> None:
        self._hold(stored.directory)
        self._put_state(stored.state())
        stored.put_damaged_away()
        stored.directory.lock.keep()
        self._saved_step, self._rates_to_come = self.step_count, dict(stored.rates)
        self._best_is_due = bool(best := self._best_step) and best_is_older_than(best, stored.directory.path)
        for note in (*stored.notes, f"resumed at step {self.step_count} from {stored.checkpoint}"):
            self.event("resume", note)
        self._set_rate_to_come()

    # -- where it stands ------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """"ready" before the first step, "running", "paused", "done", "stopped early", or "failed" after an error."""
        return "running" if self._loops_open else self._ending

    @property
    def _ending(self) -> str:
        """The state of a run that takes no more steps now."""
        if self.failure or self._torn():
            return "failed"
        if self.done:
            return "stopped early" if self.stopped_early else "done"
        return "paused" if self.step_count or self.interrupted else "ready"

    @property
    def status(self) -> str:
        """What happens now, in words: `doing` or else `state`, and whether a pause is to come."""
        if self.pausing:
            return f"{self.doing}, then pausing" if self.doing else "pausing after this step"
        if self.state == "paused" and self.interrupted:
            return self.doing or "paused by an interrupt"
        return self.doing or self.state

    @contextmanager
    def now_doing(self, what: str) -> Iterator[None]:
        """Within the block `doing` is `what`; callbacks and listeners hear of both ends by `on_doing`."""
        before, self.doing = self.doing, what
        self.tell("on_doing")
        try:
            yield
        finally:
            self.doing = before
            self.tell("on_doing")

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

    def batch_at(self, step: int) -> list[Example]:
        """The rows that step `step` trains on; counted as in its report (from 1), steps to come too."""
        return self.batches.examples_of(step)

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self) -> StepReport:
        """One optimizer step: forward, backward, update. Nothing is evaluated or saved here.

        An interrupt that arrives meanwhile is raised when the step is whole.

        Raises:
            NonFiniteError: loss or gradient is NaN or inf; weights, optimizer and data position are as before.
            DeviceError: the device broke it off, for lack of memory (OutOfMemoryError) or as it took too long; all is as before.
            TornStepError: it failed when a part of the weights had been updated, now or before; go back to a snapshot or checkpoint.
            CheckpointError: the run's folder is gone or another's; or a report cannot be written.
        """
        if self._together.follows:
            return [*self._follow()][-1]
        with self._leading(), interrupts_deferred():
            with self._running():
                self._check_whole()
                self._check_has_last_weights()
                if self._directory and not self._directory.lock.is_ours:
                    self._directory.lock.check()  # before the update: the later trainer may be training this very model
                if self.step_count == 0 and self._directory and self._directory.last_checkpoint() is None:
                    self._try_to_write(self.save)  # a run can always go back to where it began
                started, rate = time.perf_counter(), self.learning_rate
                mx.reset_peak_memory()
                batches = self.batches.of_step(self.step_count)
                try:
                    with self._last_checkpoint_named(), device_errors(IN_TRAINING):
                        loss, norm = self._take_step(self.step_count + 1, batches, rate)
                except BaseException as error:
                    self._step_failed(error)
                    raise
                self.step_count += 1
                report = self._report(batches, loss, norm, rate, time.perf_counter() - started)
            self.record(report)  # a step that was taken by itself is over when it is told
            self._set_rate_to_come()
            if self._together.interrupted:
                raise KeyboardInterrupt
        return report

    def _report(self, batches: Sequence[Batch], loss: float, norm: float, rate: float, seconds: float) -> StepReport:
        """Of the step just taken."""
        tokens = sum(batch.num_tokens for batch in batches)
        return StepReport(
            step=self.step_count,
            epoch=self.step_count / self.steps_per_epoch,
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

    def _take_step(self, number: int, batches: Sequence[Batch], learning_rate: float) -> tuple[float, float]:
        """Forward, backward, clip and update of step `number`, counted from 1. Returns the loss, and the norm before clipping."""
        if self.lm.trained_as != self._trained_as:
            raise TrainingError(
                "A later trainer of this model trains other tensors of it (train_only, freeze) or has changed their dtype (weights): go on"
                " with that one, or make this one anew. Two trainers side by side need a model each: trainer.fork() copies it."
            )
        with self._together.doing("step", number=number, rate=learning_rate):
            return self._compute_step(number, batches, learning_rate)

    def _compute_step(self, number: int, batches: Sequence[Batch], learning_rate: float) -> tuple[float, float]:
        limit = self.config.max_grad_norm
        gradients = self.engine.gradients(number, batches)
        scale = 1.0 if limit is None else clip_scale(gradients.norm(), limit)
        self._together.agree(gradients.check_finite)
        self.lm.update_under_way = False  # the loss was computed from its weights
        self.optimizers.begin_step(learning_rate, scale)
        for piece in gradients.pieces(self.optimizers):  # one with all of them, or layer by layer
            self.optimizers.update_tensors(self.lm.model, piece.gradients, rows=piece.rows)
            self._together.exchange_weights(self.lm.model, self.optimizers.owners, piece.gradients, piece.rows)
            del piece  # before the next one is computed
        self.optimizers.take_average(self.lm.model)
        self.optimizers.end_step()
        self.lm.update_under_way = not on_cpu()
        return gradients.loss, gradients.norm()

    def _step_failed(self, error: BaseException) -> None:
        """The step in progress was left by `error`, which the caller raises again when this returns.

        Raises:
            TornStepError: `error`, its cause, came when a part of the weights had been updated. An interrupt stays one, and the next
                use of the trainer raises this.
        """
        self.optimizers.abandon_step()
        self.lm.torn = self._torn(error)
        if self.lm.torn and isinstance(error, Exception):
            raise TornStepError(self.lm.torn) from error

    def _check_whole(self) -> None:
        if self.lm.config.vocab_size != self._vocab_size:
            raise TrainingError(
                f"The model has {self.lm.config.vocab_size:,} token rows; it had {self._vocab_size:,} when this trainer was made, and the"
                " optimizer's state is for those. Load the data and make the trainer anew behind lm.add_tokens."
            )
        if reason := self._torn():
            raise TornStepError(self.lm.torn or reason)

    def _torn(self, error: BaseException | None = None) -> str | None:
        """Why the weights are of no use, where a step was broken off (by `error`) between its first and its last update."""
        if self.optimizers.step != self.step_count - self.optimizer_steps_before:
            what = f"Step {self.step_count + 1} was broken off in the middle of its update"
        elif self.lm.update_under_way and isinstance(error, DeviceError) and error.late:
            what = f"The GPU failed before the update of step {self.step_count} was known to be whole"
        else:
            return self.lm.torn if self.lm.update_under_way else None
        why = f", by {type(error).__name__}{f': {error}' if str(error) else ''}".rstrip(".") if error else ""
        back = f"Trainer.resume({str(self.run_dir)!r})" if self.run_dir else "trainer.restore(a snapshot), or a new trainer"
        return (
            f"{what}{why}. Some weights may be new and some old, so they are neither trained on, nor used, nor saved. What is on the disk"
            f" is whole: go on with {back}."
        )

    @contextmanager
    def _last_checkpoint_named(self) -> Iterator[None]:
        """Within the block a `DeviceError` says where the run can go on from."""
        try:
            yield
        except DeviceError as error:
            last = self._directory and self._directory.last_checkpoint()
            there = f"The last checkpoint is {last}." if last else "There is no checkpoint of this run."
            if there not in str(error):
                error.args = (f"{error} {there}",)
            raise

    @contextmanager
    def rehearsal(self, same_rows: bool = False) -> Iterator[Callable[[float], float]]:
        """A function that takes the next step with a learning rate and returns its loss; after the block all is as it was, bit for bit.

        With `same_rows` it takes the first of them again and again.
        The steps are the trainer's own, with its data, its optimizer and its way to get gradients, but they are in no history and
        move no schedule. Nothing is copied: while somebody holds the old arrays, updates are made in new memory. So the block needs
        memory for a second set of weights and optimizer state.
        """
        self._together.check_leads("A rehearsal")
        before, taken = self._take_state(), 0
        mx.eval(before.weights, before.optimizer_arrays)
        observers, self.optimizers.observers = self.optimizers.observers, []

        def step(learning_rate: float) -> float:
            nonlocal taken
            number, taken = self.step_count + taken * (not same_rows), taken + 1
            with device_errors(IN_TRAINING):
                return self._take_step(number + 1, self.batches.of_step(number), learning_rate)[0]

        try:
            yield step
        finally:
            self.optimizers.end_step()  # one that failed on the way
            self.optimizers.observers = observers
            self.optimizers.load_state_arrays(before.optimizer_arrays)
            put_parameters(self.lm.model, before.weights)
            self.lm.update_under_way = False
            set_random_state(before.random)
            # Last: it fails where a rank was lost.
            self._together.share_state(self.lm.model, self.step_count, self.history, before.optimizer_arrays)

    # -- many steps -----------------------------------------------------------------------------------------------

    def steps(self, n: int | None = None) -> Iterator[StepReport]:
        """Yields after every step, to the end of the run or for `n` more; leaving the loop is a pause.

        Evaluates and saves when due, before the step's report is handed out.
        """
        if self._together.follows:
            yield from self._follow()
            return
        target = self._target(n)
        self._check_whole()
        try:
            with self._leading(), self._running():
                self.pausing = False  # one that was asked for before is of another run
                self.tell("on_change")
                if self.step_count or not self.done:
                    self._evaluate_if_due()  # what an interrupt kept from being done after the last step
                    self._save_if_due()
                while self.step_count < target and not self.stopped_early and not self.pausing:
                    report = self.step()
                    self._evaluate_if_due()
                    self._save_if_due()
                    with self._together.in_program():
                        yield report
        finally:
            self.tell("on_change")  # however the loop was left

    def pause(self) -> None:
        """Ends the run under way, of `run` or `steps`, after its step and what is due then; for callbacks, and from any thread."""
        self.pausing = self.pausing or self._loops_open > 0

    def _target(self, n: int | None) -> int:
        """The step count at which `n` more steps end."""
        return self.total_steps if n is None else min(self.total_steps, self.step_count + n)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Within the block the state is "running", and MLX keeps the memory of a run; an error that leaves it makes it "failed"."""
        plan = self._memory_plan
        limits = nullcontext() if self._loops_open else memory_limits(plan.peak + plan.cache, plan.cache)
        self._loops_open, self.failure = self._loops_open + 1, ""
        try:
            with self._last_checkpoint_named(), device_errors(IN_TRAINING), limits:
                yield
        except Exception as error:
            self.failure = cut(printable(" ".join(f"{type(error).__name__}: {error}".split())))
            self.lm.torn = self.lm.torn or self._torn(error)  # the last update may be what failed
            raise
        finally:
            self._loops_open -= 1
            self.pausing = self.pausing and self._loops_open > 0

    def run(self, n: int | None = None, callbacks: Sequence[Any] = ()) -> None:
        """Trains to the end of the run, or `n` more steps; returns at once when the run is done.

        An interrupt (Ctrl-C, the notebook's stop button) pauses at the end of the step and saves: `interrupted` is True then, and
        `run()` goes on from there. A second one stops at once: then the last checkpoint is what is whole. SIGTERM and SIGHUP
        (a dropped connection) pause and save too, before they take effect.

        Args:
            n: steps; None for all that are left.
            callbacks: objects with any of `on_step(trainer, report)`, `on_eval(trainer, report)`, `on_save(trainer, path)`,
                `on_event(trainer, event)`; also `on_start(trainer, target)`, with the step count at which this call will end,
                `on_end(trainer)`, which comes after an error too, `on_change(trainer)`, when the state is another one, and
                `on_doing(trainer)`, when `trainer.doing` is.

        Raises:
            NonFiniteError: see `step`.
            CheckpointError: something cannot be written, and `config.on_save_error` is "stop".
            KeyboardInterrupt: a second interrupt.
        """
        self.interrupted = False
        if self._followed():
            return
        self._together.forget_interrupts()  # what came before is of another run
        before, self._callbacks = self._callbacks, (*callbacks, *(make() for make in default_callbacks))
        try:
            with self._leading(), termination_pauses():
                try:
                    self.tell("on_start", self._target(n))
                    for _ in self.steps(n):
                        pass
                except StoppedAtOnce:
                    raise
                except KeyboardInterrupt:
                    self.interrupted = True
                    self.event("pause", f"interrupted; paused after step {self.step_count} of {self.total_steps}")
                    self._save_unless_saved()
                finally:
                    self.tell("on_end")
        finally:
            self._callbacks = before

    # -- evaluation, learning rate --------------------------------------------------------------------------------

    def evaluate(self, split: str = "valid", batches: int | None = None) -> EvalReport:
        """Loss and perplexity over a split, every trained token counting the same.

        Args:
            split: `"train"`, `"valid"` or `"test"`.
            batches: at most so many batches of `config.batch_size` rows; None for the whole split.

        Raises:
            DataError: there is no such split.
        """
        if self._followed():
            return self.history.evals[-1]
        with self._leading():
            report = self._evaluated(split, batches)
        self._keep(report)
        self._tell_report(report)
        return report

    def _evaluated(self, split: str, batches: int | None, step: int | None = None, averaged: bool = False) -> EvalReport:
        """What `evaluate` records, of the moving average of the weights where there is one and that is asked for; `step`: on the other
        ranks, the one whose weights these are."""
        self.lm.check_whole()
        if step is None:
            step = self.step_count if self.loaded_best is None else self.loaded_best
        put_in = self._average_put_in() if averaged else nullcontext()
        with self.now_doing(f"evaluating {split}"), self._last_checkpoint_named(), device_errors(IN_EVALUATION), put_in:
            tell = partial(self._tell_evaluated, split, [time.monotonic()])
            if split in self.data.splits:
                about = {"split": split, "batches": batches, "step": step, "averaged": averaged or self._has_average}
                self._together.command("evaluate", **about)
            return evaluate_split(self.lm.model, self.data, split, step, self.config.batch_size, batches, tell, self.ranks)

    def _tell_report(self, report: EvalReport) -> None:
        self.tell(_METHODS[EvalReport], report)
        if self._result_step == self.step_count:
            self._write_result()  # such as a test after the end

    def _tell_evaluated(self, split: str, told: list[float], done: int, total: int) -> None:
        """So many batches of all are evaluated; `told` holds when callbacks last heard of it."""
        self.doing = f"evaluating {split} {done:,} of {total:,}"
        if not done or time.monotonic() - told[0] >= _TELL_SECONDS:
            told[0] = time.monotonic()
            self.tell("on_doing")

    def _evaluate_if_due(self) -> None:
        """Validation, once a step; keeps the best weights and counts towards `patience`."""
        config, patience, report, improved = self.config, self.patience, None, False
        due = self.step_count == self.total_steps or self.step_count % config.steps_per_eval == 0
        if due and patience.last_step != self.step_count and self.data.valid is not None and config.val_batches:
            report = self._evaluated("valid", None if config.val_batches < 0 else config.val_batches, averaged=True)
            with interrupts_deferred():  # else it would be recorded, but not counted, and done again by whoever goes on
                self._keep(report)
                improved = patience.improved(self.step_count, report.loss)
                self._best_is_due = self._best_is_due or (improved and self.step_count > 0)
            self._tell_report(report)
        with interrupts_deferred():
            if report is not None and not improved and self.stopped_early:
                message = f"no better validation loss than {patience.best_loss:.4f} in {patience.waited} evaluations"
                self.event("early_stop", message)
            self._write_best_if_due()

    def _write_best_if_due(self) -> None:
        """The best weights, while they are those of now; where they could not be written in time, an event says so."""
        if not self._best_is_due:
            return
        best = self._best_step
        if self.run_dir is None:
            self._best_is_due = False
            if self.config.load_best:
                with self._average_put_in():
                    self._best_kept = best, copied(parameters_of(self.lm.model))
        elif best == self.step_count:
            with self.now_doing("saving the best weights"), self._average_put_in():
                self._best_is_due = not self._try_to_write(partial(self._directory.save_best, self.lm, best))
        else:
            self._best_is_due = False
            there = self.run_dir / "checkpoints" / checkpoint_name(best)
            where = f" They are in {there}, while it is kept." if there.is_dir() else " They are kept nowhere."
            lost = f"best/ has not the weights of step {best}, whose validation loss is the lowest: they could not be written.{where}"
            self.event("save_failed", lost)

    def _load_best_if_due(self) -> None:
        """At the end of a run with `load_best`: the model gets the weights of the best validation. What cannot be had is told."""
        best = self._best_step
        if not self.config.load_best or best in (None, self.loaded_best) or (best == self.step_count and self.optimizers.average is None):
            return
        step, weights = self._best_kept if self._directory is None else (best, best_weights(self.run_dir, self.lm, best))
        if step != best or weights is None:
            why = "the model had before it was trained" if best == 0 else "are kept nowhere"
            stay = f"those of step {self.step_count} stay"
            self.event("load_best", f"the best validation loss is of step {best}, whose weights {why}: {stay}")
            return
        put_parameters(self.lm.model, weights)
        mx.eval(self.lm.model.parameters())
        self.loaded_best = best
        self._together.share_state(self.lm.model, self.step_count, self.history)
        last = self._directory and self._directory.last_checkpoint()
        where = f"; the last are in {last}" if last else ""
        self.event("load_best", f"the model has the weights of step {best}, the best validation{where}")

    def _average_put_in(self) -> AbstractContextManager[None]:
        """Within the block the model has the moving average of its weights, in their dtype, where there is one."""
        if self.optimizers.average is None:
            return nullcontext()
        average, dtype = self.optimizers.average.arrays, self.lm.model.embed_tokens.weight.dtype
        arrays = {name: array.astype(dtype) for name, array in average.items()}
        mx.eval(arrays)
        return swapped_in(self.lm.model, arrays)

    @contextmanager
    def averaged(self) -> Iterator[LanguageModel]:
        """Within the block the model has the moving average of its weights: for evaluations and answers, and to save it by `lm.save`.

        Raises:
            ConfigError: the run keeps none (`ema_decay`).
            TrainingError: in the block, steps and checkpoints; and where the model has the best weights (`load_best`).
        """
        if self.optimizers.average is None:
            raise ConfigError("This run keeps no average of its weights: it begins with TrainConfig(ema_decay=0.999) or the like.")
        self._together.check_leads("The average")
        self._check_whole()
        self._check_has_last_weights()
        with self._average_put_in():
            self._has_average = True
            try:
                yield self.lm
            finally:
                self._has_average = False

    def _check_not_averaged(self) -> None:
        if self._has_average:
            raise TrainingError("The model has the average of its weights now: leave the block of trainer.averaged() first.")

    def _check_has_last_weights(self) -> None:
        self._check_not_averaged()
        if self.loaded_best is not None:
            raise TrainingError(
                f"The model has the best weights now, those of step {self.loaded_best} (load_best), and optimizer and data stand at step"
                f" {self.step_count}. trainer.restore(the last checkpoint) goes back to that; a new Trainer begins with the best."
            )

    @property
    def _best_step(self) -> int | None:
        """The step of the best validation, None before the first."""
        loss = self.patience.best_loss
        return next((report.step for report in self.history.evals if report.split == "valid" and report.loss == loss), None)

    @property
    def learning_rate(self) -> float:
        """The rate of the next step, which is reported as `step_count + 1`."""
        return self._rate.at(self.step_count)

    @property
    def peak_learning_rate(self) -> float:
        """The highest rate of the schedule: `config.learning_rate` until another is set, of mlx_lm's form the highest of its run."""
        return self._rate.peak

    def set_learning_rate(self, learning_rate: float) -> None:
        """Makes this the peak of the schedule, as if the config had said it: steps to come keep their share of it. Recorded as an event.

        In a warm-up, and where the schedule decays, the next step's rate is lower; `set_next_learning_rate` sets that.

        Raises:
            ConfigError: not a finite positive number, or the schedule is zero throughout, which nothing can scale.
        """
        self._set_rate(PEAK, learning_rate)
        self._rates_to_come = {}

    def set_next_learning_rate(self, learning_rate: float) -> None:
        """Makes this the rate of the next step; the schedule goes on from there, scaled alike. Recorded as an event.

        In a warm-up the peak then is higher: with `warmup=20`, 1e-3 for the first step has the peak at 2.1e-2.

        Raises:
            ConfigError: not a finite positive number, or the schedule has come to zero, which nothing can scale.
        """
        self._set_rate(NEXT, learning_rate)
        self._rates_to_come = {}

    def _set_rate(self, what: str, learning_rate: float, why: str = "") -> None:
        before = self.peak_learning_rate if what == PEAK else self.learning_rate
        if what == PEAK:
            self._rate.set_peak(learning_rate)
        else:
            self._rate.set(self.step_count, learning_rate)
        self._saved_step = -1  # the checkpoint of this step has another rate
        self.event("learning_rate", f"{what} changed from {before:.6g} to {float(learning_rate)!r}{why}")

    def _set_rate_to_come(self) -> None:
        """What was set by hand when the run was here before, and no checkpoint has."""
        if (rate := self._rates_to_come.pop(self.step_count, None)) is not None:
            self._set_rate(*rate, ", as it was set by hand before the run was broken off")

    # -- saving ---------------------------------------------------------------------------------------------------

    @_on_all_ranks
    def save(self) -> Path:
        """Writes a checkpoint into `run_dir/checkpoints` and returns its folder. Where the run's folder is gone, it is made anew.

        Raises:
            TrainingError: the trainer has no `run_dir`.
            CheckpointError: it cannot be written, or the folder is no longer this run's; earlier ones are untouched.
        """
        return self._write_checkpoint()

    def _write_checkpoint(self) -> Path:
        if self._directory is None:
            raise TrainingError("This trainer has no run_dir, so there is nowhere to save. Give it one with trainer.move_run('runs/a').")
        if self._directory.lock.folder_is_gone:
            return self.move_run(self._directory.path)
        with self.now_doing("saving"):
            path = self._directory.save_checkpoint(self.lm, self._take_state(), self.config.keep)
        self._saved_step = self.step_count
        self.tell("on_save", path)
        self._tell_notes()
        self._write_best_if_due()
        return path

    @_on_all_ranks
    def move_run(self, run_dir: str | os.PathLike) -> Path:
        """Goes on in another folder, beginning with a checkpoint of now: where the run's own was deleted, moved, or begun anew by another
        process, or its disk is full, and for a trainer that had none.

        Args:
            run_dir: as for a new run. It gets settings, history and a checkpoint; what stands in the folder before stays there.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: it holds a run or files of others, or cannot be written; the trainer is then as it was.
        """
        state, before = self._take_state(), self._directory
        directory = RunDirectory.create(run_dir, self.config, self.lm.source)
        try:
            with self.now_doing("saving"):
                path = directory.save_checkpoint(self.lm, state, self.config.keep)
        except BaseException:
            directory.close()
            raise
        self._hold(directory)
        if before is not None:
            before.close()
        self._forget_what_is_written()
        self._saved_step, self._best_is_due = self.step_count, self._best_step == self.step_count > 0
        directory.rewrite_metrics(self.history)
        for event in self.history.events:
            directory.append(event)
        self._tell_notes()
        self.event("move", f"goes on in {directory.path}" + (f"; what was written before is or was in {before.path}" if before else ""))
        self.tell("on_save", path)
        self._write_best_if_due()
        return path

    def _tell_notes(self) -> None:
        for note in self._directory.take_notes():
            self.event("run_dir", note)

    def _save_if_due(self) -> None:
        """A checkpoint, and at the end of the run its result; each once a step."""
        if self.step_count and (self.done or self.step_count % self.config.save_every == 0):
            with interrupts_deferred():
                self._save_unless_saved()
        if self.done and self._result_step != self.step_count:
            self._load_best_if_due()
            self._write_result()
            self._result_step = self.step_count

    def _hold(self, directory: RunDirectory) -> None:
        """Writes into a directory from now on, until another trainer of this process goes on with the run."""
        self._directory, directory.lock.save = directory, weakref.WeakMethod(self._save_for_the_next)

    def _save_for_the_next(self) -> None:
        if self._torn() is None and self._saved_step != self.step_count and self.loaded_best is None:
            self._write_checkpoint()

    def _save_unless_saved(self) -> None:
        if self.run_dir and self._saved_step != self.step_count:
            self._try_to_write(self.save)

    def _write_result(self) -> None:
        if self._directory is not None:
            self._try_to_write(partial(self._directory.write_result, self.result()))

    def _try_to_write(self, write: Callable[[], Any]) -> bool:
        """Whether it was written. Where `on_save_error` is "continue", an event tells that it cannot be, once until something can."""
        try:
            write()
            self._told_failures.clear()
            return True
        except CheckpointError as error:
            if self.config.on_save_error == "stop" or not self._directory.lock.is_ours:
                raise
            if str(error) not in self._told_failures:  # writing that very event may fail too
                self._told_failures.add(str(error))
                self.event("save_failed", str(error))
            return False

    def _forget_what_is_written(self) -> None:
        """Of a run that goes back, what was written is not of the line that begins now."""
        self._saved_step = self._result_step = -1
        self._best_is_due = False  # it has not been written since the best evaluation
        self._best_kept: tuple[int, Arrays] = -1, {}  # where there is no folder for them: the step, and the weights
        self.loaded_best: int | None = None
        self._has_average = False
        self._rates_to_come: dict[int, RateSet] = {}  # by step count; see `_set_rate_to_come`

    def result(self) -> dict[str, Any]:
        """What came of the run so far, as the JSON values of `result.json`: losses in nats, seconds, bytes; None for what there is not."""
        return {
            "state": self._ending if self.done else self.state,  # its last step writes it
            "steps": self.step_count,
            "total_steps": self.total_steps,
            "stopped_early": self.stopped_early,
            "loaded_best": self.loaded_best,
            **self.history.summary.to_dict(),
            "config": self.config.to_dict(),
            "model": self.lm.source,
            "model_source": self.lm.source,
            "dequantized": self.lm.dequantized,
            "num_parameters": self.lm.num_parameters,
            "data": {"source": self.data.source, "fingerprint": self.data.fingerprint},
            "run_dir": None if self.run_dir is None else str(self.run_dir),
            "versions": versions(),
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        }

    # -- the state: going back, branching off ---------------------------------------------------------------------

    def _take_state(self) -> TrainerState:
        """Where the run stands; the arrays are the trainer's own, which the next step changes."""
        self._check_whole()
        self._check_has_last_weights()
        self.lm.check_whole()
        origin = {
            "position": {"epoch": self.step_count // self.steps_per_epoch, "step_in_epoch": self.step_count % self.steps_per_epoch},
            "learning_rate": self.learning_rate,
            "rates_to_come": self._rates_to_come,
            "backward": self.backward,
            "loss": name_of(self.loss),
            "config": self.config.to_dict(),
            "model_source": self.lm.source,
            "dequantized": self.lm.dequantized,
            "data": {"source": self.data.source, "fingerprint": self.data.fingerprint},
            "versions": versions(),
        }
        return TrainerState(
            step=self.step_count,
            history=History(self.history),
            rate_factor=self._rate.factor,
            patience=self.patience.to_dict(),
            random=random_state(),
            optimizer_steps_before=self.optimizer_steps_before,
            origin=origin,
            optimizer_arrays=self._together.optimizer_arrays(self.optimizers),
            weights=parameters_of(self.lm.model),
        )

    def _put_state(self, state: TrainerState) -> None:
        """Stands where a state says from now on; its arrays become the trainer's own.

        Raises:
            CheckpointError: the arrays do not fit, the run is shorter, or its metrics cannot be written; nothing is changed.
        """
        own = {name: (array.shape, array.dtype) for name, array in parameters_of(self.lm.model).items()}
        if state.weights and own != {name: (array.shape, array.dtype) for name, array in state.weights.items()}:
            raise CheckpointError("the snapshot is of a model of another shape or dtype. Restore those of this trainer, or of forks of it.")
        check_long_enough(self.total_steps, state.step)
        before = self.optimizers.state_arrays()  # this rank's: for the case that the next lines fail
        self.optimizers.load_state_arrays(state.optimizer_arrays)
        if self._directory:
            try:
                self._directory.rewrite_metrics(state.history)
            except CheckpointError:
                self.optimizers.load_state_arrays(before)
                raise
        del before
        put_parameters(self.lm.model, state.weights)
        mx.eval(self.lm.model.parameters())
        self.history[:] = state.history
        self.step_count, self.optimizer_steps_before = state.step, state.optimizer_steps_before
        self._together.share_state(self.lm.model, self.step_count, self.history, state.optimizer_arrays)
        self.lm.torn, self.lm.update_under_way = None, False
        self.failure = ""
        self._rate.factor = state.rate_factor
        self.patience.load(state.patience)
        set_random_state(state.random)
        self._forget_what_is_written()

    @_on_all_ranks
    def snapshot(self, folder: str | os.PathLike | None = None) -> Snapshot:
        """The present state, to go back to with `restore`.

        Args:
            folder: new or empty; the snapshot is a checkpoint there. None keeps it in memory, which takes as many bytes as weights
                and optimizer state.

        Raises:
            CheckpointError: it cannot be written.
        """
        return Snapshot.take(self._take_state(), self.lm, folder)

    @_on_all_ranks
    def restore(self, snapshot: Snapshot | str | os.PathLike, force: bool = False) -> None:
        """Goes back, or forward, to a snapshot; history included. Training goes on from there bit for bit as it did then.

        Args:
            snapshot: what `snapshot` returned, here or in a fork, or the folder of a checkpoint.
            force: even though the data is not that of the snapshot.

        Raises:
            CheckpointError: it is damaged or does not fit; nothing is changed.
        """
        self._check_not_averaged()
        if not isinstance(snapshot, (Snapshot, str, os.PathLike)):
            raise TrainingError(f"restore takes what snapshot() returned, or the folder of a checkpoint; got {type(snapshot).__name__}.")
        if not isinstance(snapshot, Snapshot):
            snapshot = Snapshot(-1, absolute(snapshot), 0)
        state = snapshot.state.copied() if snapshot.path is None else read_checkpoint(snapshot.path, self.lm)
        notes = [*check_same_data(self.data, state.origin["data"], force), *other_arithmetic(state.origin["versions"])]
        here = self.step_count
        self._put_state(state)
        self.event("restore", "; ".join([f"went back from step {here} to step {self.step_count}", *notes]))

    def fork(self, run_dir: str | os.PathLike | None = None, **changes: Any) -> Trainer:
        """A trainer of its own that goes on from here with other settings, beside this one; the model is copied.

        Args:
            run_dir: a new folder for it; None writes nothing.
            changes: settings by name, such as `learning_rate=3e-5`. With another optimizer, that begins anew.

        Raises:
            ConfigError: a setting that cannot be changed to that.
            CheckpointError: `run_dir` already holds a run, or cannot be written.
        """
        self._together.check_leads("A fork")
        state, config = self._take_state(), self.config.replace(**changes)
        other = type(self)(copy_of(self.lm), self.data, config, parallel=False, loss=self.loss)
        if other.total_steps < state.step:
            raise ConfigError(f"the fork would have {other.total_steps} steps in all, but {state.step} are taken. Give more iters.")
        new = {"optimizer_arrays": copied(state.optimizer_arrays), "weights": {}}
        if changes.keys() & _NEW_SCHEDULE:
            new["rate_factor"] = 1.0
        if changes.keys() & _NEW_OPTIMIZER:
            new |= {"optimizer_arrays": other.optimizers.state_arrays(), "optimizer_steps_before": state.step}
        other._put_state(replace(state, **new))
        if run_dir is not None:
            other._write_into(RunDirectory.create(run_dir, other.config, self.lm.source))
        what = ", ".join(f"{name}={value!r}" for name, value in changes.items()) or "nothing changed"
        fresh = "; the optimizer begins anew" if changes.keys() & _NEW_OPTIMIZER else ""
        other.event("fork", f"branched off {self.run_dir or 'a run'} at step {other.step_count}: {what}{fresh}")
        if other.run_dir:
            other.save()
        return other

    # -- several processes: rank 0 leads, the others follow -------------------------------------------------------

    @property
    def ranks(self) -> Ranks | None:
        """The processes that train together; None where this is one alone."""
        return self._together.ranks

    def _leading(self) -> AbstractContextManager[None]:
        """Within the block the other ranks follow; at its end they leave the call of theirs that follows this one."""
        return self._together.leading(
            lambda: {"interrupted": self.interrupted, "patience": self.patience.to_dict(), "failure": self.failure}
        )

    def _join(self, lm: LanguageModel, data: DataSet, begin: dict[str, Any] | None = None) -> None:
        """On another rank than 0: the run that rank 0 begins, with its settings and weights."""
        begin = begin or self.ranks.awaited("begin")
        self._together.join(lm, data, self.loss, begin)
        self._begin(lm, data, TrainConfig.from_dict(begin["config"]), force=True, backward=begin["backward"])
        self.obey(self.ranks.following_at_once("take_state"))
        self.ranks.obeys = weakref.WeakMethod(self.obey)  # as when rank 0 makes its next trainer, for which this one saves

    @classmethod
    def _joined_run(
        cls, ranks: Ranks, lm: LanguageModel | None, data: DataSet | str | os.PathLike | None, loss: Loss | None
    ) -> Trainer:
        """`resume` on another rank than 0: rank 0 reads the run's folder, and gives what it has."""
        begin = ranks.awaited("begin")
        config = TrainConfig.from_dict(begin["config"])
        lm = lm or load_model(begin["checkpoint"])
        if not isinstance(data, DataSet):
            data = load_data(data or begin["source"], lm.tokenizer, config=config)
        trainer = cls.__new__(cls)
        trainer._together, trainer.loss = Together(ranks), loss
        trainer._join(lm, data, begin)
        return trainer

    def _followed(self) -> bool:
        """Whether this is another rank than 0, which has then done what rank 0 did in this call."""
        for _ in self._follow() if self._together.follows else ():
            pass
        return self._together.follows

    def _follow(self) -> Iterator[StepReport]:
        """Does what rank 0 says until it leaves the call that this is in; yields the steps.

        Raises:
            TrainingError: rank 0 left it by an error, or a rank was lost.
        """
        call = self.ranks.following()
        with self._running(), interrupts_passed_on(self.ranks.interrupt):
            while True:
                command = self.ranks.next_command()
                if command["do"] == "leave" and command["call"] >= call:
                    break
                if (report := self.obey(command)) is not None:
                    yield report
        self.interrupted, self.failure = command["interrupted"], command["failure"]
        self.patience.load(command["patience"])
        if command["problem"]:
            raise TrainingError(f"rank 0 ended this by {command['problem']}")

    def obey(self, command: Mapping[str, Any]) -> StepReport | None:
        """Does what rank 0 is doing."""
        do = command["do"]
        try:
            if do == "step":
                return self._step_along(command["number"], command["rate"])
            if do == "evaluate":
                self.history.append(self._evaluated(command["split"], command["batches"], command["step"], command["averaged"]))
            elif do == "give_state":
                self._together.optimizer_arrays(self.optimizers)
            elif do == "take_state":
                self.step_count = command["step"]
                self._together.take_state(self.lm.model, self.history, self.optimizers, command["optimizer"])
                self.lm.torn, self.lm.update_under_way = None, False
        except (Abandoned, DataError):
            pass  # rank 0 has gone on, or has the same error
        except FulltuneError as error:
            if error is not self.ranks.settled:
                self.ranks.fail(error)
                raise
            self.optimizers.abandon_step()
        except BaseException as error:
            self.ranks.fail(error)
            raise
        return None

    def _step_along(self, number: int, rate: float) -> StepReport:
        started, batches = time.perf_counter(), self.batches.of_step(number - 1)
        mx.reset_peak_memory()
        loss, norm = self._take_step(number, batches, rate)
        self.step_count = number
        report = self._report(batches, loss, norm, rate, time.perf_counter() - started)
        self.history.append(report)
        return report

    # -- telling --------------------------------------------------------------------------------------------------

    def record(self, report: StepReport | EvalReport | Event) -> None:
        """Adds an entry to the history and to the run's folder, and tells callbacks and listeners."""
        self._keep(report)
        self.tell(_METHODS[type(report)], report)

    def _keep(self, report: StepReport | EvalReport | Event) -> None:
        self.history.append(report)
        if self._directory is not None:
            self._try_to_write(partial(self._directory.append, report))

    def event(self, kind: str, message: str) -> None:
        """Records that something happened now."""
        self.record(Event(self.step_count, kind, message, time.time()))

    def tell(self, method: str, *subject: Any) -> None:
        """Calls `method(trainer, *subject)` on every callback of the run and every listener that has it; then the first error is raised."""
        errors: list[Exception] = []
        for callback in (*self._callbacks, *self.listeners):
            if (function := getattr(callback, method, None)) is not None:
                try:
                    function(self, *subject)
                except Exception as error:
                    errors.append(error)
        for error in errors[1:]:
            errors[0].add_note(f"{method} of another callback failed too: {type(error).__name__}: {error}")
        if errors:
            raise errors[0]

    def _write_into(self, directory: RunDirectory) -> None:
        """Holds a directory, and writes what there is already."""
        self._hold(directory)
        for entry in self.history:
            directory.append(entry)
        self._tell_notes()

    def __repr__(self) -> str:
        return f"Trainer(step {self.step_count} of {self.total_steps}, {self.lm!r}, run_dir={self.run_dir and str(self.run_dir)!r})"

    def _repr_html_(self) -> str:
        """Where it stands, as a table."""
        last, per_epoch = self.history.summary.last_loss, self.steps_per_epoch
        return facts(
            "Trainer",
            [
                ("step", f"{self.step_count:,} of {self.total_steps:,}"),
                ("state", f"{self.status}: {self.failure}" if self.failure else self.status),
                ("epoch", f"{self.step_count / per_epoch:.2f} ({per_epoch:,} steps each)"),
                ("last loss", "none yet" if last is None else f"{last:.4f}"),
                ("next learning rate", f"{self.learning_rate:.3g} (peak {self.peak_learning_rate:.3g})"),
                ("optimizer", self.config.optimizer),
                ("run_dir", self.run_dir or "none: nothing is written"),
            ],
        )
