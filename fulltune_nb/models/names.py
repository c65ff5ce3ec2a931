"""Tensor names: ours (the module tree of `decoder.py`) and Hugging Face's."""

from __future__ import annotations

from fulltune_nb.models.families import COMMON_NAMES, FAMILIES


def to_hf(name: str, family: str) -> str:
    """Our parameter name as the family's Hugging Face checkpoints write it.

    Renames act on whole dotted segments: `layers.0.attention.o_proj.weight` of Phi becomes
    `model.layers.0.self_attn.dense.weight`.
    """
    renames = {**COMMON_NAMES, **FAMILIES[family].names}
    renamed = ".".join(renames.get(segment, segment) for segment in name.split("."))
    return renamed if renamed.startswith("lm_head.") else f"model.{renamed}"


def hf_names(names: list[str], family: str) -> dict[str, str]:
    """Hugging Face's name -> our name, for the given parameters of a model."""
    return {to_hf(name, family): name for name in names}
