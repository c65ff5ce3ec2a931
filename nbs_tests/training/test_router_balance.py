"""The router's balance loss: its gradients are those of transformers, in both engines, and padding has no part in it."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product

import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.data.batches import Batch, collate
from fulltune_nb.models.folder import load_decoder
from fulltune_nb.training.engine import make_engine
from nbs_tests.gpu_like import gpu_like
from nbs_tests.models.model_cases import SMALL
from nbs_tests.models.parity import need_torch, relative_error, write_folder

CASES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16,
                  "decoder_sparse_step": 2, "num_hidden_layers": 4},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 12, "num_hidden_layers": 3},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 1},
}  # fmt: skip
ENGINES = {"whole": {}, "checkpointed": {"grad_checkpoint": True}, "layerwise": {}}
ROWS, LENGTH, USED, COEFFICIENT = 2, 12, (12, 7), 0.5


def raw_of(family: str) -> dict:
    return {"model_type": family, **SMALL, **CASES[family]}


def padded_batch(ids: np.ndarray) -> Batch:
    """Every real position but a row's last predicts the next token."""
    places = np.concatenate([row * LENGTH + np.arange(used - 1) for row, used in enumerate(USED)]).astype(np.int32)
    ones = np.ones(len(places), np.float32)
    used = np.array(USED, np.int32)
    return Batch(
        ids, places, ids.reshape(-1)[places + 1], ones, len(places), (0, 1), ("a", "b"), ids.size, sum(USED), row_lengths=used
    )


def reference_gradients(model, ids: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """The cross-entropy, and the gradients of its sum with the balance loss."""
    import torch

    from nbs_tests.models import torch_reference

    mask = torch.tensor([[1] * used + [0] * (LENGTH - used) for used in USED])
    tensor = torch.from_numpy(ids).long()
    output = model(tensor, attention_mask=mask, output_router_logits=True)
    targets = tensor[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets.flatten())
    (loss + COEFFICIENT * output.aux_loss).backward()
    return loss.item(), torch_reference.written_gradients(model)


@pytest.mark.parametrize("family", CASES)
def test_gradients_are_those_of_transformers(family, tmp_path):
    need_torch()
    from fulltune_nb.models.families import to_hf
    from nbs_tests.models import torch_reference

    model = torch_reference.build(raw_of(family), 0)
    decoder = load_decoder(write_folder(tmp_path, raw_of(family), torch_reference.checkpoint(model)))
    ids = np.random.default_rng(1).integers(0, SMALL["vocab_size"], (ROWS, LENGTH), dtype=np.int32)
    expected_loss, expected = reference_gradients(model, ids)
    for (backward, settings), device in product(ENGINES.items(), (nullcontext, gpu_like)):
        with device():
            engine = make_engine(decoder, "layerwise" if backward == "layerwise" else "whole", balance=COEFFICIENT, **settings)
            gradients = engine.gradients(1, [padded_batch(ids)])
            assert gradients.loss == pytest.approx(expected_loss, rel=1e-5), backward  # told is the cross-entropy alone
            found = {name: np.array(gradient) for piece in gradients.pieces() for name, gradient in piece.gradients.items()}
        assert len(found) == len(expected), backward
        for name, gradient in found.items():
            reference = expected[to_hf(name, family)]
            if np.linalg.norm(reference) > 1e-7:
                assert relative_error(gradient, reference) < 1e-4, (backward, name)


def test_a_run_with_it_is_the_same_in_both_engines(make_lm, make_data):
    after = {}
    for backward, coefficient in (("whole", 0.1), ("layerwise", 0.1), ("whole", 0.0)):
        lm = make_lm(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
        config = ft.TrainConfig(iters=3, backward=backward, router_aux_loss_coef=coefficient, grad_accumulation_steps=2)
        for _ in ft.Trainer(lm, make_data(config=config), config).steps():
            pass
        after[backward, coefficient] = np.array(lm.model.layers[0].mlp.router.weight)
    assert relative_error(after["layerwise", 0.1], after["whole", 0.1]) < 1e-5 < relative_error(after["whole", 0.0], after["whole", 0.1])


@pytest.mark.parametrize("backward", ["whole", "layerwise"])
def test_packed_rows_are_balanced_as_the_same_rows_side_by_side(backward, make_lm, make_data):
    lm, split = make_lm(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None), make_data(6).train
    engine, steps = make_engine(lm.model, backward, balance=COEFFICIENT), []
    for rows in ([0, 1, 2, 3, 4], [(0, 1, 2), (3, 4)]):
        batch = collate(split, rows)
        assert batch.row_lengths.shape == (len(rows),) and batch.row_lengths.sum() == batch.real_tokens
        steps.append({name: np.array(g) for piece in engine.gradients(1, [batch]).pieces() for name, g in piece.gradients.items()})
    assert steps[0].keys() == steps[1].keys()
    assert max(relative_error(steps[1][name], gradient) for name, gradient in steps[0].items()) < 1e-5


def test_without_experts_it_has_no_effect_and_that_is_told(make_lm, make_data):
    config = ft.TrainConfig(iters=1, router_aux_loss_coef=0.01)
    trainer = ft.Trainer(make_lm(), make_data(config=config), config)
    assert any("router_aux_loss_coef=0.01 has no effect" in event.message for event in trainer.history.events)
