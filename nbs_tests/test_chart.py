"""The chart without a browser: what is sent of a history, thinned and as it grows, and what stays in the notebook's file."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.chart import SHOWN, LossChart, stretches
from fulltune_nb.errors import ConfigError
from fulltune_nb.record_keeper import _Keeper
from fulltune_nb.training.history import EvalReport, Event, History, StepReport

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\u202e"


def report(step: int, loss: float) -> StepReport:
    return StepReport(step, step / 10, loss, 100, 1e-3, 2.0, 0.1, 1000.0, 300, 200, 100)


def history(n: int, seed: int = 0) -> History:
    losses = np.random.default_rng(seed).normal(3, 1, n)
    return History(report(step, float(loss)) for step, loss in enumerate(losses, 1))


def curve(run: dict, field: str = "loss") -> np.ndarray:
    """Steps and values that the page draws, (k, 2)."""
    flat = np.frombuffer(run["fields"][field])
    return flat.reshape(-1, 2) if run["size"] == 1 else flat.reshape(-1, 7)[:, :4].reshape(-1, 2)


def page_of(chart: LossChart, monkeypatch) -> list[dict]:
    """The runs as a page holds them, kept up with what is sent from now on."""
    runs = chart.get_state()["_whole"]["runs"]

    def send(content, buffers):
        for i, message in enumerate(content["runs"]):
            held, width = runs[message["run"]], 2 if message["size"] == 1 else 7
            keep = message["from"] * width * 8
            assert message["size"] == held["size"] or not keep
            for field, more in zip(message["fields"], buffers[i * len(SHOWN) :], strict=False):
                assert keep <= len(held["fields"][field])
                held["fields"][field] = held["fields"][field][:keep] + more
            held.update(size=message["size"], last=message["last"], count=message["count"], first=message["first"])
            for name in ("evals", "events"):
                held[name]["rows"] = held[name]["rows"][: message[name]["from"]] + message[name]["rows"]

    monkeypatch.setattr(chart, "send", send)
    return runs


def test_what_is_sent_is_the_history_to_the_last_digit():
    reports = history(500)
    chart = LossChart(reports)
    (run,) = chart.get_state()["_whole"]["runs"]
    assert curve(run).tolist() == [[r.step, r.loss] for r in reports]
    assert all(curve(run, field)[:, 1].tolist() == [getattr(r, field) for r in reports] for field in SHOWN)


@pytest.mark.parametrize("n", [2049, 10_000, 40_000])
def test_many_steps_are_sent_as_true_values_at_their_steps_and_no_spike_is_lost(n):
    reports = history(n)
    reports[n // 2] = report(n // 2 + 1, 1e6)
    (run,) = LossChart(reports).get_state()["_whole"]["runs"]
    drawn = curve(run)
    assert len(drawn) <= 2 * 2048 and (np.diff(drawn[:, 0]) >= 0).all()
    assert all(reports[int(step) - 1].loss == loss for step, loss in drawn)
    assert {1e6, min(r.loss for r in reports)} <= set(drawn[:, 1])
    assert run["last"][:2] == [n, reports[-1].loss]


def test_means_of_stretches_weigh_their_finite_values():
    values = np.array([1.0, 3.0, np.nan, np.nan, np.nan, 7.0, 9.0])
    found = stretches(np.arange(1.0, 8.0), values, 2)
    assert found[:, 5:].tolist()[0::2] == [[2.0, 2], [7.0, 1]] and found[3, 5:].tolist() == [9.0, 1]
    assert np.isnan(found[1, [1, 3, 5]]).all() and found[1, 6] == 0


def test_steps_that_come_are_sent_alone_and_leave_the_page_with_the_whole(monkeypatch):
    reports = history(1000)
    chart = LossChart(reports)
    runs = page_of(chart, monkeypatch)
    rng, sent = np.random.default_rng(1), []
    send = chart.send
    monkeypatch.setattr(chart, "send", lambda content, buffers: (sent.append(sum(map(len, buffers))), send(content, buffers)))
    for number in range(200):
        reports.extend(report(len(reports.steps) + 1, float(rng.normal())) for _ in range(int(rng.integers(0, 60))))
        reports.append(EvalReport("valid", len(reports.steps), 2.0, 7.4, 10, 0.1))
        reports.append(Event(len(reports.steps), "note", f"number {number}", 0.0))
        chart.update()
    assert runs == LossChart(reports).get_state()["_whole"]["runs"]
    assert np.median(sent) < 5000  # bytes, where the whole is some 700,000
    count = len(sent)
    chart.update()
    assert len(sent) == count  # nothing new, nothing sent


def test_a_history_that_was_cut_or_replaced_is_sent_anew(monkeypatch):
    trainer = type("Trainer", (), {"history": history(3000), "listeners": [], "state": "paused", "run_dir": None})()
    chart = LossChart(trainer)
    runs = page_of(chart, monkeypatch)
    for changed in (trainer.history[:100], history(3000, seed=5), History()):
        trainer.history = changed
        chart.update()
        assert runs == LossChart(changed).get_state()["_whole"]["runs"]
    chart.close()
    assert trainer.listeners == []


def test_steps_out_of_order_as_of_a_folder_written_twice_are_put_in_order():
    (run,) = LossChart([report(step, float(step)) for step in (1, 2, 5, 3, 4)]).get_state()["_whole"]["runs"]
    assert curve(run)[:, 0].tolist() == [1, 2, 3, 4, 5]


def test_a_part_that_is_zoomed_into_comes_with_every_step(monkeypatch):
    reports, sent = history(20_000), []
    chart = LossChart({"a": reports})
    monkeypatch.setattr(chart, "send", lambda content, buffers: sent.append((content, buffers)))
    chart._asked(None, {"kind": "part", "low": 999.5, "high": 1200.5, "id": 3}, None)
    ((content, buffers),) = sent
    assert content["kind"] == "part" and content["id"] == 3 and content["runs"][0]["size"] == 1
    assert np.frombuffer(buffers[0]).reshape(-1, 2).tolist() == [[r.step, r.loss] for r in reports[998:1201]]


def test_hostile_names_and_events_are_bounded_and_counted():
    reports = History([report(1, 1.0), EvalReport(HOSTILE * 100, 1, float("inf"), 1.0, 1, 0.1)])
    reports.extend(Event(1, "kind" * 100, HOSTILE * 1000, 0.0) for _ in range(3000))
    chart = LossChart({HOSTILE * 1000: reports})
    state = chart.get_state()["_whole"]
    (run,) = state["runs"]
    assert run["evals"]["rows"][0][2] is None and run["events"]["from"] == 1000 and len(run["events"]["rows"]) == 2000
    texts = [*state["names"], run["evals"]["rows"][0][0], *run["events"]["rows"][0][1:]]
    assert all(len(text) < 300 and "\x1b" not in text and "\u202e" not in text for text in texts)
    assert "<img" not in chart._page() and len(chart._page()) < 2000


@pytest.mark.parametrize("wrong", [3, "runs/a", ["runs/a"], {}, {"a": "runs/a"}, [("a", 1)], {"a": [1, 2]}])
def test_what_is_no_run_is_refused_with_what_to_do(wrong):
    with pytest.raises(ConfigError, match="LossChart: expected"):
        LossChart(wrong)


def test_a_trainers_chart_hears_its_steps_without_being_asked(monkeypatch):
    trainer = type("Trainer", (), {"history": history(3), "listeners": [], "state": "paused", "run_dir": Path("runs/mine")})()
    chart = LossChart(trainer)
    runs = page_of(chart, monkeypatch)
    assert chart.get_state()["_whole"]["names"] == ["mine"] and trainer.listeners == [chart]

    async def steps():
        for step in range(4, 9):
            trainer.history.append(report(step, float(step)))
            chart.on_step(trainer)
        await asyncio.sleep(0.7)

    asyncio.run(steps())
    assert curve(runs[0])[-1].tolist() == [8, 8.0]


def test_a_comparison_has_a_chart_of_its_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    compared = ft.compare([tmp_path / "a", tmp_path / "b"])
    assert compared.chart().get_state()["_whole"]["names"] == ["a", "b"]


@pytest.mark.skipif(shutil.which("node") is None, reason="node checks the syntax of the script")
@pytest.mark.parametrize("script", [LossChart._esm, _Keeper._esm], ids=["chart", "record keeper"])
def test_the_script_is_a_module_that_a_browser_reads(tmp_path, script):
    (tmp_path / "script.mjs").write_text(str(script), "utf-8")
    done = subprocess.run(["node", "--check", tmp_path / "script.mjs"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["chart.js", "record_keeper.js"])
def test_the_script_reaches_nothing_outside_and_writes_texts_as_texts(name):
    own = (Path(ft.__file__).parent / "static" / name).read_text("utf-8")
    assert not any(word in own for word in ("http", "innerHTML", "insertAdjacent", "eval(", "import "))
