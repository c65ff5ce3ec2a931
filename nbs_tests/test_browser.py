"""The panels in a real JupyterLab in a real browser.

Skipped where there is no browser, or no playwright; in CI (`CI` is set) that is a failure. Pictures are written where
FULLTUNE_PICTURES says.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter

from nbs_tests.jupyterlab import Lab, axe_core, find_browser, needs, served, write_notebook
from nbs_tests.panels.kernels import SETUP

pytestmark = pytest.mark.long
NOTEBOOK = "panels.ipynb"
PANEL, CODE, WAITING = 2, 3, 4  # its cells


@pytest.fixture(scope="module")
def browser():
    found = find_browser()
    needs(found, "Chromium (Debian: apt-get install chromium; or name one in FULLTUNE_BROWSER)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        needs(None, "playwright (pip install playwright)")
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def server(browser, folder):
    with served("jupyterlab", folder, {"PYTHONPATH": str(Path(__file__).parents[1])}) as address:
        yield address


@pytest.fixture
def lab(browser, server):
    """A page of its own."""
    with _page(browser, server) as made:
        yield made


@contextmanager
def _page(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 1800})
    page.set_default_timeout(30_000)
    alerts = []

    def answer(dialog):
        if dialog.type != "beforeunload":  # which asks whether to leave unsaved changes
            alerts.append(dialog.message)
        dialog.accept()

    page.on("dialog", answer)
    yield Lab(page, address)
    page.close()
    assert not alerts, "something from outside ran as code"


@pytest.fixture(scope="module")
def notebook(browser, server, folder):
    """A page with a notebook whose first cells have been run."""
    write_notebook(folder / NOTEBOOK, ["0", SETUP, "0", "0", "0"])
    with _page(browser, server) as made:
        made.open(NOTEBOOK)
        made.run_all()
        yield made


@pytest.fixture
def trained(notebook, request, tmp_path):
    """The notebook with a panel of a new trainer."""
    settings = getattr(request, "param", "")
    code = f"trainer = make_trainer(run_dir={f'runs/{tmp_path.name}'!r}, {settings})\npanel = TrainPanel(trainer)\npanel"
    notebook.result(PANEL, code, seconds=60)
    button(notebook, "Run").wait_for()
    return notebook


def button(lab: Lab, name: str):
    return lab.output(PANEL).locator("button").filter(has_text=re.compile(f"^{name}$"))


def status(lab: Lab) -> str:
    return lab.output(PANEL).get_by_role("status").inner_text()


def shown_step(lab: Lab) -> int:
    return int(re.search(r"step ([\d,]+) of", status(lab)).group(1).replace(",", ""))


FINDINGS = """async () => {
    const all = root => [...root.querySelectorAll('*')].flatMap(one => [one, ...(one.shadowRoot ? all(one.shadowRoot) : [])]);
    const include = all(document).filter(one => one.matches('.fulltune-styled, .ft-chart')); // marimo's have roots of their own
    const late = new Promise((_, fail) => setTimeout(() => fail(new Error('axe-core took more than a minute')), 60000));
    const {violations} = await Promise.race([axe.run({include}, {resultTypes: ['violations']}), late]);
    const grave = violations.filter(found => ['critical', 'serious'].includes(found.impact));
    return grave.map(found => found.id + ': ' + found.nodes.slice(0, 3).map(node => node.html + ' ' + node.failureSummary).join(' | '));
}"""


def look(lab: Lab, name: str) -> None:
    """axe-core finds nothing critical or serious in a panel, light and dark; and writes pictures of it, where they are wanted."""
    where = os.environ.get("FULLTUNE_PICTURES")
    found = {}
    lab.page.evaluate(axe_core())
    for theme in ("Light", "Dark"):
        lab.theme(f"JupyterLab {theme}")
        found[theme] = lab.page.evaluate(FINDINGS)
        panel = lab.output(PANEL).locator(".fulltune-styled").first
        if where:
            panel.screenshot(path=f"{where}/{name}-{theme.lower()}.png")
            panel.evaluate("panel => { panel.style.width = '360px'; }")
            lab.page.wait_for_timeout(300)
            panel.screenshot(path=f"{where}/{name}-{theme.lower()}-narrow.png")
            panel.evaluate("panel => { panel.style.width = ''; }")
    lab.theme("JupyterLab Light")
    assert found == {"Light": [], "Dark": []}


def wait_for_text(lab: Lab, pattern: str, seconds: float = 20) -> None:
    lab.page.wait_for_function(
        "pattern => new RegExp(pattern).test(document.querySelector('.jp-Notebook [role=status]')?.innerText)",
        arg=pattern,
        timeout=seconds * 1000,
    )


def test_run_pause_step_and_cells_meanwhile(trained):
    lab = trained
    lab.result(CODE, "heard = []; panel.controls.pause.on_click(lambda _: heard.append(trainer.step_count))")
    button(lab, "Run").click()
    wait_for_text(lab, "running")
    first = int(lab.result(CODE, "print(trainer.step_count)"))
    weight = lab.result(CODE, "print(float(np.array(trainer.lm.model.norm.weight).sum()), trainer.history)")
    lab.page.wait_for_timeout(1000)
    later = int(lab.result(CODE, "print(trainer.step_count)"))
    assert later > first and "steps" in weight
    button(lab, "Pause").click()
    wait_for_text(lab, "paused")
    heard, taken = lab.result(CODE, "print(heard[0], trainer.step_count)").split()
    assert int(taken) <= int(heard) + 1
    lab.page.wait_for_timeout(500)
    assert int(lab.result(CODE, "print(trainer.step_count)")) == int(taken) == shown_step(lab)
    for more in (1, 2):
        button(lab, "Step").click()
        wait_for_text(lab, f"step {int(taken) + more:,} of")
        lab.page.wait_for_timeout(200)
        assert int(lab.result(CODE, "print(trainer.step_count)")) == int(taken) + more
    field = lab.output(PANEL).get_by_label("learning rate")
    field.fill("0.0005")
    field.press("Enter")
    lab.output(PANEL).get_by_text("learning rate changed from").first.wait_for(timeout=10_000)
    button(lab, "Evaluate").click()
    lab.output(PANEL).get_by_text("valid loss").first.wait_for(timeout=20_000)
    lab.page.wait_for_timeout(1500)
    look(lab, "train-panel")


def test_interrupting_the_kernel_pauses_and_the_losses_stay_the_same(trained):
    lab = trained
    button(lab, "Run").click()
    wait_for_text(lab, "running")
    lab.page.wait_for_timeout(500)
    lab.command("notebook:interrupt-kernel")
    wait_for_text(lab, "paused by an interrupt")
    taken = int(lab.result(CODE, "print(trainer.step_count)"))
    same = "[r.loss for r in straight.history.steps] == [r.loss for r in trainer.history.steps]"
    assert lab.result(CODE, "panel.start(4); await panel.wait(); print(trainer.step_count)").endswith(str(taken + 4))
    assert lab.result(WAITING, f"straight = make_trainer(); straight.run({taken + 4}); print({same})").endswith("True")


HOSTILE = r"<img src=x onerror=alert(1)></pre><script>alert(2)</script>$$x$$ \x1b[31m \u202e\u2067\u200f &lt;"
CELL_OUTPUTS = """
rows = [{"prompt": HOSTILE, "completion": "fox " * 250_000}, {"prompt": "a", "completion": HOSTILE}]
hostile_data = ft.load_data({"train": rows}, tokenizer, mask_prompt=True)
hostile_data.source = HOSTILE
display(trainer.history, trainer.history.events[0], trainer, hostile_data, hostile_data.show(2), hostile_data.train[1])
from fulltune_nb.panels.progress import NotebookProgress
progress = NotebookProgress(); progress.on_start(trainer, 100); progress.on_event(trainer, ft.Event(1, HOSTILE, HOSTILE, 0.0))
progress.on_save(trainer, HOSTILE); progress.on_end(trainer)
ft.plot_loss(trainer.history);
"""
FOREIGN = "img[src='x'], script, iframe, mjx-container, .jupyter-widgets-error-widget"


def test_hostile_text_stays_text(trained):
    lab = trained
    lab.result(CODE, f'HOSTILE = "{HOSTILE}"; trainer.event(HOSTILE, HOSTILE); trainer.tell("on_save", HOSTILE)')
    lab.result(CODE, "trainer.record(ft.EvalReport(HOSTILE, 1, 1.0, 2.0, 3, 0.1))")
    lab.result(CODE, 'trainer.event("big", "y" * 1_000_000)')
    lab.result(
        CODE,
        "trainer.lm.stream_chat = lambda *_, **__: iter([HOSTILE, 'x' * 1_000_000])\n"
        "panel.samples.set([HOSTILE]); panel.sample()\n"
        "def fail(split): raise ValueError(HOSTILE)\n"
        "trainer.evaluate = fail",
    )
    button(lab, "Evaluate").click()
    lab.output(PANEL).get_by_role("alert").wait_for(timeout=10_000)
    lab.output(PANEL).get_by_role("tab", name="Samples").click()
    lab.result(CODE, "panel.step(); await asyncio.sleep(1.2)")
    lab.page.wait_for_timeout(700)
    text = lab.output(PANEL).inner_text()
    assert text.count("<img src=x onerror=alert(1)>") >= 3 and "$$x$$" in text
    assert lab.output(PANEL).locator(FOREIGN).count() == 0 and len(text) < 60_000  # of the millions
    look(lab, "hostile")
    lab.result(WAITING, CELL_OUTPUTS, seconds=60)
    lab.output(WAITING).get_by_text("Training history").wait_for(timeout=20_000)
    assert lab.output(WAITING).inner_text().count("<img src=x onerror=alert(1)>") >= 6
    assert lab.page.locator(".jp-OutputArea").locator(FOREIGN).count() == 0
    assert "FulltuneError" in lab.result(CODE, "raise ft.FulltuneError(HOSTILE)")
    assert lab.page.locator(".jp-OutputArea").locator(FOREIGN).count() == 0
    lab.result(WAITING, "0")  # the notebook goes on without the million characters


def test_run_all_of_notebook_01_trains_and_keeps_a_record(lab, folder):
    notebook = nbformat.read(Path(__file__).parents[1] / "notebooks/01_step_by_step.ipynb", as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += "\niters, batch_size, rows = 30, 4, 40"
    nbformat.write(notebook, folder / "01.ipynb")
    lab.open("01.ipynb")
    lab.run_all()
    assert lab.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0
    lab.page.get_by_text("Done at step 30 of 30").first.wait_for()
    waiting = next(number for number, cell in enumerate(notebook.cells) if cell.source == "await panel.wait()")
    assert lab.output(waiting).locator("img").count() == 1
    lab.command("kernelmenu:shutdown")


@pytest.mark.parametrize("trained", ["iters=30"], indirect=True)
def test_a_reopened_notebook_without_kernel_has_picture_and_table(trained, folder):
    lab = trained
    button(lab, "Run").click()
    wait_for_text(lab, "done")
    lab.page.wait_for_timeout(1500)
    assert not lab.output(PANEL).get_by_text("Done at step 30 of 30").is_visible()  # the living panel shows the same
    lab.result(CODE, "0")
    lab.save()
    lab.page.wait_for_timeout(500)
    lab.command("kernelmenu:shutdown")
    lab.page.wait_for_timeout(500)
    lab.page.goto("about:blank")
    lab.page.goto(lab.address.format(NOTEBOOK))
    lab.page.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell.currentWidget?.context?.isReady", timeout=60_000)
    cell = lab.output(PANEL)
    assert cell.locator(".fulltune-panel").count() == 0
    image = cell.locator("img[src^='data:image/png']")
    image.wait_for(timeout=20_000)
    assert image.evaluate("image => image.naturalWidth") > 500
    cell.get_by_text("Done at step 30 of 30").wait_for(timeout=5000)
    if where := os.environ.get("FULLTUNE_PICTURES"):
        cell.screenshot(path=f"{where}/reopened-light.png")
    assert on_page(image) == "none"
    lab.theme("JupyterLab Dark")
    assert on_page(image).startswith("invert(0.93)"), "a record's picture follows the theme"
    lab.theme("JupyterLab Light")
    assert_the_exported_page_shows_it_too(lab, folder)
    saved = nbformat.read(folder / NOTEBOOK, as_version=4)
    assert any("image/png" in output.get("data", {}) for output in saved.cells[PANEL].outputs)
    assert (folder / NOTEBOOK).stat().st_size < 2_000_000


def on_page(image) -> str:
    """How a picture's colours are changed."""
    return image.evaluate("image => getComputedStyle(image).filter")


def assert_the_exported_page_shows_it_too(lab, folder):
    page, _ = HTMLExporter().from_filename(str(folder / NOTEBOOK))
    (folder / "exported.html").write_text(page, "utf-8")
    lab.page.route(re.compile("^https?://"), lambda route: route.abort())  # MathJax and such, which come from elsewhere
    lab.page.goto(f"file://{folder}/exported.html", wait_until="domcontentloaded")
    lab.page.get_by_text("Done at step 30 of 30").first.wait_for(timeout=10_000)
    assert lab.page.locator("img[src^='data:image/png']").first.evaluate("image => image.naturalWidth") > 500
