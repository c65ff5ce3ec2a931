"""Runs on several data sets with weights, on windows of long rows and on a part of train that is held out: resumed bit for bit."""

import json
import shutil

import pytest

import fulltune_nb as ft
from fulltune_nb.data.batches import padded_to, row_widths
from fulltune_nb.device import length_multiple
from fulltune_nb.errors import CheckpointError
from fulltune_nb.models.folder import hf_tensors
from nbs_tests.training.conftest import make_rows
from nbs_tests.training.test_resuming import same_arrays, untimed


@pytest.fixture
def folders(tmp_path):
    """Two folders: `a` with prompts and completions, `b` with longer texts; neither has a valid split."""
    long = [{"text": " ".join(f"row {i} word {j}" for j in range(6 + 5 * i))} for i in range(6)]
    for name, rows in (("a", make_rows(17)), ("b", long)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {str(tmp_path / "a"): 0.7, str(tmp_path / "b"): 0.3}


@pytest.mark.parametrize("packing", [False, True], ids=["single", "packed"])
def test_a_run_on_weighted_windows_with_a_part_held_out_resumes_from_its_folder_alone(make_lm, folders, tmp_path, packing):
    settings = {"long_rows": "split", "max_seq_length": 24, "valid_fraction": 0.1}
    config = ft.TrainConfig(iters=18, batch_size=8, packing=packing, save_every=9, steps_per_eval=6, seed=3)
    lm = make_lm()
    data = ft.load_data(folders, lm.tokenizer, **settings)
    straight = ft.Trainer(lm, data, config, run_dir=tmp_path / "straight")
    assert straight.steps_per_epoch < 9 and straight.config.valid_fraction == 0.1
    straight.run(9)
    shutil.copytree(tmp_path / "straight", tmp_path / "copy", ignore=shutil.ignore_patterns("run.lock"))
    straight.run()
    resumed = ft.Trainer.resume(tmp_path / "copy")
    assert resumed.step_count == 9 and resumed.data.source == json.dumps(folders) and resumed.data.fingerprint == data.fingerprint
    assert [e.source for e in resumed.data.valid] == [e.source for e in data.valid]
    resumed.run()
    assert [untimed(report) for report in resumed.history.steps] == [untimed(report) for report in straight.history.steps]
    assert [untimed(report) for report in resumed.history.evals] == [untimed(report) for report in straight.history.evals]
    assert same_arrays(hf_tensors(resumed.lm.model), hf_tensors(straight.lm.model))


def test_other_weights_are_other_data_and_a_folder_that_is_gone_is_named(make_lm, folders, tmp_path):
    lm = make_lm()
    trainer = ft.Trainer(lm, ft.load_data(folders, lm.tokenizer), ft.TrainConfig(iters=4, batch_size=2), run_dir=tmp_path / "run")
    trainer.run(2)
    trainer.save()
    with pytest.raises(CheckpointError, match="the data differs"):
        ft.Trainer.resume(tmp_path / "run", data=dict.fromkeys(folders, 0.5))
    assert ft.Trainer.resume(tmp_path / "run", data=folders).step_count == 2
    assert "a (0.7), b (0.3)" in trainer.lm.card.files()["README.md"]
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(CheckpointError, match="where there is no folder now"):
        ft.Trainer.resume(tmp_path / "run")


def test_the_memory_that_is_predicted_is_that_of_the_widest_row_of_any_data_set(make_lm, folders):
    lm = make_lm()
    config = ft.TrainConfig(batch_size=2, packing=True, iters=30)
    data = ft.load_data(folders, lm.tokenizer, max_seq_length=24, long_rows="split")
    trainer = ft.Trainer(lm, data, config)
    widest = max(batch.inputs.shape[1] for step in range(2 * trainer.steps_per_epoch) for batch in trainer.batches.of_step(step))
    assert padded_to(row_widths(data.train, 24, True).max(), length_multiple()) == widest


def test_a_run_begun_when_validation_files_were_not_read_goes_on_without(make_lm, tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in make_rows(6))
    (tmp_path / "train.jsonl").write_text(lines)
    lm = make_lm()
    trainer = ft.Trainer(lm, ft.load_data(tmp_path, lm.tokenizer), ft.TrainConfig(iters=4, batch_size=2), run_dir=tmp_path / "run")
    trainer.run(2)
    trainer.save()
    (tmp_path / "validation.jsonl").write_text(lines)  # as if it had been there, unread
    resumed = ft.Trainer.resume(tmp_path / "run")
    assert resumed.data.valid is None and resumed.data.fingerprint == trainer.data.fingerprint
    (tmp_path / "validation.jsonl").rename(tmp_path / "valid.jsonl")
    with pytest.raises(CheckpointError, match="the data differs"):
        ft.Trainer.resume(tmp_path / "run")
