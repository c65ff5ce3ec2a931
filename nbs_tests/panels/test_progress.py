"""What `Trainer.run` shows: which shape where, and what each shape says."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import fulltune_nb as ft
from fulltune_nb.errors import ConfigError
from fulltune_nb.panels import progress as module
from fulltune_nb.panels.progress import NotebookProgress, PlainProgress, TerminalProgress, clock, progress
from fulltune_nb.training.history import EvalReport, Event, History, StepReport
from nbs_tests.conftest import CHATML


class Clock:
    """Time that moves when told to."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def moment(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


class FakeTrainer:
    """Calls a callback as `Trainer.run` does; every step takes a second of the clock's time."""

    def __init__(self, callback, moment, total=30, every=10):
        self.callback, self.moment = callback, moment
        self.config, self.data = SimpleNamespace(steps_per_report=every), SimpleNamespace(notes_shown=False)
        self.total_steps, self.step_count = total, 0
        self.history, self.state, self.status, self.run_dir = History(), "done", "running", None
        self.doing = self.failure = ""

    def run(self, n=None, seconds=1.0):
        target = self.total_steps if n is None else self.step_count + n
        self.callback.on_start(self, target)
        while self.step_count < target:
            self.step(seconds)
        self.callback.on_end(self)

    def step(self, seconds=1.0):
        self.moment.now += seconds
        self.step_count += 1
        loss = 4.0 - self.step_count / 10
        report = StepReport(self.step_count, self.step_count / 20, loss, 100, 1e-5, 1.0, seconds, 100 / seconds, 520_000_000)
        self.history.append(report)
        self.callback.on_step(self, report)

    def evaluate(self):
        self.callback.on_eval(self, EvalReport("valid", self.step_count, 2.5, 12.18, 12345, 3.25))

    def event(self, kind, message):
        self.callback.on_event(self, Event(self.step_count, kind, message, 0.0))


# -- which shape --------------------------------------------------------------------------------------------------


SHAPES = [("terminal", TerminalProgress), ("notebook", NotebookProgress), ("plain", PlainProgress), ("off", object)]


@pytest.mark.parametrize("name, shape", SHAPES)
def test_the_variable_chooses_the_shape(monkeypatch, name, shape):
    monkeypatch.setenv("FULLTUNE_PROGRESS", name.upper())
    assert type(progress()) is shape


@pytest.mark.parametrize("value", [None, "", "auto"])
def test_by_itself_it_goes_by_kernel_then_terminal(monkeypatch, value):
    monkeypatch.delenv("FULLTUNE_PROGRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("FULLTUNE_PROGRESS", value)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert type(progress()) is PlainProgress
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert type(progress()) is TerminalProgress
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))  # IPython in a terminal
    assert type(progress()) is TerminalProgress
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object())))
    assert type(progress()) is NotebookProgress


def test_an_unknown_shape_is_an_error_that_lists_the_known(monkeypatch):
    monkeypatch.setenv("FULLTUNE_PROGRESS", "loud")
    with pytest.raises(ConfigError, match="FULLTUNE_PROGRESS: expected auto, terminal, notebook, plain, off, got 'loud'"):
        progress()


# -- plain --------------------------------------------------------------------------------------------------------


def test_plain_says_a_line_every_n_steps_and_one_at_the_end(moment, capsys):
    FakeTrainer(PlainProgress(), moment, total=25).run()
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "step 10/25: loss 3.450, lr 1.00e-05, 100 tokens/s, peak 0.52 GB, 0:15 left",
        "step 20/25: loss 2.450, lr 1.00e-05, 100 tokens/s, peak 0.52 GB, 0:05 left",
        "step 25/25: loss 1.950, lr 1.00e-05, 100 tokens/s, peak 0.52 GB, 0:00 left",
        "step 25/25: done after 0:25, peak 0.52 GB",
    ]
    assert err == ""


