"""Every code block of README, guide and how-to pages is run, except those marked `<!-- no-run: reason -->`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import fulltune_nb as ft
from fulltune_nb import tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "guide.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]
# What stands in the pages, and what it is for the test: a small model that is here, and few steps.
STAND_INS = {
    "mistralai/Mistral-7B-v0.1": str(tiny.BASE_MODEL),
    "Qwen/Qwen3-0.6B": str(tiny.BASE_MODEL),
    "my/model": str(tiny.BASE_MODEL),
    "notebooks/10_experiment": str(ROOT / "notebooks" / "10_experiment"),
    "iters=600": "iters=12",
    "--iters 600": "--iters 2",
    '"iters": 20': '"iters": 2',
    "data: data}": "data: data, iters: 2}",
    "-p learning_rate 1e-5": "-p learning_rate 1e-5 -p iters 2 -k python3",
}
NOT_RUN = {
    "add_a_family.md: Jais 2 is not in the list",
    "README.md: the installation and the demo are what CI begins with",
    "README.md: the test command itself",
    "guide.md: installation; CUDA",
    "guide.md: needs a cluster, or packages of extras",
    "install.md: installation",
    "serve.md: needs a server",
    "more_machines.md: more processes, tested in nbs_tests/training/test_parallel.py",
    "use_the_result.md: mlx-lm is another package, tested in nbs_tests/models",
    "use_the_result.md: needs a checkout of llama.cpp and a network",
    "use_the_result.md: needs llama.cpp and Ollama",
    "use_the_result.md: uploads to a network",
    "evaluate_with_lm_eval.md: downloads tasks, tested in nbs_tests/insight",
    "use_the_result.md: a server and a conversation, tested in nbs_tests/test_chat_and_serve.py",
}


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    no_run: str | None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    found = re.finditer(r"^(?:<!-- no-run: ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(m[2], m[3], text[: m.start(3)].count("\n") + 1, m[1]) for m in found]


def run(block: Block, page: Path, namespace: dict) -> None:
    text = block.text
    for name, stand_in in STAND_INS.items():
        text = text.replace(name, stand_in)
    if block.language == "python":
        exec(compile("\n" * (block.line - 1) + text, str(page), "exec"), namespace)
    elif block.language == "bash":
        text = re.sub(r"^python ", f"{sys.executable} ", text, flags=re.MULTILINE)
        text = re.sub(r"^fulltune ", f"{sys.executable} -m fulltune_nb ", text, flags=re.MULTILINE)
        text = re.sub(r"^papermill ", f"{sys.executable} -m papermill ", text, flags=re.MULTILINE)
        result = subprocess.run(["bash", "-euc", text], capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{page.name}:{block.line}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    elif block.language == "json":
        for row in map(json.loads, text.splitlines()):
            assert ft.load_data({"train": [row]}, namespace["lm"].tokenizer).train.trained_tokens
    elif block.language == "yaml":
        Path("sweep.yaml").write_text(text, "utf-8")  # the command that follows reads it
    else:
        raise AssertionError(f"{page.name}:{block.line}: nothing is known of the language {block.language!r}")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with data, and the names that a reader has by then."""
    monkeypatch.chdir(tmp_path)
    tiny.write_text_to_sql(tmp_path / "data", train=64, valid=4, test=4)
    lm = ft.load_model(tiny.BASE_MODEL)
    config = ft.TrainConfig(iters=3, batch_size=2, mask_prompt=True)
    return {"ft": ft, "lm": lm, "config": config, "data": ft.load_data("data", lm.tokenizer, config=config)}


@pytest.mark.ci
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run_in_their_order(page, workplace):
    if page.name == "guide.md":
        pytest.importorskip("tensorboard", reason="the guide logs to tensorboard, which CI installs")
    for block in blocks_of(page):
        if block.no_run is None:
            run(block, page, workplace)


def test_what_is_not_run_is_listed_here_with_its_reason():
    assert {f"{page.name}: {block.no_run}" for page in PAGES for block in blocks_of(page) if block.no_run} == NOT_RUN


def test_every_fence_is_read():
    for page in PAGES:
        assert len(re.findall(r"^```", page.read_text("utf-8"), re.MULTILINE)) == 2 * len(blocks_of(page)), page.name
