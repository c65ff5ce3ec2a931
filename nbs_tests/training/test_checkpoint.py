"""Checkpoints are whole, and a resumed run is bit for bit the run that was never stopped."""

import gc
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.errors import CheckpointError
from fulltune_nb.training import state as checkpoint_module
from nbs_tests.training.conftest import make_rows
from nbs_tests.training.test_trainer import weights_of


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor", "lion", "muon"])
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_resumed_run_equals_the_uninterrupted_one(make_trainer, make_data, tmp_path, optimizer, stop):
    settings = {"rows": 11, "iters": 9, "grad_accumulation_steps": 2, "batch_size": 2, "optimizer": optimizer, "lr_schedule": "cosine"}
    straight = make_trainer(**settings)
    straight.run()
    first = make_trainer(**settings, run_dir=tmp_path / "run")
    first.run(stop)
    first.save()
    second = ft.Trainer.resume(tmp_path / "run", data=make_data(11, mask_prompt=True))
    assert second.step_count == stop
    second.run()
    assert [r.loss for r in second.history.steps] == [r.loss for r in straight.history.steps]
    for name, array in weights_of(straight).items():
        assert np.array_equal(weights_of(second)[name], array), name


def test_resume_finds_data_and_model_by_itself(make_lm, tokenizer, tmp_path):
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in make_rows(6))
    (tmp_path / "data" / "train.jsonl").write_text(lines)
    config = ft.TrainConfig(iters=4, batch_size=2, mask_prompt=True)
    lm = ft.load_model(make_lm().save(tmp_path / "base"))
    trainer = ft.Trainer(lm, ft.load_data(tmp_path / "data", lm.tokenizer, config=config), config, tmp_path / "run")
    trainer.run(2)
    trainer.save()
    resumed = ft.Trainer.resume(tmp_path / "run")
    assert resumed.lm.source == str(tmp_path / "base") and resumed.config == trainer.config
    resumed.run()
    assert resumed.done


def test_a_rate_set_by_hand_survives_resuming(make_trainer, make_data, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", lr_schedule="linear")
    trainer.run(2)
    trainer.set_next_learning_rate(3e-5)
    trainer.save()
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, mask_prompt=True))
    assert resumed.learning_rate == trainer.learning_rate == pytest.approx(3e-5)
    assert [event.kind for event in resumed.history.events] == ["learning_rate", "resume"]


def test_a_step_0_checkpoint_precedes_the_first_step_and_old_ones_rotate(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", save_every=2, keep=2)
    trainer.step()
    assert checkpoints(tmp_path / "run") == ["step-000000"]
    trainer.run()
    assert checkpoints(tmp_path / "run") == ["step-000006", "step-000008"]


def test_a_checkpoint_is_a_model_folder_and_best_is_the_lowest_validation_loss(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", steps_per_eval=2)
    trainer.run()
    again = ft.load_model(tmp_path / "run" / "checkpoints" / "step-000008")
    ids = mx.array([[1, 2, 3]])
    assert mx.array_equal(again.model(ids), trainer.lm.model(ids))
    best = ft.load_model(tmp_path / "run" / "best")
    lowest = min(report.loss for report in trainer.history.evals)
    evaluated = ft.Trainer(best, trainer.data, trainer.config).evaluate("valid")
    assert evaluated.loss == pytest.approx(lowest, rel=1e-5)


def test_a_damaged_checkpoint_is_passed_over_and_said_so(make_trainer, make_data, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", save_every=2)
    trainer.run()
    newest = tmp_path / "run" / "checkpoints" / "step-000008" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(bytes(content))
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, mask_prompt=True))
    assert resumed.step_count == 6
    assert "step-000008" in resumed.history.events[0].message
    resumed.run()
    assert [r.loss for r in resumed.history.steps] == [r.loss for r in trainer.history.steps]


def test_a_failed_save_leaves_the_earlier_checkpoint_and_no_litter(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(run_dir=tmp_path / "run")
    trainer.run(1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_tensors", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        trainer.save()
    assert checkpoints(tmp_path / "run") == ["step-000000"]


def test_data_that_changed_is_refused_unless_forced(make_trainer, make_data, tmp_path):
    make_trainer(run_dir=tmp_path / "run").run(1)
    other = make_data(11, mask_prompt=True)
    with pytest.raises(CheckpointError, match="data differs"):
        ft.Trainer.resume(tmp_path / "run", data=other)
    resumed = ft.Trainer.resume(tmp_path / "run", data=other, force=True)
    assert "data differs" in resumed.history.events[0].message


def test_data_in_memory_must_be_passed_again(make_trainer, tmp_path):
    make_trainer(run_dir=tmp_path / "run").run(1)
    with pytest.raises(CheckpointError, match="in memory"):
        ft.Trainer.resume(tmp_path / "run")


def test_a_run_dir_in_use_and_one_without_checkpoints_are_refused(make_trainer, tmp_path):
    make_trainer(run_dir=tmp_path / "run").run(1)
    with pytest.raises(CheckpointError, match="already holds a run"):
        make_trainer(run_dir=tmp_path / "run")
    with pytest.raises(CheckpointError, match="No whole checkpoint"):
        ft.Trainer.resume(tmp_path / "nothing")


def test_a_run_killed_before_its_first_checkpoint_was_whole_is_begun_again_in_the_same_folder(make_trainer, tmp_path):
    """What is there at such an instant: settings, an evaluation, the lock of a dead process, a checkpoint half written."""
    run = tmp_path / "run"
    make_trainer(run_dir=run, iters=3, steps_per_eval=2).run(1)
    gc.collect()
    (run / "checkpoints" / "step-000000").rename(run / "checkpoints" / ".step-000000-x1y2z3a4")
    shutil.rmtree(run / "checkpoints" / "step-000001", ignore_errors=True)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines if '"kind": "step"' not in line) + '{"kind": "st')
    with pytest.raises(CheckpointError, match="No whole checkpoint"):
        ft.Trainer.resume(run)
    trainer, straight = (make_trainer(run_dir=folder, iters=3, steps_per_eval=2) for folder in (run, tmp_path / "straight"))
    trainer.run()
    straight.run()
    assert [r.loss for r in trainer.history.steps] == [r.loss for r in straight.history.steps]
    assert not [path for path in run.rglob(".*")]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len((tmp_path / "straight" / "metrics.jsonl").read_text().splitlines())


def test_metrics_have_a_line_an_entry_and_are_cut_back_by_resuming(make_trainer, make_data, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", save_every=3)
    trainer.run(5)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000005", ignore_errors=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(trainer.history)
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, mask_prompt=True))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert resumed.step_count == 3
    assert [json.loads(line)["kind"] for line in lines] == ["eval", "step", "step", "step"]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["resume"]