def test_plain_tells_of_evaluations_saves_and_events_in_whole_lines(moment, capsys):
    trainer = FakeTrainer(PlainProgress(), moment, every=100)
    trainer.callback.on_start(trainer, 30)
    trainer.step()
    trainer.evaluate()
    trainer.callback.on_save(trainer, "runs/a/checkpoints/000001")
    trainer.event("learning_rate", "learning rate changed\r\nfrom 1 to 2")
    assert capsys.readouterr().out.splitlines() == [
        "step 1/30: valid loss 2.500, perplexity 12.180 (12,345 tokens, 3.2 s)",
        "step 1/30: saved runs/a/checkpoints/000001",
        "step 1/30: learning rate changed from 1 to 2",
    ]


def test_plain_does_not_stay_silent_for_long_when_steps_are_slow(moment, capsys):
    FakeTrainer(PlainProgress(), moment, total=5, every=1000).run(seconds=40.0)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["step 2/5", "step 4/5", "step 5/5", "step 5/5"]


def test_time_left_leaves_the_first_step_out_since_it_compiles(moment, capsys):
    trainer = FakeTrainer(PlainProgress(), moment, total=20)
    trainer.callback.on_start(trainer, 20)
    trainer.step(seconds=100.0)
    capsys.readouterr()
    for _ in range(9):
        trainer.step(seconds=1.0)
    assert "0:10 left" in capsys.readouterr().out


def test_time_left_counts_what_happens_between_the_steps(moment, capsys):
    trainer = FakeTrainer(PlainProgress(), moment, total=20)
    trainer.callback.on_start(trainer, 20)
    for _ in range(10):
        trainer.step(seconds=1.0)
        moment.now += 1.0  # such as an evaluation
    assert "0:20 left" in capsys.readouterr().out


def test_a_pause_is_no_part_of_the_pace_and_does_not_forget_it(moment):
    trainer = FakeTrainer(PlainProgress(), moment)
    pace = module.Pace(10)
    trainer.callback = SimpleNamespace(on_step=lambda _, report: pace.add(report))
    for _ in range(3):
        trainer.step(seconds=2.0)
        moment.now += 1.0
    pace.rest()
    assert pace.seconds_left(10) == 30.0
    moment.now += 1000.0
    for _ in range(2):
        trainer.step(seconds=4.0)
        moment.now += 1.0
    assert pace.seconds_left(10) == 50.0


def test_what_happened_before_the_run_is_told_at_its_start_once(moment, capsys):
    trainer = FakeTrainer(PlainProgress(), moment, every=100)
    trainer.history.append(Event(0, "dtype", "weights were bfloat16", 0.0))
    trainer.run(2)
    trainer.history.append(Event(2, "pause", "interrupted", 0.0))
    trainer.history.append(Event(2, "learning_rate", "learning rate changed", 0.0))
    trainer.callback = PlainProgress()
    trainer.run(2)
    out = capsys.readouterr().out
    assert out.count("weights were bfloat16") == 1 and out.count("learning rate changed") == 1 and "interrupted" not in out


@pytest.mark.parametrize("shape", [PlainProgress, TerminalProgress])
@pytest.mark.parametrize("state", ["paused", "done", "stopped early", "failed"])
def test_the_last_line_says_how_the_trainer_says_that_the_run_ended(moment, capsys, state, shape):
    trainer = FakeTrainer(shape(), moment)
    trainer.state, trainer.failure = state, "why" * (state == "failed")
    trainer.run(3)
    out, err = capsys.readouterr()
    last = (out or err).splitlines()[-1]
    assert re.match(f"step 3(/30)?: {state} after 0:03", last) and last.endswith(": why") == (state == "failed")


@pytest.mark.parametrize("shape, seconds", [(PlainProgress, 61.0), (TerminalProgress, 1.0)])
def test_what_is_done_beside_steps_is_shown(moment, capsys, shape, seconds):
    trainer = FakeTrainer(shape(), moment)
    trainer.callback.on_start(trainer, 30)
    trainer.step()
    moment.now += seconds  # plain lines stay silent for a minute
    trainer.doing = trainer.status = "evaluating valid 12 of 50"
    trainer.callback.on_doing(trainer)
    trainer.doing = ""
    trainer.callback.on_doing(trainer)
    shown = "".join(capsys.readouterr())
    assert "evaluating valid 12 of 50" in shown
    if shape is TerminalProgress:  # it does not stay there in the step to come
        assert shown.rindex("loss 3.900") > shown.rindex("evaluating")


