"""What transformers and torch compute: the reference of the parity tests. Importing this needs torch."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

transformers.utils.logging.set_verbosity_error()  # it warns of what the configurations do on purpose
transformers.utils.logging.disable_progress_bar()
CORRECTION = "e_score_correction_bias"
"""A router's, which has no gradient."""
torch.set_num_threads(1)  # the models are so small that threads cost more than they bring


def build(raw: dict[str, Any], seed: int) -> torch.nn.Module:
    """A transformers model of a config.json's content, with random weights large enough that every mechanism shows."""
    torch.manual_seed(seed)  # some vectors, such as sinks, are drawn
    config = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                scale = 0.15 if "embed" in name else 1.3 / parameter.shape[-1] ** 0.5
                parameter.copy_(scale * noise)
            else:
                parameter.copy_(torch.nan_to_num(parameter) + 0.2 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(CORRECTION):  # as large as what it corrects, so that it changes choices
                buffer.copy_(0.5 * torch.randn(buffer.shape, generator=generator))
    return model


def load(folder: Path) -> torch.nn.Module:
    """The model of a folder, as transformers reads it; float32 unless the folder says otherwise."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="auto").eval()


def checkpoint(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The tensors of the checkpoint that transformers writes of a model, under their names there."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """(B, T, V), float32."""
    with torch.no_grad():
        return model(torch.from_numpy(ids).long()).logits.float().numpy()


def rounded_logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """The same when each weight is moved by as much as float32 rounds."""
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1 + torch.randn(parameter.shape, generator=generator) * 2**-24)
    return logits(moved, ids)


def gradients(model: torch.nn.Module, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Of the mean next-token cross-entropy, under the names of the checkpoint. The model is used up."""
    tensor = torch.from_numpy(ids).long()
    predicted = model(tensor).logits[:, :-1]
    torch.nn.functional.cross_entropy(predicted.flatten(0, 1), tensor[:, 1:].flatten()).backward()
    return written_gradients(model)


def written_gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The gradients that `backward` left, under the names of the checkpoint. The model is used up."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    written = checkpoint(model)  # gradients written as weights are: transformers itself splits what it keeps fused
    return {name: gradient for name, gradient in written.items() if not name.endswith(CORRECTION)}


def greedy(model: torch.nn.Module, prompt: np.ndarray, new_tokens: int) -> np.ndarray:
    """`generate` without sampling, never stopping: (1, T) -> (new_tokens,)."""
    return greedy_with_gap(model, prompt, new_tokens)[0]


def greedy_with_gap(model: torch.nn.Module, prompt: np.ndarray, new_tokens: int) -> tuple[np.ndarray, float]:
    """The greedy answer, and how far the chosen token was ahead of the second best at the closest call, by the logits' spread."""
    tensor = torch.from_numpy(prompt).long()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    # With a cache, only Phi-3 rotates what is cached anew where the text becomes long.
    cache = model.config.model_type == "phi3" or "longrope" not in str(model.config.rope_parameters)
    with torch.no_grad():
        made = model.generate(
            tensor, attention_mask=torch.ones_like(tensor), do_sample=False, max_new_tokens=new_tokens, use_cache=cache,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    best = torch.cat(made.logits).float().sort(dim=-1).values  # (new_tokens, V)
    gap = ((best[:, -1] - best[:, -2]) / best.std(dim=-1)).min().item()
    return made.sequences[0, tensor.shape[1] :].numpy().astype(np.int32), gap


def smallest_gap(model: torch.nn.Module, prompt: np.ndarray, answer: np.ndarray) -> float:
    """How far the chosen token was ahead of the second best, at the closest call of a greedy answer."""
    ids = np.concatenate([prompt[0], answer])[None]
    best = np.sort(logits(model, ids)[0, prompt.shape[1] - 1 : -1], axis=-1)
    return float((best[:, -1] - best[:, -2]).min())


def dequantized(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What MXFP4 stands for: (E, out, groups, 16) and (E, out, groups) bytes -> (E, in, out) float32."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales)).float().numpy()
