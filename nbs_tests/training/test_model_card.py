"""The README of an exported folder: how the weights came about, and nothing that a name could smuggle in."""

from __future__ import annotations

import re

import pytest

import fulltune_nb as ft
from fulltune_nb import tiny
from fulltune_nb.training.card import CURVE, ModelCard, md


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model after three steps, with evaluations before and after, and the folder it was saved to."""
    lm = ft.load_model(tiny.BASE_MODEL)
    config = ft.TrainConfig(iters=3, batch_size=2, learning_rate=1e-3, mask_prompt=True)
    trainer = ft.Trainer(lm, ft.load_data(tiny.text_to_sql(train=20, valid=4, test=4), lm.tokenizer, config=config), config)
    trainer.evaluate("test")
    trainer.run()
    trainer.evaluate("test")
    return trainer, lm.save(tmp_path_factory.mktemp("card") / "model")


def test_the_exported_folder_says_how_it_was_made(trained):
    trainer, folder = trained
    card = (folder / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "base_model:" not in card  # a folder of this machine is no hub id
    assert trainer.data.fingerprint in card and "train 20 rows of completions" in card and "version of mlx" in card
    for split in ("test", "valid"):
        evals = [report for report in trainer.history.evals if report.split == split]
        assert len(evals) >= 2
        assert f"| {split} | before: 0 | {evals[0].loss:.4f} | {evals[0].perplexity:,.3f}" in card
        assert f"| {split} | after: 3 | {evals[-1].loss:.4f} | {evals[-1].perplexity:,.3f}" in card
    assert "| learning&#95;rate | 0.001 |" in card and "| mask&#95;prompt | true |" in card
    assert f"({CURVE})" in card and "<polyline" in (folder / CURVE).read_text("utf-8")
    assert ft.load_model(folder).num_parameters == trainer.lm.num_parameters


def test_a_model_that_was_not_trained_has_no_card(tmp_path):
    folder = ft.load_model(tiny.BASE_MODEL).save(tmp_path / "model")
    assert not (folder / "README.md").exists()


HOSTILE = "](javascript:alert(1)) | <script>alert(1)<script> `x` **b** ![i](http://evil.example)\n---\n# T www.evil.example @all \u202e"


def test_hostile_names_stay_text(trained):
    trainer, _ = trained
    card = ModelCard(HOSTILE, trainer.data, trainer.config.replace(text_feature=HOSTILE, lr_factors={HOSTILE: 0.5}), trainer.history)
    page = card.markdown()
    body = page.split("---\n\n", 1)[1]
    assert "<script" not in body and "](javascript" not in body and "`" not in body and "**" not in body and "@" not in body
    assert "http:" not in body.replace("http:&#47;", "") and "www.e" not in body and "\u202e" not in body
    assert re.findall(r"!\[.*?\]\((.*?)\)", body) == [CURVE]
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        "# Model card", "## Held-out loss before and after", "## Curve", "## Settings",
    ]  # fmt: skip
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 5, 6) for line in rows)


def test_a_hub_id_is_named_for_the_hub_and_nothing_else_is(trained):
    trainer, _ = trained
    for base in ("org/model-7B", "org/model\nlicense: x", None, "/home/me/model", "a/b/c"):
        front = ModelCard(base, trainer.data, trainer.config, trainer.history).markdown().split("---\n", 2)[1]
        assert "/home" not in front and ("base_model: org/model-7B\n" in front) == (base == "org/model-7B") and "license" not in front


def test_text_in_markdown_is_itself():
    assert md("lr 1e-05, a/b (c)") == "lr 1e-05, a/b (c)"
    assert md("a|b*c") == "a&#124;b&#42;c" and md("<&>") == "&lt;&amp;&gt;"