# -- terminal -----------------------------------------------------------------------------------------------------


def test_the_terminal_has_a_bar_with_lines_above_it_on_standard_error(moment, capsys):
    trainer = FakeTrainer(TerminalProgress(), moment, total=12)
    trainer.callback.on_start(trainer, 12)
    for _ in range(12):
        trainer.step()
    trainer.evaluate()
    trainer.event("early_stop", "no better loss")
    trainer.callback.on_end(trainer)
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line.strip() for line in re.split(r"[\r\n]+", err)]
    assert "step 12: valid loss 2.500, perplexity 12.180 (12,345 tokens, 3.2 s)" in lines
    assert "step 12: no better loss" in lines
    assert "100%" in err and "12/12" in err and "loss 3.250, lr 1.00e-05, 100 tokens/s" in err


def test_a_bar_of_a_resumed_run_begins_where_the_run_stands(moment, capsys):
    trainer = FakeTrainer(TerminalProgress(), moment, total=100)
    trainer.step_count = 50
    trainer.run(10)
    err = capsys.readouterr().err
    assert "50/60" in err and "60/60" in err


def test_the_bar_is_drawn_on_a_terminal_that_does_not_tell_its_size():
    code = "from nbs_tests.panels.test_progress import FakeTrainer, Clock; from fulltune_nb.panels.progress import progress\n"
    code += "from fulltune_nb.panels import progress as module; module.time = Clock(); FakeTrainer(progress(), module.time, total=5).run()"
    leader, follower = os.openpty()  # 0 lines of 0 columns
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "FULLTUNE_PROGRESS")}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], stderr=follower, stdin=follower, check=True, env=environment, cwd=root, timeout=120)
    os.close(follower)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert "0/5" in shown and "5/5" in shown and "loss 3.700, lr 1.00e-05, 100 tokens/s" in shown


# -- notebook -----------------------------------------------------------------------------------------------------


class Shown:
    """Stands in for IPython's display."""

    def __init__(self):
        self.bundles = []

    def __call__(self, bundle, raw, display_id, metadata=None):
        assert raw and display_id
        self.bundles.append(bundle)
        return self

    def update(self, bundle, raw, metadata=None):
        assert raw
        self.bundles.append(bundle)


@pytest.fixture
def shown(monkeypatch):
    made = Shown()
    monkeypatch.setattr("IPython.display.display", made)
    return made


def test_a_notebook_is_updated_at_most_once_a_second(moment, shown):
    FakeTrainer(NotebookProgress(), moment, total=100).run(seconds=0.05)
    assert 5 <= len(shown.bundles) <= 5 + 2  # 5 seconds, the start and the end


def test_a_notebook_ends_with_a_record_that_tells_everything(moment, shown):
    trainer = FakeTrainer(NotebookProgress(), moment, total=1200)
    trainer.callback.on_start(trainer, 1200)
    for _ in range(20):
        trainer.step(0.01)
    trainer.evaluate()
    trainer.event("learning_rate", "changed")
    trainer.callback.on_save(trainer, "runs/a")
    trainer.state = "paused"
    trainer.callback.on_end(trainer)
    page, text = shown.bundles[-1]["text/html"], shown.bundles[-1]["text/plain"]
    for part in ("step 20 of 1,200: paused after 0:00", "0.52 GB", "10,000 tokens/s", "2.5000", "12.180", "changed", "runs/a", "1.00"):
        assert part in page
    assert text.startswith("step 20 of 1,200: paused after 0:00, epoch 1.00, loss 2.4500")


def test_a_notebook_says_when_it_was_written_until_the_run_is_done(moment, shown):
    trainer = FakeTrainer(NotebookProgress(), moment)
    trainer.state = "running"
    trainer.callback.on_start(trainer, 30)
    trainer.step()
    for kind in ("text/html", "text/plain"):
        assert re.search(r"Written at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d .*may have gone on since", shown.bundles[-1][kind])
    trainer.state = "done"
    trainer.callback.on_end(trainer)
    assert "Written at" not in str(shown.bundles[-1])


