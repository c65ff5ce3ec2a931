"""Every family goes the whole way: trained in both engines, resumed, traced, saved, and they answer."""

from __future__ import annotations

import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.models.families import FAMILIES
from fulltune_nb.models.parameters import buffers_of, parameters_of
from nbs_tests.models.parity import corrected, relative_error
from nbs_tests.training.conftest import OWN_MECHANISMS, family_shape

CASES = [family if family in OWN_MECHANISMS else pytest.param(family, marks=pytest.mark.ci) for family in FAMILIES]


def weights(lm) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in parameters_of(lm.model).items()}


@pytest.mark.parametrize("family", CASES)
def test_a_run_is_the_same_in_both_engines_goes_on_to_the_same_bits_and_its_model_is_read_again(family, make_lm, make_data, tmp_path):
    after, settings = {}, {"iters": 4, "save_every": 2, "val_batches": 0, "learning_rate": 1e-4}

    def begun(backward: str, folder: str) -> ft.Trainer:
        config = ft.TrainConfig(backward=backward, **settings)
        lm = make_lm(**family_shape(family))
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
