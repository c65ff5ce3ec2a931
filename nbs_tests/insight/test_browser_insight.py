"""The insight views in a real JupyterLab in a real browser, with hostile text and with long examples; see `nbs_tests/test_browser.py`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbs_tests.jupyterlab import write_notebook
from nbs_tests.panels.kernels import SETUP
from nbs_tests.panels.test_browser_data_chat import HOSTILE, assert_nothing_broke_out
from nbs_tests.test_browser import browser, folder, lab, server  # noqa: F401  fixtures

pytestmark = pytest.mark.long

MODELS = """
from IPython.display import display
from fulltune_nb import insight
H = {hostile!r}
trainer, base = make_trainer(), make_trainer().lm
"""
LONG = """
ids = np.random.default_rng(0).integers(0, len(tokenizer), 4096).astype(np.int32)
long = ft.token_losses(trainer.lm, ft.Example(ids, np.arange(4096) > 0, "", "long:1", 0, {}, tokenizer))
display(long)
"""
VIEWS = """
texts = [h or " " for h in H]
rows = [{"prompt": h, "completion": h} for h in texts]
display(ft.token_losses(trainer.lm, texts, base=base), insight.top_losses(trainer.lm, texts), *(ft.trace(trainer.lm, h) for h in texts))
display(ft.inspect(trainer, texts[0]))
meter = insight.UpdateMeter(every=1)
watch = insight.Forgetting(texts, texts, max_tokens=4)
score = insight.GenerationScore(rows, "regex", every=1, max_tokens=4)
trainer.run(2, callbacks=[meter, watch, score])
comparison = ft.compare([trainer, trainer])
for run, h in zip(comparison.runs, H):
    run.name, run.config, run.result, run.notes = h, {h: h}, {h: h}, [h]
display(meter, watch, score, comparison, ft.find_lr(trainer, steps=10))
"""


def test_hostile_text_is_only_text_and_long_examples_are_laid_out_in_time(lab, folder):  # noqa: F811
    path = folder / "insight.ipynb"
    write_notebook(path, [SETUP, MODELS.format(hostile=HOSTILE), VIEWS, LONG])
    lab.open(path.name)
    lab.run_all()
    lab.output(2).get_by_text("Learning-rate range test").first.wait_for(timeout=60_000)
    assert lab.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert_nothing_broke_out(lab)
    assert lab.output(2).get_by_text("onerror").count() > 5
    titles = lab.output(3).locator("pre span").evaluate_all("spans => spans.map(span => span.title).join()")
    assert titles.count(", id ") == 4096  # some random tokens spell a character together
    # To lay the whole notebook out once more, the long example in it, is a matter of milliseconds.
    milliseconds = lab.page.evaluate(
        "() => { const start = performance.now(); document.body.style.fontSize = '15px'; document.body.getBoundingClientRect();"
        " document.querySelectorAll('pre span').forEach(span => span.offsetTop); return performance.now() - start; }"
    )
    assert milliseconds < 2000
    box = lab.output(3).locator("pre").first.bounding_box()
    assert box["height"] < 500
    if where := os.environ.get("FULLTUNE_PICTURES"):
        Path(where).mkdir(parents=True, exist_ok=True)
        for number, name in ((2, "insight-hostile"), (3, "insight-long")):
            lab.output(number).screenshot(path=f"{where}/{name}.png")
