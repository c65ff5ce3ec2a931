"""Which weights are trained: all, or those that name patterns choose."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from mlx.utils import tree_flatten

from fulltune_nb.errors import ConfigError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import to_hf


def select_trainable(model: Decoder, train_only: Sequence[str], freeze: Sequence[str]) -> None:
    """Makes every tensor trainable, then freezes what `train_only` leaves out and `freeze` names.

    Args:
        model: changed in place; whatever was frozen before does not matter.
        train_only: shell-style patterns on Hugging Face tensor names; empty means all.
        freeze: patterns of what stays as it is; wins over `train_only`.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing left to train.
    """
    trained = trained_names(model, train_only, freeze)
    model.unfreeze()
    for name in {name for name, _ in tree_flatten(model.parameters())} - trained:
        _freeze(model, name)


def trained_names(model: Decoder, train_only: Sequence[str], freeze: Sequence[str]) -> set[str]:
    """Module paths of the parameters that `select_trainable` leaves trainable.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing left to train.
    """
    names = {name: to_hf(name, model.config.family) for name, _ in tree_flatten(model.parameters())}
    for setting, patterns in (("train_only", train_only), ("freeze", freeze)):
        for pattern in patterns:
            if not any(fnmatchcase(hf_name, pattern) for hf_name in names.values()):
                some = ", ".join(list(names.values())[:4])
                raise ConfigError(f"{setting}: {pattern!r} matches no tensor. Names look like {some}; '*' stands for anything.")
    trained = {
        name
        for name, hf_name in names.items()
        if (not train_only or any(fnmatchcase(hf_name, pattern) for pattern in train_only))
        and not any(fnmatchcase(hf_name, pattern) for pattern in freeze)
    }
    if not trained:
        raise ConfigError("train_only and freeze together leave nothing to train.")
    return trained


def lowest_trained_block(trained: Collection[str], num_layers: int) -> int:
    """The first block that a backward pass has to go through: below it nothing is trained. `num_layers` where no block is.

    Args:
        trained: module paths of the trained parameters.
        num_layers: blocks of the model.
    """
    if any(name.startswith("embed_tokens.") for name in trained):
        return 0
    return min((int(name.split(".")[1]) for name in trained if name.startswith("layers.")), default=num_layers)


def _freeze(model: Decoder, name: str) -> None:
    *parents, leaf = name.split(".")
    module = model
    for part in parents:
        module = module[int(part)] if part.isdigit() else module[part]
    module.freeze(recurse=False, keys=leaf)
