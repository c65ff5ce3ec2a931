"""Chat templates that write the date: a run keeps the one of the day on which it began."""

import json
from datetime import date

import pytest

import fulltune_nb as ft
from fulltune_nb.chat_template import ChatRenderer
from fulltune_nb.data.settings import DATE_VARIABLE
from fulltune_nb.errors import CheckpointError, ConfigError
from fulltune_nb.full import main
from nbs_tests.conftest import CHATML
from nbs_tests.training.conftest import TINY_LLAMA, make_rows

# As Llama 3.1 and later: the date goes into a variable where nobody gives one.
DATED = "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}Today: {{ date_string }}\n"
DATED += CHATML
ODD = "\n  {% if true %}\n {{ strftime_now(format='%-d/%B %y %%d %%') }}{% endif %}{% set f = strftime_now %}{{ f('%Y') }}\n"
MESSAGES = [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "ok"}]


@pytest.fixture
def on(monkeypatch):
    """`on("2026-11-29")`: from now on it is that day."""
    return lambda day: monkeypatch.setenv(DATE_VARIABLE, day)


@pytest.fixture
def dated(make_tokenizer):
    """A tokenizer whose chat template writes the date."""
    return make_tokenizer(DATED)


def config(**settings):
    return ft.TrainConfig(**{"iters": 4, "save_every": 2, "batch_size": 4, **settings})


def begun(tokenizer, source, run_dir):
    """A run that was stopped after two of its four steps."""
    lm, data = ft.LanguageModel.from_config(TINY_LLAMA, tokenizer, seed=1), ft.load_data(source, tokenizer, config=config())
    trainer = ft.Trainer(lm, data, config(), run_dir)
    trainer.run(2)
    return data


@pytest.mark.parametrize("template", [DATED, ODD], ids=["llama", "odd"])
def test_a_fixed_date_is_written_as_transformers_writes_today(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    today = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert ChatRenderer(tokenizer, date.today().isoformat()).render(MESSAGES) == today
    assert ChatRenderer(tokenizer, "2024-02-03").render(MESSAGES) != today


def test_a_run_goes_on_another_day_with_its_own_date(dated, on, tmp_path):
    rows = make_rows(8)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    on("2026-11-29")
    data = begun(dated, tmp_path / "data", tmp_path / "a")
    assert data.train[0].text.startswith("Today: 29 Nov 2026") and "2026-11-29" in data.notes[0]
    begun(dated, {"train": rows}, tmp_path / "b")
    begun(dated, {"train": rows}, tmp_path / "c")
    on("2026-11-30")
    assert ft.load_data({"train": rows}, dated).train[0].text.startswith("Today: 30 Nov 2026")
    from_folder = ft.Trainer.resume(tmp_path / "a")
    from_memory = ft.Trainer.resume(tmp_path / "b", data=ft.load_data({"train": rows}, dated))
    lm = ft.LanguageModel.from_config(TINY_LLAMA, dated, seed=1)
    automatic = ft.Trainer(lm, ft.load_data({"train": rows}, dated), config(), tmp_path / "c", resume="auto")
    for trainer in (from_folder, from_memory, automatic):
        assert trainer.step_count == 2 and trainer.config.template_date == "2026-11-29"
        assert trainer.data.fingerprint == data.fingerprint and trainer.fork().data.fingerprint == data.fingerprint


def test_another_date_that_was_asked_for_or_cannot_be_changed_is_refused_by_name(dated, on, tmp_path):
    on("2026-11-29")
    begun(dated, {"train": make_rows(8)}, tmp_path / "a")
    on("2026-11-30")
    asked_for = ft.load_data({"train": make_rows(8)}, dated, template_date="2026-12-01")
    read_once = ft.load_data({"train": iter(make_rows(8))}, dated)
    for data in (asked_for, read_once):
        with pytest.raises(CheckpointError, match=r"load_data\(..., template_date='2026-11-29'\)"):
            ft.Trainer.resume(tmp_path / "a", data=data)
    with pytest.raises(ConfigError, match="template_date: expected a date"):
        ft.load_data({"train": make_rows(8)}, dated, template_date="tomorrow")


def test_data_without_a_date_in_it_has_none(dated, tokenizer):
    assert ft.load_data({"train": [{"text": "What?"}]}, dated).settings.template_date is None
    assert ft.load_data({"train": make_rows(2)}, tokenizer).settings.template_date is None


def test_a_command_tests_a_model_file_on_the_rows_of_its_day(dated, on, tmp_path, capsys):
    ft.LanguageModel.from_config(TINY_LLAMA, dated, seed=1).save(tmp_path / "model")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(6)))
    flags = ["--model", tmp_path / "model", "--data", tmp_path, "--model-file", tmp_path / "m.npz", "--no-export", "--iters", 1, "--test"]
    printed = []
    for day, more in (("2026-11-29", ["--train"]), ("2026-11-30", []), ("2026-11-30", ["--template-date", "2026-11-30"])):
        on(day)
        assert main([str(flag) for flag in [*flags, *more]]) == 0
        printed.append([line for line in capsys.readouterr().out.splitlines() if "Test loss" in line or "template_date" in line])
    assert printed[0] == printed[1] != printed[2]
