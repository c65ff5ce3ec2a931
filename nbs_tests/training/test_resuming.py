"""A resumed run is bit for bit the run that was never stopped, or says why it cannot be."""

import gc
import json
import os
import shutil

import mlx.core as mx
import pytest

import fulltune_nb as ft
from fulltune_nb.errors import CheckpointError, ConfigError, DataError
from fulltune_nb.models.folder import hf_tensors
from fulltune_nb.training.config import OPTIMIZERS
from fulltune_nb.training.state import read_optimizer, read_state
from nbs_tests.gpu_like import gpu_like
from nbs_tests.training.conftest import make_rows

STEPS = 30
COMMON = {"rows": 11, "batch_size": 2, "grad_accumulation_steps": 2, "iters": STEPS, "lr_schedule": "cosine", "steps_per_eval": 7}
WAYS = [{"optimizer": name} for name in OPTIMIZERS] + [{"grad_checkpoint": True, "max_grad_norm": 0.5, "freeze": ("*norm*",)}]
WAYS += [{"packing": True}, {"backward": "layerwise"}, {"backward": "layerwise", "optimizer": "adafactor", "max_grad_norm": 0.5}]
WAYS += [{"weights": "bfloat16", "backward": way, "optimizer": "adamw8bit"} for way in ("whole", "layerwise")]
MASKED = {"mask_prompt": True}
WAYS_BUT_THE_FIRST_IN_CI = [WAYS[0], *(pytest.param(way, marks=pytest.mark.ci) for way in WAYS[1:])]


def same_arrays(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and mx.array_equal(one[name], other[name], equal_nan=True).item() for name in one
    )


def untimed(report):
    values = report.to_dict()
    return {name: value for name, value in values.items() if "second" not in name and "memory" not in name and name != "time"}


@pytest.mark.parametrize("settings", WAYS_BUT_THE_FIRST_IN_CI, ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()))
def test_from_every_checkpoint_the_next_step_is_the_one_that_was_taken(make_trainer, make_lm, make_data, tmp_path, settings):
    """Each checkpoint is the whole state: if the step from k to k + 1 is the same for all k, so is the run from any k."""
    straight = make_trainer(**COMMON, **settings, save_every=1, keep=STEPS + 1, run_dir=tmp_path / "straight")
    straight.run()
    del straight
    gc.collect()
    lm, data = make_lm(), make_data(11, config=ft.TrainConfig.from_yaml(tmp_path / "straight" / "config.yaml"))
    for step in range(STEPS):
        source, run = tmp_path / "straight", tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        (run / "checkpoints").mkdir(parents=True)
        shutil.copy(source / "config.yaml", run)
        shutil.copytree(source / "checkpoints" / f"step-{step:06d}", run / "checkpoints" / f"step-{step:06d}")
        trainer = ft.Trainer.resume(run, lm=lm, data=data)
        next(trainer.steps())
        following = source / "checkpoints" / f"step-{step + 1:06d}"
        state = read_state(following)
        assert same_arrays(trainer.optimizers.state_arrays(), read_optimizer(following)), step
        assert same_arrays(hf_tensors(trainer.lm.model), mx.load(str(following / "model.safetensors"))), step
        then = [untimed(report) for report in ft.History.from_jsonable(state["history"]) if report.kind_of_report != "event"]
        assert [untimed(report) for report in trainer.history if report.kind_of_report != "event"] == then
        assert trainer.patience.to_dict() == state["patience"] and trainer.learning_rate == state["learning_rate"]


def test_the_random_state_goes_on_too(make_trainer, make_data, tmp_path):
    mx.random.seed(12345)
    mx.random.normal((3,))
    trainer = make_trainer(run_dir=tmp_path / "run")
    trainer.run(1)
    trainer.save()
    expected = mx.random.normal((4,)).tolist()
    mx.random.seed(7)
    ft.Trainer.resume(tmp_path / "run", lm=trainer.lm, data=make_data(10, **MASKED))
    assert mx.random.normal((4,)).tolist() == expected


def test_what_an_interrupt_kept_from_being_done_is_done_on_resuming(make_trainer, make_data, tmp_path):
    """Stopped between a step and the evaluation due after it: the evaluation, which counts towards patience, comes first."""
    straight = make_trainer(steps_per_eval=3)
    straight.run()
    stopped = make_trainer(steps_per_eval=3, run_dir=tmp_path / "run")
    stopped.run(2)
    stopped.step()
    stopped.save()
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, **MASKED))
    resumed.run()
    assert [untimed(r) for r in resumed.history.evals] == [untimed(r) for r in straight.history.evals]
    assert [untimed(r) for r in resumed.history.steps] == [untimed(r) for r in straight.history.steps]


