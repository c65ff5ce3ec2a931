"""lm_eval's tasks on a model in memory: log-likelihoods, answers and scores as of lm_eval's own Hugging Face model with equal weights."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest

import fulltune_nb as ft
from fulltune_nb.errors import ConfigError, MissingDependencyError
from nbs_tests.conftest import CHATML
from nbs_tests.models.parity import need, need_torch
from nbs_tests.training.conftest import TINY_LLAMA

TEXT = "The quick brown fox jumps over the lazy dog. How many rows are in the table? "
PAIRS = [
    ("How many rows are", " in the table?"), ("", "Hello!"), ("Which city ", "has the most people?"), ("a", "b c d"),
    (TEXT * 5, " I am fine"), ("<s>How", " are you"), ("The answer is", " forty two"), ("größer", " 東京"),
]  # fmt: skip
ROWS = [
    {"question": "How are you?", "choices": ["I am fine, thank you.", "select name", "42"], "answer": 0},
    {"question": "Which city?", "choices": ["the table", "select name from cities", "Hello!"], "answer": 1},
    {"question": "How many rows?", "choices": ["The fox", "The lazy dog", "forty two"], "answer": 2},
]


@pytest.fixture(scope="module")
def harness():
    need("lm_eval", "pip install lm_eval==0.4.13 accelerate")
    from fulltune_nb.insight import harness

    return harness


@pytest.fixture(scope="module", params=[False, True], ids=["no BOS", "BOS"])
def pair(request, harness, make_tokenizer, tmp_path_factory):
    """Our model for lm_eval, and lm_eval's own with the same weights; at most 64 tokens a row."""
    need_torch()
    need("accelerate", "pip install accelerate")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape = {**TINY_LLAMA, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
    tokenizer = make_tokenizer(CHATML, adds_bos=request.param, model_max_length=64)
    folder = ft.LanguageModel.from_config(shape, tokenizer, seed=3).save(tmp_path_factory.mktemp("pair") / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    theirs = HFLM(pretrained=theirs, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4, device="cpu", max_length=64)
    return harness.HarnessModel(ft.load_model(folder)), theirs


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def test_log_likelihoods_are_those_of_the_hugging_face_model(pair):
    ours, theirs = pair
    greedy = [(context, ours.lm.generate(context, max_tokens=3)) for context in ("How many", "The")]
    wanted = theirs.loglikelihood(requests(*PAIRS, *greedy), disable_tqdm=True)
    found = ours.loglikelihood(requests(*PAIRS, *greedy), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]
    assert len(ours.tok_encode(TEXT * 5)) > ours.max_length  # so that one was cut


def test_whole_texts_of_several_windows_have_the_same_log_likelihood(pair):
    ours, theirs = pair
    texts = [("Hello!",), (TEXT * 5,), (TEXT * 2 + "x",)]
    wanted = theirs.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    assert found == pytest.approx(wanted, abs=1e-4, rel=1e-6)


def test_answers_are_the_same(pair):
    ours, theirs = pair
    texts = [context for context, _ in PAIRS if context and not context.startswith("<s>")]  # theirs: a BOS before one is left out of all
    asked = requests(*((text, {"until": ["e", "\n"], "max_gen_toks": most, "do_sample": False}) for text in texts for most in (5, 12)))
    # random weights end in the middle of a letter, of which theirs shows the beginning
    found, wanted = ([text.rstrip("\ufffd") for text in answers] for answers in (ours.generate_until(asked), theirs.generate_until(asked)))
    assert found == wanted and any(found)


def test_a_task_is_scored_the_same_and_stands_in_a_table_before_and_after_training(pair, harness, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    ours, theirs = pair
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}, "test_split": "test"}
    choice = {**data, "task": "choose", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
              "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}  # fmt: skip
    texts = {**data, "task": "read", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
             "metric_list": [{"metric": "word_perplexity"}]}  # fmt: skip
    before = harness.evaluate_tasks(ours.lm, [choice, texts], name="before", bootstrap_iters=0)
    manager = TaskManager(include_defaults=False)
    wanted = lm_eval.simple_evaluate(theirs, tasks=[choice, texts], bootstrap_iters=0, task_manager=manager)["results"]
    found = {(score.task, score.metric) for score in before.columns["before"]}
    assert found == {("choose", "acc"), ("choose", "acc_norm"), ("read", "word_perplexity")}
    for score in before.columns["before"]:
        assert score.value == pytest.approx(wanted[score.task][f"{score.metric},none"], rel=1e-5) and score.samples == 3
    lm = ft.load_model(ours.lm.source)
    config = ft.TrainConfig(iters=30, batch_size=3, learning_rate=1e-2)
    rows = [{"text": f"{row['question']} {row['choices'][row['answer']]}"} for row in ROWS]
    ft.Trainer(lm, ft.load_data({"train": rows}, lm.tokenizer, config=config), config).run()
    both = before.beside(harness.evaluate_tasks(lm, [choice, texts], name="after", bootstrap_iters=0))
    accuracy = next(row for row in both.rows() if row["metric"] == "acc")
    assert accuracy["after"] == 1.0 > accuracy["before"] and accuracy["better"] == "higher"
    assert "before" in both._repr_html_() and "1.0000" in both._repr_html_() and len(both.to_frame()) == 3
    assert list(before.beside(before).columns) == ["before", "before (2)"]


def test_the_chat_template_is_that_of_training(pair):
    ours, _ = pair
    assert ours.apply_chat_template([{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_what_there_is_not_is_told(pair):
    ours, _ = pair
    with pytest.raises(ConfigError, match="num_beams=4"):
        ours.generate_until(requests(("a", {"until": [], "num_beams": 4})))
    with pytest.raises(ConfigError, match="at most 64"):
        ours.generate_until(requests(("a", {"until": [], "max_gen_toks": 64})))
    with pytest.raises(ConfigError, match="continuation of"):
        ours.loglikelihood(requests(("a", TEXT * 6)))


def test_drawn_answers_are_the_same_each_time(pair):
    ours, _ = pair
    asked = requests(("The", {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_p": 0.9}))
    assert ours.generate_until(asked) == ours.generate_until(asked)
    assert math.isfinite(ours.loglikelihood(requests(("a", " b")))[0][0])


def test_without_lm_eval_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "fulltune_nb.insight.harness", raising=False)
    with pytest.raises(MissingDependencyError, match=r"fulltune_nb\[eval\]"):
        import fulltune_nb.insight.harness  # noqa: F401
