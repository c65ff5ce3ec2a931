"""A trainer's part in several ranks: which run of theirs it is, and what they tell, ask and give each other for it.

Where there is one process alone, nothing is told and nothing given, and the calls are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from fulltune_nb.cpu import evaluate
from fulltune_nb.data.dataset import DataSet
from fulltune_nb.errors import ConfigError, TrainingError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.models.parameters import Arrays, parameters_of, put_parameters
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.history import History
from fulltune_nb.training.layerwise import check_for_ranks
from fulltune_nb.training.objective import Loss, name_of
from fulltune_nb.training.optimizers import Optimizers
from fulltune_nb.training.parallel import Ranks
from fulltune_nb.training.rank_material import material_of
from fulltune_nb.training.rules import put
from fulltune_nb.training.state import versions

Notes = list[tuple[str, str]]
"""Kind and message of an event each."""


class Together:
    """The ranks of one trainer.

    Attributes:
        ranks: the processes that train together; None where this is one alone.
        follows: whether this is another rank than 0, which does what that says.
    """

    def __init__(self, ranks: Ranks | None):
        self.ranks, self.follows = ranks, ranks is not None and ranks.rank > 0
        self._run = 0  # which of the runs that these ranks have had
        self._shards = False  # whether each has the optimizer's state of some tensors only

    # -- a run begins -----------------------------------------------------------------------------------------------------------

    def begin(
        self, lm: LanguageModel, data: DataSet, config: TrainConfig, loss: Loss | None, backward: str, checkpoint: str | None
    ) -> Notes:
        """On rank 0: tells the others what run this is; returns what there is to note of it.

        Raises:
            ConfigError: such a run is for one process; they are not told of it.
            TrainingError: they have other data, or another model or loss.
        """
        if self.ranks is None or self.follows:
            return []
        if backward == "layerwise":
            check_for_ranks(lm.config)
        if self.ranks.launched and loss is not None:
            raise ConfigError("loss= is a function of this process, which ft.launch cannot send to ranks: start them by mlx.launch.")
        if config.ema_decay is not None and config.shard_optimizer:
            raise ConfigError("ema_decay with shard_optimizer: no rank has the average of all weights. Leave one of them out.")
        self.ranks.runs += 1
        self._run = self.ranks.runs
        if self.ranks.launched:
            material, arrays = material_of(lm, data)
            with self.doing("material", material=material):
                self.ranks.shared(arrays, 0)
        run = {"config": config.to_dict(), "backward": backward, "source": data.source, "checkpoint": checkpoint}
        with self.doing("begin", **run, has=_what_must_agree(lm, data, loss)):
            self.ranks.agree(lambda: None)
        count = config.grad_accumulation_steps
        idle = max(self.ranks.size - count, 0)
        who = f"{idle} of {self.ranks.size} ranks have nothing to do. Give more, and smaller ones"
        return [("parallel", f"grad_accumulation_steps={count}: a step has so many micro-batches, so {who}")] if idle else []

    def join(self, lm: LanguageModel, data: DataSet, loss: Loss | None, begin: Mapping[str, Any]) -> None:
        """On the others: the run that rank 0 begins.

        Raises:
            TrainingError: it has other data, or another model or loss.
        """
        self._run, has = self.ranks.runs, _what_must_agree(lm, data, loss)
        others = [name for name in has if has[name] != begin["has"][name]]

        def check() -> None:
            if others:
                what = " and ".join(others)
                raise TrainingError(f"this rank has other {what} than rank 0. Every rank needs the same model, data and versions.")

        self.ranks.agree(check)

    def optimizers(self, model: Decoder, config: TrainConfig) -> Optimizers:
        """Those of this rank, with the state of its share of the tensors where they are shared out."""
        self._shards = config.shard_optimizer and self.ranks is not None
        return Optimizers(model, config, **({"rank": self.ranks.rank, "size": self.ranks.size} if self._shards else {}))

    # -- what all do at once ----------------------------------------------------------------------------------------------------

    def leading(self, about: Callable[[], Mapping[str, Any]]) -> AbstractContextManager[None]:
        """See `Ranks.leading`."""
        return nullcontext() if self.ranks is None else self.ranks.leading(about)

    def in_program(self) -> AbstractContextManager[None]:
        """See `Ranks.in_program`."""
        return nullcontext() if self.ranks is None else self.ranks.in_program()

    def command(self, do: str, **values: Any) -> None:
        """Has the other ranks do the same as this one now; see `Ranks.command`.

        Raises:
            TrainingError: they serve another trainer.
        """
        if self.ranks is None:
            return
        if self._run != self.ranks.runs:
            raise TrainingError("A later trainer has these ranks now, and they serve one: make this one anew, or go on with that.")
        self.ranks.command(do, **values)

    @contextmanager
    def doing(self, do: str, **values: Any) -> Iterator[None]:
        """Within the block all ranks do the same, of which a part is not to be had alone: one's error ends the run of all."""
        self.command(do, **values)
        try:
            yield
        except BaseException as error:
            if self.ranks is not None:
                self.ranks.fail(error)
            raise

    def agree(self, check: Callable[[], None]) -> None:
        """Calls `check` on every rank; where it raises on one, all raise."""
        check() if self.ranks is None else self.ranks.agree(check)

    def check_leads(self, what: str) -> None:
        """
        Raises:
            TrainingError: this is another rank than 0.
        """
        if self.follows:
            raise TrainingError(f"{what} is for rank 0, and this is rank {self.ranks.rank}: leave the call out on the others.")

    @property
    def interrupted(self) -> bool:
        """On rank 0: whether another rank was interrupted; reading it takes it away."""
        return self.ranks is not None and self.ranks.interrupted

    def forget_interrupts(self) -> None:
        """Of this process, and on rank 0 of another."""
        if self.ranks is not None:
            self.ranks.interrupt(False)

    # -- weights and state ------------------------------------------------------------------------------------------------------

    def share_state(self, model: Decoder, step: int, history: History, arrays: Arrays | None = None) -> None:
        """On rank 0: has the others stand where it does. `arrays`: the optimizer's; None where they have them, of a run that begins."""
        if self.ranks is None or self.follows:
            return
        with self.doing("take_state", step=step, optimizer=arrays is not None):
            self.ranks.told(history.to_jsonable())
            self.ranks.shared(parameters_of(model), 0)
            if arrays is not None:
                self.ranks.shared(arrays, 0)

    def take_state(self, model: Decoder, history: History, optimizers: Optimizers, with_optimizer: bool) -> None:
        """On the others, the same."""
        history[:] = History.from_jsonable(self.ranks.told(None))
        put_parameters(model, self.ranks.shared({}, 0))
        if with_optimizer:
            optimizers.load_state_arrays(self.ranks.shared({}, 0, optimizers.keeps))
        else:
            optimizers.begin_average(model)

    def optimizer_arrays(self, optimizers: Optimizers) -> Arrays:
        """The optimizer's state; where the ranks share it out, all of it on rank 0."""
        own = optimizers.state_arrays()
        if not self._shards:
            return own
        arrays: Arrays = {}
        with self.doing("give_state"):
            for owner in range(self.ranks.size):
                arrays |= self.ranks.shared(own if owner == self.ranks.rank else {}, owner, lambda name: not self.follows)
        return arrays

    def exchange_weights(self, model: Decoder, owners: Mapping[str, int], names: Iterable[str], rows: slice | None) -> None:
        """Of a piece just updated, what other ranks have updated; `owners` says who which tensor."""
        by_owner: dict[int, list[str]] = {}
        for name in names if self._shards else ():
            by_owner.setdefault(owners[name], []).append(name)
        for owner, own in sorted(by_owner.items()):
            held = parameters_of(model)
            here = {name: held[name] if rows is None else held[name][rows] for name in own} if owner == self.ranks.rank else {}
            found = self.ranks.shared(here, owner)
            if owner == self.ranks.rank:
                continue
            if rows is not None:
                for name in found:  # into a new array: a rehearsal holds the old one
                    found[name] = put(held[name], held[name].ndim, rows, found[name])
            put_parameters(model, found)
            del held
            evaluate(found)


def _what_must_agree(lm: LanguageModel, data: DataSet, loss: Loss | None) -> dict[str, str | None]:
    shapes = {name: (array.shape, str(array.dtype)) for name, array in sorted(parameters_of(lm.model).items())}
    model = hashlib.sha256(repr(shapes).encode()).hexdigest()
    return {"data": data.fingerprint, "model": model, "versions": repr(versions()), "loss": name_of(loss)}
