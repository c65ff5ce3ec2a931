"""Families with mechanisms of their own go the whole way: trained in both engines, resumed, traced, saved, and they answer."""

from __future__ import annotations

import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.models.parameters import buffers_of, parameters_of
from nbs_tests.models.parity import corrected, relative_error

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
FAMILIES = {
    "gemma2": {"head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "sliding_window_pattern": 2},
    "phi3": {"pad_token_id": 0},
    "olmo3": {"sliding_window": 6, "sliding_window_pattern": 2},
    "qwen2_moe": {"num_experts": 3, "decoder_sparse_step": 2, **EXPERTS},
    "glm4_moe": {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2,
                 "moe_intermediate_size": 16},
    "ernie4_5_moe": {"moe_num_experts": 3, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 16},
    "granitemoe": {"num_local_experts": 3, "residual_multiplier": 0.5, **EXPERTS},
    "cohere2": {"sliding_window": 6, "sliding_window_pattern": 2},
    "apertus": {},
    "gpt_oss": {"num_local_experts": 3, "head_dim": 8, "sliding_window": 6, **EXPERTS},
}


def weights(lm) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in parameters_of(lm.model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_the_same_in_both_engines_goes_on_to_the_same_bits_and_its_model_is_read_again(family, make_lm, make_data, tmp_path):
    after, settings = {}, {"iters": 4, "save_every": 2, "val_batches": 0, "learning_rate": 1e-4}

    def begun(backward: str, folder: str) -> ft.Trainer:
        config = ft.TrainConfig(backward=backward, **settings)
        lm = make_lm(model_type=family, **FAMILIES[family])
        corrected(lm.model)
        return ft.Trainer(lm, make_data(config=config), config, run_dir=tmp_path / folder)

    for backward in ("whole", "layerwise"):
        trainer = begun(backward, backward)
        assert all(np.isfinite(report.loss) for report in trainer.steps())
        lm, after[backward] = trainer.lm, weights(trainer.lm)
    for name, array in after["whole"].items():
        assert "k_proj.bias" in name or relative_error(after["layerwise"][name], array) < 1e-4, name

    for report in begun("whole", "broken off").steps():
        if report.step == 3:  # the checkpoint is that of step 2
            break
    again = ft.Trainer.resume(tmp_path / "broken off", data=trainer.data)
    again.run()
    assert all(np.array_equal(array, after["whole"][name]) for name, array in weights(again.lm).items())

    trace = ft.trace(lm, "a few words of a text")
    shares = trace.attention(1, 0)
    assert shares.shape[0] == len(trace.example.tokens) and np.all(shares.sum(axis=-1) < 1 + 1e-5)
    assert len(ft.inspect(trainer, trainer.data.train[0]).gradient_norms) == len(after["whole"].keys() - buffers_of(lm.model))
    lm.save(tmp_path / "saved")
    read = ft.load_model(tmp_path / "saved")
    assert all(np.array_equal(array, after["layerwise"][name]) for name, array in weights(read).items())
    assert read.generate("a few", max_tokens=5, temperature=0.0) == lm.generate("a few", max_tokens=5, temperature=0.0)
