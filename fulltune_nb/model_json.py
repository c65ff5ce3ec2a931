"""The JSON files of a model folder: read, and what they say checked for its type and range before anything is made of it.

A kind is a check of `settings`; a table says of which kind the value of each key must be. Sizes that shapes are made of (heads, layers) are
not in it: `model_config` checks them, and `folder` compares them with the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fulltune_nb.errors import FulltuneError, ModelError
from fulltune_nb.files import no_key_twice
from fulltune_nb.settings import Check, Refused, number, show, text, whole

MOST = 2**31 - 1
"""Of a count, as MLX's shapes are int32."""
_MAX_BYTES = 100_000_000  # of a config or an index that are read
_SHOWN = 10  # files named in an error message


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: the file is missing, is not JSON, has a key twice, or holds something else than an object.
    """
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is no file. A Hugging Face model folder has a JSON file there.")
        if path.exists() and path.stat().st_size > _MAX_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size:,} bytes; at most {_MAX_BYTES:,} are read. It is not the file it should be.")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_key_twice)
    except FileNotFoundError as error:
        here = ", ".join(sorted(p.name for p in path.parent.iterdir())[:_SHOWN]) if path.parent.is_dir() else "nothing"
        raise ModelError(f"{path} is missing. A Hugging Face model folder has it; found here: {here or 'nothing'}.") from error
    except ModelError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {str(error)[:300]}. Get the file again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, found a {type(content).__name__}.")
    return content


# ---- kinds of values


def switch(value: Any) -> bool:
    """True or False, which some write as 1 and 0."""
    if not isinstance(value, int) or value not in (0, 1):
        raise Refused("true or false")
    return bool(value)


def each(kind: Check, what: str) -> Check:
    """A list whose entries are all of one kind; `what` names them."""

    def check(value: Any) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise Refused(f"a list of {what}")
        try:
            return [kind(one) for one in value]
        except Refused:
            raise Refused(f"a list of {what} alone") from None

    return check


_FACTOR = number(above=0, below=1e9)
_SCALE = number(above=-1e9, below=1e9)
_CONFIG_KINDS: tuple[tuple[Check, tuple[str, ...]], ...] = (
    (switch, (
        "tie_word_embeddings", "attention_bias", "attention_out_bias", "mlp_bias", "qkv_bias", "use_bias", "use_qkv_bias", "norm_topk_prob",
        "use_parallel_residual", "use_sliding_window", "qk_layernorm", "qk_norm", "use_qk_norm", "truncate",
    )),
    (text, ("hidden_act", "hidden_activation", "rope_type", "type", "scoring_func", "topk_method")),
    (number(low=0, high=1), ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", "moe_norm_min")),
    (number(above=0, high=1), ("partial_rotary_factor",)),
    (number(above=1, below=1e20), ("rope_theta", "rope_local_base_freq")),
    (_FACTOR, (
        "factor", "alpha", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "query_pre_attn_scalar",
        "logits_scaling",
    )),
    (number(low=0, below=1e9), (
        "mscale", "mscale_all_dim", "llama_4_scaling_beta", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "swiglu_limit",
    )),
    (_SCALE, (
        "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logit_scale", "routed_scaling_factor", "swiglu_alpha",
    )),
    (whole(1, MOST), (
        "max_position_embeddings", "sliding_window_pattern", "no_rope_layer_interval", "moe_layer_interval",
    )),
    (whole(2, MOST), ("original_max_position_embeddings",)),
    (whole(0, MOST), ("max_window_layers", "decoder_sparse_step", "first_k_dense_replace", "moe_layer_start_index")),
    (whole(-1, MOST), ("moe_layer_end_index",)),
    (whole(-MOST, MOST), ("pad_token_id",)),
    (each(_FACTOR, "positive numbers"), ("short_factor", "long_factor")),
    (each(whole(0, MOST), "whole numbers"), ("mlp_only_layers", "no_rope_layers")),
    (each(text, "names"), ("layer_types",)),
)  # fmt: skip
CONFIG: dict[str, Check] = {key: kind for kind, keys in _CONFIG_KINDS for key in keys}
"""Keys of `config.json`, and of the objects in it that describe rotations."""


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Within it, what a value that no check knows of leads to is a `ModelError` that names the file."""
    try:
        yield
    except FulltuneError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise ModelError(f"{where} has a setting of the wrong kind: {why}. Get the file again.") from error


def checked_value(kinds: Mapping[str, Check], key: str, value: Any, where: str) -> Any:
    """The value of a key as its kind; None, and that of a key which the table has not, as it is.

    Raises:
        ModelError: it is of another kind, or out of range.
    """
    if value is None or key not in kinds:
        return value
    try:
        return kinds[key](value)
    except Refused as refused:
        raise ModelError(f"{where}: {key} must be {refused}, found {show(value)}. Get the file again.") from None