def test_a_run_that_was_killed_before_its_last_evaluation_ends_as_one_that_was_not(make_trainer, make_data, tmp_path):
    stopped = make_trainer(steps_per_eval=3, iters=4, run_dir=tmp_path / "run")
    stopped.run(3)
    stopped.step()
    stopped.save()
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, **MASKED))
    assert resumed.done and not (tmp_path / "run" / "result.json").exists()
    resumed.run()
    assert resumed.history.evals[-1].step == 4 and (tmp_path / "run" / "result.json").exists()
    entries = len(resumed.history)
    resumed.run()
    assert len(resumed.history) == entries


# ---- what is refused, and what is told -----------------------------------------------------------------------------------------


@pytest.fixture
def run(make_trainer, tmp_path):
    """The directory of a run of 3 steps of 8."""
    trainer = make_trainer(run_dir=tmp_path / "run")
    trainer.run(3)
    trainer.save()
    return tmp_path / "run"


def change_config(run, **changes):
    ft.TrainConfig.from_yaml(run / "config.yaml").replace(**changes).to_yaml(run / "config.yaml")


def test_settings_that_change_the_weights_are_refused_by_name_unless_forced(run, make_data):
    change_config(run, learning_rate=5e-4, seed=3, save_every=7)
    with pytest.raises(CheckpointError) as caught:
        ft.Trainer.resume(run, data=make_data(10, **MASKED))
    message = str(caught.value)
    assert "learning_rate was 0.001 and is 0.0005" in message and "seed was 0 and is 3" in message and "force=True" in message
    assert "save_every" not in message
    resumed = ft.Trainer.resume(run, data=make_data(10, **MASKED), force=True)
    assert resumed.config.seed == 3 and resumed.learning_rate == pytest.approx(5e-4)
    assert any("learning_rate was" in event.message for event in resumed.history.events)


def test_settings_that_change_no_weight_are_taken_over_and_told(run, make_data):
    change_config(run, save_every=7, keep=1, iters=12)
    resumed = ft.Trainer.resume(run, data=make_data(10, **MASKED))
    assert (resumed.config.save_every, resumed.config.keep, resumed.total_steps) == (7, 1, 12)
    assert any("iters was 8 and is 12" in event.message for event in resumed.history.events)


def test_more_steps_are_refused_where_the_schedule_depends_on_them(make_trainer, make_data, tmp_path):
    make_trainer(run_dir=tmp_path / "run", lr_schedule="cosine").run(2)
    change_config(tmp_path / "run", iters=20)
    with pytest.raises(CheckpointError, match="iters was 8 and is 20"):
        ft.Trainer.resume(tmp_path / "run", data=make_data(10, **MASKED))


def test_a_config_that_cannot_be_read_is_an_error_with_its_line_and_one_that_is_gone_is_told(run, make_data):
    (run / "config.yaml").write_text("iters: 8\nlerning_rate: 1e-3\n")
    with pytest.raises(ConfigError, match=r"config.yaml:2: unknown setting 'lerning_rate'"):
        ft.Trainer.resume(run, data=make_data(10, **MASKED))
    (run / "config.yaml").unlink()
    resumed = ft.Trainer.resume(run, data=make_data(10, **MASKED))
    assert any("config.yaml is missing" in event.message for event in resumed.history.events)


def test_another_model_is_refused_by_what_differs(run, make_lm, make_data):
    with pytest.raises(CheckpointError, match="rope was .* and is"):
        ft.Trainer.resume(run, lm=make_lm(rope_theta=5e5), data=make_data(10, **MASKED))
    forced = ft.Trainer.resume(run, lm=make_lm(rope_theta=5e5), data=make_data(10, **MASKED), force=True)
    assert any("the model given is not the one" in event.message for event in forced.history.events)


def test_settings_of_the_data_that_differ_are_named(run, make_data):
    with pytest.raises(CheckpointError, match="data differs"):
        ft.Trainer.resume(run, data=make_data(10))
    with pytest.raises(ConfigError, match="mask_prompt"):
        ft.Trainer.resume(run, data=make_data(10), force=True)
    with pytest.raises(DataError, match="expected what load_data returns"):
        ft.Trainer.resume(run, data=[1, 2])


