"""What a trainer tells before its first step: notes on the data, rows too long for the model, settings without effect. Each once."""

import json

import pytest

import fulltune_nb as ft
from fulltune_nb.full import main
from nbs_tests.conftest import CHATML
from nbs_tests.training.conftest import TINY_LLAMA, make_rows

# Nothing ends a turn but the next one, as in GLM's templates.
ENDLESS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def told(trainer, kind):
    return [event.message for event in trainer.history.events if event.kind == kind]


def trainer_of(make_tokenizer, template=CHATML, run_dir=None, splits=("train", "valid"), rows=6, model=(), **settings):
    tokenizer = make_tokenizer(template)
    lm = ft.LanguageModel.from_config({**TINY_LLAMA, **dict(model)}, tokenizer, seed=1)
    config = ft.TrainConfig(**{"iters": 4, "mask_prompt": True, **settings})
    return ft.Trainer(lm, ft.load_data({name: make_rows(rows) for name in splits}, tokenizer, config=config), config, run_dir)


def test_notes_of_the_data_are_events_once_also_after_a_resume(make_tokenizer, tmp_path):
    trainer = trainer_of(make_tokenizer, ENDLESS, tmp_path / "run")
    assert told(trainer, "data") == trainer.data.notes and "has no end token" in trainer.data.notes[0]
    trainer.run(2)
    resumed = ft.Trainer.resume(tmp_path / "run", data=trainer.data)
    assert told(resumed, "data") == trainer.data.notes
    assert told(resumed.fork(), "data") == trainer.data.notes
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "data" for line in lines) == len(trainer.data.notes)


def test_rows_longer_than_the_models_positions_are_told_by_split(make_tokenizer):
    (train, valid) = told(trainer_of(make_tokenizer, model={"max_position_embeddings": 24}), "positions")
    assert train.startswith("train: ") and valid.startswith("valid: ") and "24 positions" in train and "max_seq_length=24" in train
    for model in ({"max_position_embeddings": 2048}, {"max_position_embeddings": None}):
        assert told(trainer_of(make_tokenizer, model=model), "positions") == []
    assert told(trainer_of(make_tokenizer, model={"max_position_embeddings": 24}, max_seq_length=24), "positions") == []


def test_patience_without_evaluations_is_told(make_tokenizer):
    assert "no valid split" in told(trainer_of(make_tokenizer, splits=("train",), patience=3), "patience")[0]
    assert "val_batches=0" in told(trainer_of(make_tokenizer, patience=3, val_batches=0), "patience")[0]
    assert told(trainer_of(make_tokenizer, patience=3), "patience") == []


@pytest.mark.parametrize("settings", [{"warmup": 4}, {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 10], "warmup": 4}}])
def test_a_warmup_as_long_as_the_run_is_told(make_tokenizer, settings):
    assert "warmup=4" in told(trainer_of(make_tokenizer, **settings), "warmup")[0]
    assert told(trainer_of(make_tokenizer, **{**settings, "iters": 5}), "warmup") == []


def test_a_command_says_each_note_once(make_tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FULLTUNE_PROGRESS", "plain")
    ft.LanguageModel.from_config(TINY_LLAMA, make_tokenizer(ENDLESS), seed=1).save(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(6)))
    flags = ["--model", tmp_path / "model", "--data", tmp_path, "--model-file", tmp_path / "m.npz", "--no-export", "--iters", 1]
    assert main([str(flag) for flag in ["--train", "--patience", 2, *flags]]) == 0
    printed = capsys.readouterr().out
    assert printed.count("has no end token") == 1 and printed.count("patience=2 has no effect") == 1
