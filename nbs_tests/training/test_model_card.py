"""The README of an exported folder: how the weights came about, and nothing that a name could smuggle in."""

from __future__ import annotations

import re

import pytest
import yaml

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


def front_matter(page):
    return yaml.safe_load(page.split("---\n", 2)[1])


def test_the_hub_is_told_the_losses_after_training(trained):
    trainer, folder = trained
    front = front_matter((folder / "README.md").read_text("utf-8"))
    last = {report.split: report for report in trainer.history.evals}
    results = front["model-index"][0]["results"]
    found = {(one["dataset"]["split"], metric["type"]): metric["value"] for one in results for metric in one["metrics"]}
    assert found == {
        (split, metric): pytest.approx(getattr(last[split], metric), abs=1e-6)
        for split in ("test", "valid")
        for metric in ("loss", "perplexity")
    }  # fmt: skip
    assert front["trained_steps"] == 3 and "base_model" not in front and "license" not in front


def test_a_model_that_was_only_evaluated_before_has_no_results(trained):
    trainer, _ = trained
    before = ft.History([report for report in trainer.history if report.step == 0 or report.kind_of_report == "step"])
    assert "model-index" not in front_matter(ModelCard(None, trainer.data, trainer.config, before).markdown())


LICENSES = {
    "license: apache-2.0": {"license": "apache-2.0"},
    "language: en\nlicense: 'other'\nlicense_name: llama3.1\ntags: [a]": {"license": "other", "license_name": "llama3.1"},
    "license_name: alone": {},
    "license: [mit, x]": {},
    "license: |\n  x": {},
    "license: <script>alert(1)</script>": {},
    "tags:\n- x\n---\n\nlicense: behind": {},
}


@pytest.mark.parametrize("base_front", LICENSES)
def test_the_license_is_that_of_the_base_models_card(base_front, trained, tmp_path, monkeypatch):
    trainer, _ = trained
    (tmp_path / "README.md").write_text(f"---\n{base_front}\n---\n\nlicense: mit\n")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(tmp_path / file) if name == "org/model" else None)
    for base in (str(tmp_path), "org/model"):
        front = front_matter(ModelCard(base, trainer.data, trainer.config, trainer.history).markdown())
        assert {key: front[key] for key in front if key.startswith("license")} == LICENSES[base_front]


def test_text_in_markdown_is_itself():
    assert md("lr 1e-05, a/b (c)") == "lr 1e-05, a/b (c)"
    assert md("a|b*c") == "a&#124;b&#42;c" and md("<&>") == "&lt;&amp;&gt;"
