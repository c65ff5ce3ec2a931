"""The notebooks as they are committed, and as they run with no front end."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

import fulltune_nb as ft
from fulltune_nb import demo, tiny

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
QUICKSTART = demo.find_notebook(demo.NOTEBOOK)


def read(path: Path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters_of(path: Path) -> dict[str, object]:
    """Names and values of the parameters cell."""
    found: dict = {}
    exec(code_cells(read(path))[0].source, found)
    return {name: found[name] for name in found["__annotations__"]}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_committed_without_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(notebook))
    assert "papermill" not in notebook.metadata and all("papermill" not in cell.metadata for cell in notebook.cells)
    assert not notebook.metadata.get("widgets")
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_its_first_code_cell_holds_annotated_parameters(path):
    first, *others = code_cells(read(path))
    assert first.metadata.tags == ["parameters"] and not any("parameters" in cell.metadata.get("tags", []) for cell in others)
    assert all(isinstance(node, ast.AnnAssign) for node in ast.parse(first.source).body)
    if path.name != "10_experiment.ipynb":  # where None stands for the default of TrainConfig
        assert None not in parameters_of(path).values(), "a reader should see the value"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_no_cell_swallows_an_exit(path):
    assert not any("exit(" in cell.source for cell in code_cells(read(path)))  # papermill takes it for success


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_a_notebook_imports_of_the_package_is_there(path):
    statements = [node for cell in code_cells(read(path)) if not cell.source.startswith("%") for node in ast.parse(cell.source).body]
    imports = [node for node in statements if isinstance(node, (ast.Import, ast.ImportFrom)) and "fulltune_nb" in ast.unparse(node)]
    assert imports
    for node in imports:
        exec(ast.unparse(node), {})


TEACHING = [path for path in NOTEBOOKS if path != QUICKSTART]


def solutions_of(notebook) -> list[str]:
    """The code of the hidden solutions, in their order."""
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    hidden = re.findall(r"<summary>Solution</summary>(.*?)</details>", text, re.DOTALL)
    return [code for solution in hidden for code in re.findall(r"```python\n(.*?)```", solution, re.DOTALL)]


@pytest.mark.parametrize("path", TEACHING, ids=lambda path: path.name)
def test_a_notebook_that_teaches_says_what_for_and_has_exercises_with_hidden_solutions(path):
    cells = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    assert re.search(r"After (it|this notebook) you can\n\n- ", cells[0])
    exercises = next(source for source in cells if "## Exercises" in source)
    assert exercises.count("\n**") == exercises.count("<details><summary>Solution</summary>") == exercises.count("</details>") >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_its_model_is_a_parameter(path):
    assert parameters_of(path)["model"] == ""


def test_the_quickstart_trains_with_the_settings_that_the_tiny_model_is_known_to_learn_with():
    parameters = parameters_of(QUICKSTART)
    known = dict(tiny.FINE_TUNING)
    assert f'lr_schedule="{known.pop("lr_schedule")}"' in "".join(cell.source for cell in code_cells(read(QUICKSTART)))
    assert {name: parameters.get(name) for name in known} == known


# -- executed ---------------------------------------------------------------------------------------------------------


def execute_quickstart(folder: Path, **parameters: object):
    """The results it wrote and the executed notebook."""
    executed = folder / "executed.ipynb"
    demo.execute(QUICKSTART, executed, {"out": str(folder / "out"), "result": str(folder / "result.json"), **parameters})
    return json.loads((folder / "result.json").read_text("utf-8")), read(executed)


def outputs_of(notebook, cell_id: str) -> list:
    return next(cell.outputs for cell in notebook.cells if cell.id == cell_id)


def text_of(notebook, cell_id: str) -> str:
    return "".join(output.get("text", "") + output.get("data", {}).get("text/html", "") for output in outputs_of(notebook, cell_id))


@pytest.mark.long
def test_the_quickstart_runs_and_tells_its_story(tmp_path):
    results, notebook = execute_quickstart(tmp_path, iters=6, questions=6)
    assert results["after"]["perplexity"] < results["before"]["perplexity"] / 2
    assert results["questions"] == 6 and 0 <= results["exact_match"] <= 1 and results["tokens_per_second"] > 0
    assert results["split"] == "test" and results["config"]["iters"] == 6
    for cell in ("plot-loss", "plot-memory"):
        assert [list(output.data) for output in outputs_of(notebook, cell)] and "image/png" in outputs_of(notebook, cell)[0].data
    assert "step 6/6: done" in text_of(notebook, "train-run")
    assert not [output for cell in code_cells(notebook) for output in cell.outputs if output.get("name") == "stderr"]
    lm = ft.load_model(results["exported"])
    assert lm.dtype == "bfloat16" and Path(results["run_dir"], "checkpoints").is_dir()


SMALL = {"iters": 4, "noisy_iters": 4, "rows": 60, "questions": 6, "max_tokens": 8, "batch_size": 4}


@pytest.mark.long
@pytest.mark.parametrize("path", TEACHING, ids=lambda path: path.name)
def test_every_other_notebook_runs_with_few_steps_and_rows_and_so_do_its_solutions(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    solved = read(path)
    solved.cells += [nbformat.v4.new_code_cell(code) for code in solutions_of(solved)]
    nbformat.write(solved, tmp_path / path.name)
    places = {"out": str(tmp_path / "out"), "result": str(tmp_path / "result.json")}
    given = {name: value for name, value in {**SMALL, **places}.items() if name in parameters_of(path)}
    demo.execute(tmp_path / path.name, tmp_path / "executed.ipynb", given)
    cells = code_cells(read(tmp_path / "executed.ipynb"))
    assert any(cell.outputs for cell in cells)
    assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]


def rows_as_chat(rows: list[dict]) -> list[dict]:
    system = {"role": "system", "content": "Answer in SQL."}
    turns = [({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}) for row in rows]
    return [{"messages": [system, user, assistant]} for user, assistant in turns]


def rows_as_text(rows: list[dict]) -> list[dict]:
    return [{"text": f"{row['prompt']}\nA: {row['completion']}"} for row in rows]


CASES = [
    (rows_as_chat, ("train", "valid"), {}, "valid", True),
    (rows_as_text, ("train", "test"), {"mask_prompt": False, "answer_after": "A:"}, "test", True),
    (rows_as_text, ("train",), {"mask_prompt": False}, "train", False),
]


@pytest.mark.long
@pytest.mark.parametrize("convert, splits, parameters, held_out, has_match", CASES, ids=["chat", "text", "text without answers"])
def test_the_quickstart_takes_other_models_and_data(tmp_path, convert, splits, parameters, held_out, has_match):
    data = tmp_path / "data"
    data.mkdir()
    for name, rows in tiny.text_to_sql(train=12, valid=8, test=8).items():
        if name in splits:
            (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in convert(rows)), "utf-8")
    model = ft.load_model(tiny.BASE_MODEL).save(tmp_path / "model")
    results, notebook = execute_quickstart(
        tmp_path, model=str(model), data=str(data), iters=2, batch_size=4, questions=6, max_tokens=4, **parameters
    )
    assert results["split"] == held_out and results["questions"] == 6
    assert (results["exact_match"] is not None) == has_match
    assert results["model"] == str(model)
    assert ("exact match" in text_of(notebook, "answers-table")) == has_match
