"""What a `config.json` says and nobody reads: refused where it makes another computation of the model, else named.

What the family's class in transformers declares is the row's affair (`families.py`), and compared with transformers. Here are keys that
any family may have, and those that transformers does not know of the family either: of a model's own code, or of a newer version.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

from fulltune_nb.errors import ModelError, listed
from fulltune_nb.html import printable
from fulltune_nb.models.model_config import ModelConfig
from fulltune_nb.settings import show
from fulltune_nb.tokenizer import from_transformers

_OTHER_COMPUTATION = {
    "is_causal": (False, "each token sees those behind it"),
    "use_bidirectional_attention": (True, "each token sees those behind it"),
    "add_cross_attention": (True, "an encoder's output is attended to"),
    "is_encoder_decoder": (True, "there is an encoder"),
    "alibi": (True, "positions are told by a slope on the scores"),
}
"""Key -> the value that is refused, and what it means. The decoder is causal, alone, and rotates its positions."""
_ATTENTION = ("full_attention", "sliding_attention")
_DROPOUT = re.compile(r"(?!.*(classifier|summary)).*(dropout|pdrop|layerdrop|jitter)")
_COMPUTES = re.compile(
    r"softcap|multiplier|scaling|_scale$|alibi|sink|layer_types|rope|rotary|position_embedding|residual|parallel|clip|query_pre_attn|chunk"
    r"|qk_|[qk]_norm|sliding|logit|shared_expert|scoring_func|topk_method"
)


def check_unread(config: ModelConfig, where: str) -> None:
    """
    Args:
        config: what was made of a `config.json`.
        where: its path, for messages.

    Raises:
        ModelError: a key that nobody reads makes another computation of the model.
    """
    raw = {key: value for key, value in config.raw.items() if key not in config.keys_read}
    for key, (refused, meaning) in _OTHER_COMPUTATION.items():
        if raw.get(key) is not None and bool(raw[key]) is refused:
            raise ModelError(f"{where}: {key} is {raw[key]!r}: {meaning}, which is not supported. Use a checkpoint of a causal decoder.")
    kinds = raw.get("layer_types")
    if other := [kind for kind in kinds if kind not in _ATTENTION] if isinstance(kinds, list) else []:
        raise ModelError(f"{where}: layer_types has {other[0]!r}, which is not supported; supported are {', '.join(_ATTENTION)}.")
    drop = {key: value for key, value in raw.items() if _DROPOUT.match(key) and isinstance(value, (int, float)) and value > 0}
    if drop:
        warnings.warn(printable(f"{where}: {_shown(drop)}: training here drops nothing out, as with 0."), stacklevel=4)
    known = _declared(config.family) | drop.keys()
    own = {key: value for key, value in raw.items() if key not in known and not key.startswith("_")}  # transformers notes its own so
    unknown = {key: value for key, value in own.items() if _COMPUTES.search(key) and not _says_nothing(value)}
    if unknown:
        warnings.warn(
            printable(
                f"{where}: {_shown(unknown)}: neither the decoder here nor transformers reads this of a {config.family} model. If the"
                " weights were trained with it, by code of their own, what is computed here is not the same."
            ),
            stacklevel=4,
        )


def _says_nothing(value: Any) -> bool:
    """Whether a value of a key leaves out what the key is about: nothing, off, or a factor of one."""
    return value in (None, False, "", [], {}) or (value == 1 and value is not True)


def _shown(values: Mapping[str, Any]) -> str:
    shown = {key: show(value) if isinstance(value, (dict, list)) else str(value)[:60] for key, value in values.items()}
    return listed([f"{key[:60]} is {value}" for key, value in shown.items()])


def _declared(family: str) -> frozenset[str]:
    """The keys that transformers knows of a family; of one that it does not know, those of all models."""
    families = from_transformers("CONFIG_MAPPING")
    kind = families[family] if family in families else from_transformers("PretrainedConfig")
    names = {name for base in kind.__mro__ for name in (*inspect.get_annotations(base), *inspect.signature(base.__init__).parameters)}
    return frozenset(names | set(getattr(kind, "attribute_map", {})))