def test_a_notebook_shows_training_beside_validation_loss_a_curve_and_how_many_are_not_shown(moment, shown):
    trainer = FakeTrainer(NotebookProgress(), moment)
    trainer.callback.on_start(trainer, 30)
    for number in range(10):
        trainer.step()
        trainer.evaluate()
        trainer.event("note", f"number {number}")
    trainer.callback.on_end(trainer)
    page = shown.bundles[-1]["text/html"]
    assert "Evaluations: the last 8 of 10" in page and "Events: the last 8 of 10" in page and "number 1<" not in page
    row = re.findall(r"<tr>(.*?)</tr>", page.split("Evaluations")[1].split("</table>")[0])[-1]
    assert re.findall(r">([^<]+)<", row)[:4] == ["10", "3.4500", "valid", "2.5000"]
    assert "<polyline" in page and "training loss over 10 steps" in page


def test_foreign_text_is_shown_as_text(moment, shown):
    trainer = FakeTrainer(NotebookProgress(), moment)
    trainer.callback.on_start(trainer, 30)
    trainer.event("note", "<img src=x onerror=alert(1)>")
    trainer.callback.on_end(trainer)
    assert "<img" not in shown.bundles[-1]["text/html"] and "&lt;img" in shown.bundles[-1]["text/html"]


def test_a_run_of_no_steps_is_shown_too(moment, shown):
    FakeTrainer(NotebookProgress(), moment, total=0).run()
    assert "step 0 of 0" in shown.bundles[-1]["text/plain"]


def test_times_are_readable():
    assert [clock(s) for s in (0, 5.4, 200, 3723, -1)] == ["0:00", "0:05", "3:20", "1:02:03", "0:00"]


# -- real trainers ------------------------------------------------------------------------------------------------


