import json
import math
import re
import sys

import pytest

from fulltune_nb.errors import CheckpointError, MissingDependencyError
from fulltune_nb.training.history import EvalReport, Event, History, StepReport


def step(n, loss=2.0):
    return StepReport(step=n, epoch=n / 10, loss=loss, tokens=100, learning_rate=1e-5, grad_norm=0.5, seconds=0.1, tokens_per_second=1000.0)


def evaluation(n, loss=2.0, split="valid"):
    return EvalReport(split=split, step=n, loss=loss, perplexity=math.exp(loss), tokens=50, seconds=0.2)


def event(n, message="from 1e-5 to 3e-5"):
    return Event(step=n, kind="learning_rate", message=message, time=1.5)


def test_a_history_is_a_list_that_sorts_its_reports_by_type():
    history = History([step(1), evaluation(1), step(2), event(2)])
    assert [r.step for r in history.steps] == [1, 2] and len(history.evals) == 1 and len(history.events) == 1
    history.append(step(3))
    assert len(history) == 4 + 1 and history[-1].step == 3
    assert isinstance(history[1:], History) and history[:1].steps == [step(1)]
    assert repr(history) == "History(3 steps, 1 evaluations, 1 events)"


def test_reports_cannot_be_changed():
    with pytest.raises(AttributeError):
        step(1).loss = 0.0


def test_json_gives_the_same_reports_back():
    history = History([step(1), evaluation(1), event(1)])
    assert History.from_jsonable(json.loads(json.dumps(history.to_jsonable(), allow_nan=False))) == history
    assert [v["kind"] for v in history.to_jsonable()] == ["step", "eval", "event"]


def test_nan_and_infinity_become_null_and_come_back_as_nan():
    history = History([step(1, math.nan), evaluation(1, 700.0), step(2, math.inf)])
    text = json.dumps(history.to_jsonable(), allow_nan=False)
    back = History.from_jsonable(json.loads(text))
    assert math.isnan(back[0].loss) and back[1] == history[1] and math.isnan(back[2].loss)
    assert back[0].tokens == 100


def test_reports_of_a_later_version_are_read():
    assert StepReport.from_dict({**step(1).to_dict(), "new_field": 3}) == step(1)


NOT_REPORTS = [{}, {"kind": "other"}, {"kind": "step", "step": 1}, {"kind": "event", "step": 1}, [1], None, "x"]


@pytest.mark.parametrize("values", NOT_REPORTS, ids=str)
def test_what_is_no_report_is_refused(values):
    with pytest.raises(CheckpointError):
        StepReport.from_dict(values)


@pytest.mark.parametrize(
    "field, value",
    [
        ("step", 1.5), ("step", True), ("step", "1"), ("step", None), ("step", 10**30), ("loss", "2.0"), ("loss", [2.0]), ("loss", False),
        ("loss", 10**400),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_values_of_another_type_are_refused_by_the_fields_name(field, value):
    with pytest.raises(CheckpointError, match=f"{field}: expected"):
        StepReport.from_dict({**step(1).to_dict(), field: value})


def test_a_frame_has_a_row_for_each_report():
    pytest.importorskip("pandas", reason="pandas is an optional dependency")
    frame = History([step(1), evaluation(1), event(1), step(2, math.nan)]).to_frame()
    assert list(frame["kind"]) == ["step", "eval", "event", "step"]
    assert frame["loss"][0] == 2.0 and math.isnan(frame["loss"][3]) and frame["event"][2] == "learning_rate"
    assert frame["perplexity"][1] == math.exp(2.0)
    assert "loss" in History().to_frame().columns


def test_without_pandas_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fulltune_nb\[pandas\]'"):
        History([step(1)]).to_frame()


def test_the_cell_shows_the_summary_the_curve_and_the_last_rows():
    history = History([step(n, 3.0 - n / 10) for n in range(1, 15)] + [evaluation(14, 1.5), evaluation(14, 1.2, "test")])
    shown = history._repr_html_()
    for words in ("14 steps", "<polyline", "valid loss", "test loss", "1,400", "2.9000", "1.6000"):
        assert words in shown


@pytest.mark.parametrize("reports", [[], [step(1)], [step(1, math.nan), step(2, math.nan)], [evaluation(0, math.nan)], [event(0)]], ids=len)
def test_the_cell_is_shown_for_little_and_for_nan(reports):
    assert "Training history" in History(reports)._repr_html_()


def test_the_cell_stays_small_for_a_long_run():
    history = History(step(n, 2.0 + math.sin(n)) for n in range(1, 20_001))
    shown = history._repr_html_()
    assert len(shown) < 15_000
    assert len(re.search(r'points="([^"]*)"', shown)[1].split()) <= 200
    assert "19,990 before" in shown


def test_messages_are_escaped_and_cut():
    shown = History([event(1, "<img src=x onerror=alert(1)>"), event(2, "y" * 5000)])._repr_html_()
    assert "<img" not in shown and "&lt;img" in shown and len(shown) < 5000
    assert "<img" not in event(1, "<img>")._repr_html_()


def test_reports_read_as_a_line():
    assert str(step(3)) == "step 3: loss 2.000, lr 1e-05, 1000 tokens/s, peak 0 B"
    assert str(evaluation(3, 1.0)) == "step 3: valid loss 1.000, ppl 2.718 (50 tokens)"
    assert "\n" not in repr(step(1)) and "Step 3" in step(3)._repr_html_()