def test_other_versions_are_told(run, make_data):
    checkpoint = run / "checkpoints" / "step-000003"
    rewrite_state(checkpoint, lambda state: state["versions"].update(mlx="0.1.0"))
    resumed = ft.Trainer.resume(run, data=make_data(10, **MASKED))
    assert any("mlx was 0.1.0" in event.message for event in resumed.history.events)


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"device": "gpu Apple M9", "float32 products": "TF32"}, "device was gpu Apple M9, is "),
        ({"BLAS": "MKL 2026.0, threads: 64"}, "BLAS was MKL 2026.0, threads: 64, is "),
        ({"BLAS kernels": "Z80"}, "BLAS kernels was Z80, is "),
        ({"kernels": "somebody's"}, "kernels was somebody's, is "),
    ],
    ids=["another device", "another BLAS", "another processor", "other kernels"],
)
def test_other_arithmetic_is_told_by_a_resume_and_by_a_restore(run, make_data, make_trainer, capsys, there, told):
    checkpoint = run / "checkpoints" / "step-000003"
    rewrite_state(checkpoint, lambda state: state["versions"].update(there))
    restored = make_trainer()
    restored.restore(checkpoint)
    resumed = ft.Trainer.resume(run, data=make_data(10, **MASKED))
    assert all(sum(told in event.message for event in trainer.history.events) == 1 for trainer in (restored, resumed))
    digits = "from the fourth digit on" if "float32 products" in there else "in the last digits"
    assert any(f"may differ {digits}" in event.message for event in resumed.history.events)
    resumed.run(1)
    assert told in capsys.readouterr().out  # where no notebook is, a line on the screen


def test_a_resume_with_other_threads_or_on_another_device_is_told_and_on_the_same_nothing_is(run, make_data, monkeypatch):
    def told():
        resumed = ft.Trainer.resume(run, data=make_data(10, **MASKED))
        return [event.message for event in resumed.history.events if "arithmetic" in event.message]

    assert not told()
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "13")
    assert "threads: 13" in told()[0]
    with gpu_like():
        assert "is gpu Apple M3 Max" in told()[0]


def rewrite_state(checkpoint, change):
    """Changes a checkpoint's state, and its manifest to match."""
    import hashlib

    state = json.loads((checkpoint / "trainer.json").read_text())
    change(state)
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["trainer.json"] = hashlib.sha256((checkpoint / "trainer.json").read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_data_folder_that_moved_is_passed_by_its_new_place(make_lm, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(6)))
    config = ft.TrainConfig(iters=4, batch_size=2, mask_prompt=True)
    lm = make_lm()
    ft.Trainer(lm, ft.load_data(tmp_path / "data", lm.tokenizer, config=config), config, tmp_path / "run").run(2)
    gc.collect()
    os.rename(tmp_path / "data", tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"data was in .*data, where there is no folder now.*data='new/place'"):
        ft.Trainer.resume(tmp_path / "run")
    resumed = ft.Trainer.resume(tmp_path / "run", data=tmp_path / "moved")
    assert resumed.data.source == str(tmp_path / "moved")
    resumed.run()
    assert resumed.done


def test_a_damaged_checkpoint_is_put_away_and_never_crowds_out_a_whole_one(make_trainer, make_data, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", save_every=2, keep=2)
    trainer.run(6)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-000006" / "optimizer.safetensors").write_bytes(b"")
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, **MASKED))
    assert resumed.step_count == 4 and "now called damaged-step-000006" in resumed.history.events[0].message
    assert (checkpoints / "damaged-step-000006" / "trainer.json").exists()
    resumed.run(1)
    resumed.save()
    assert ft.Trainer.resume(tmp_path / "run", data=make_data(10, **MASKED)).step_count == 5


def test_a_refused_resume_leaves_the_run_as_it_was(run, make_data):
    before = sorted(path.relative_to(run).as_posix() for path in run.rglob("*"))
    gc.collect()
    with pytest.raises(CheckpointError):
        ft.Trainer.resume(run, data=make_data(11, **MASKED))
    after = sorted(path.relative_to(run).as_posix() for path in run.rglob("*"))
    assert after == [name for name in before if name != "run.lock"]
    ft.Trainer.resume(run, data=make_data(10, **MASKED))


def test_a_run_from_a_multimodal_folder_goes_on_with_that_folder_loaded_again(make_lm, make_data, tmp_path):
    lm = make_lm()
    text = json.loads((lm.save(tmp_path / "text") / "config.json").read_text())
    whole = shutil.copytree(tmp_path / "text", tmp_path / "whole")
    (whole / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    arrays = {f"language_model.{name}": array for name, array in hf_tensors(lm.model).items()}
    mx.save_safetensors(str(whole / "model.safetensors"), {**arrays, "vision_tower.weight": mx.ones((2, 2))})
    config = ft.TrainConfig(batch_size=2, iters=2, save_every=1, mask_prompt=True)
    with pytest.warns(UserWarning, match="Left aside: vision_tower"):
        lms = [ft.load_model(whole) for _ in range(2)]
    ft.Trainer(lms[0], make_data(6, config=config), config, tmp_path / "run").run(1)
    trainer = ft.Trainer(lms[1], make_data(6, config=config), config, tmp_path / "run", resume="auto")
    assert trainer.step_count == 1 and trainer.lm.config.part_of == "llava"