def test_a_run_shows_its_progress_without_being_asked(make_trainer, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FULLTUNE_PROGRESS", "plain")
    trainer = make_trainer(iters=6, steps_per_report=2, steps_per_eval=3, save_every=100, run_dir=tmp_path / "run")
    trainer.run(4)
    trainer.set_learning_rate(5e-4)
    trainer.run()
    lines = [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    expected = ["valid loss", "saved", "loss", "valid loss", "loss", "paused after"]
    expected += ["peak learning rate changed", "loss", "valid loss", "saved", "done after"]
    assert len(lines) == len(expected) and all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


def test_an_error_is_not_called_an_end(make_trainer, monkeypatch, capsys):
    monkeypatch.setenv("FULLTUNE_PROGRESS", "plain")
    trainer = make_trainer()
    trainer.lm.model.norm.weight = trainer.lm.model.norm.weight * float("nan")
    with pytest.raises(ft.errors.NonFiniteError):
        trainer.run()
    last = capsys.readouterr().out.splitlines()[-1]
    assert "step 0/8: failed after" in last and "peak" not in last  # no step was taken


@pytest.mark.parametrize("end, word", [("pause", "paused"), ("stop", "paused"), ("fail", "failed"), (None, "done")])
def test_a_run_of_the_panel_ends_in_plain_lines_as_it_does_in_the_panel(make_trainer, panel_of, monkeypatch, capsys, end, word):
    monkeypatch.setenv("FULLTUNE_PROGRESS", "plain")
    panel = panel_of(make_trainer(iters=40))

    class AtStep3:
        def on_step(self, trainer, report):
            if report.step == 3 and end == "fail":
                raise ValueError("on purpose")
            if report.step == 3 and end:
                panel.loop.post(getattr(panel.controls, end).click)

    async def main():
        panel.trainer.listeners.append(AtStep3())
        panel.start()
        with contextlib.suppress(ValueError):
            await panel.wait()

    asyncio.run(main())
    steps = panel.trainer.step_count
    assert f"step {steps}/40: {word} after" in capsys.readouterr().out.splitlines()[-1]
    assert repr(panel) == f"TrainPanel({word}, step {steps} of 40)" and f"{word}</b>" in panel.controls.status.value
    assert panel.trainer.state == word and bool(panel.error) == (end == "fail")


def test_progress_needs_no_front_end():
    code = "import sys, fulltune_nb.panels.progress; print([m for m in ('ipywidgets', 'IPython', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout.strip() == "[]"


def test_progress_can_be_turned_off(make_trainer, monkeypatch, capsys):
    monkeypatch.setenv("FULLTUNE_PROGRESS", "off")
    make_trainer(iters=2).run()
    assert capsys.readouterr() == ("", "")


KERNEL_CELLS = [
    "import fulltune_nb as ft\nfrom fulltune_nb import tiny",
    """
lm = ft.load_model(tiny.BASE_MODEL)
data = ft.load_data(tiny.text_to_sql(train=8, valid=4, test=4), lm.tokenizer)
trainer = ft.Trainer(lm, data, ft.TrainConfig(iters=3, steps_per_eval=1))
""",
    "trainer.run()",
]


@pytest.mark.long
def test_in_a_kernel_the_cell_keeps_one_output_that_needs_no_kernel(monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.delenv("FULLTUNE_PROGRESS", raising=False)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in KERNEL_CELLS])
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    (output,) = notebook.cells[-1].outputs
    page = output.data["text/html"]
    assert output.output_type == "display_data"
    assert "step 3 of 3: done after" in page and "Evaluations" in page and page.count("<td") > 10


# -- loading ------------------------------------------------------------------------------------------------------


def watch(moment, seconds, what="train: tokenizing", steps=40):
    watcher = module.LoadingProgress(what, 4000)
    for step in range(steps):
        watcher.update(100 * step)
        moment.now += seconds / steps
    watcher.end()


@pytest.mark.parametrize("shape", ["plain", "terminal", "notebook"])
def test_short_loading_shows_nothing(moment, shown, capsys, monkeypatch, shape):
    monkeypatch.setenv("FULLTUNE_PROGRESS", shape)
    watch(moment, 2.5)
    assert capsys.readouterr() == ("", "") and not shown.bundles


def test_long_loading_is_a_line_now_and_then_in_a_log(moment, capsys, monkeypatch):
    monkeypatch.setenv("FULLTUNE_PROGRESS", "plain")
    watch(moment, 40)
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["train: tokenizing: 8%, 0:03 so far, 0:37 left", "train: tokenizing: 45%, 0:18 so far, 0:22 left"]
    assert out[3:] == ["train: tokenizing: 0:40"]


def test_long_loading_is_one_line_of_a_terminal_that_goes(moment, capsys, monkeypatch):
    monkeypatch.setenv("FULLTUNE_PROGRESS", "terminal")
    monkeypatch.setenv("COLUMNS", "50")
    watch(moment, 40)
    out, err = capsys.readouterr()
    assert out == "" and "\rtrain: tokenizing: 50%, 0:20 so far, 0:20 left" in err and max(map(len, err.split("\r"))) < 50
    assert "\n" not in err and not err.split("\r")[-2].strip() and err.endswith("\r")


def test_long_loading_is_one_output_of_a_cell_with_foreign_text_escaped(moment, shown, monkeypatch):
    monkeypatch.setenv("FULLTUNE_PROGRESS", "notebook")
    watch(moment, 40, "<b>a</b>\x1b[31m/train: reading")
    texts = [bundle["text/plain"] for bundle in shown.bundles]
    assert len(texts) == 38 and texts[-1].endswith("train: reading: 0:40") and "&lt;b&gt;" in shown.bundles[0]["text/html"]


def test_loading_can_be_quiet(moment, shown, capsys, monkeypatch):
    monkeypatch.setenv("FULLTUNE_PROGRESS", "off")
    watch(moment, 40)
    assert capsys.readouterr() == ("", "") and not shown.bundles


def test_loading_tells_its_progress_and_can_be_interrupted(make_tokenizer, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FULLTUNE_PROGRESS", "plain")
    monkeypatch.setattr(module, "LOADING_SECONDS", 0.0)
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)
    row, tokenizer = {"prompt": "the quick brown fox", "completion": "jumps"}, make_tokenizer(CHATML)
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 5000)

    def interrupt(self, done):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module.LoadingProgress, "update", interrupt)
        ft.load_data({"train": [row] * 2000}, tokenizer)
    assert len(ft.load_data(tmp_path, tokenizer).train) == 5000
    out = capsys.readouterr().out
    assert "train: reading: 82%" in out and re.search(r"train: tokenizing: 51%, \d:\d\d so far, \d:\d\d left", out)
