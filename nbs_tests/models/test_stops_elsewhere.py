"""A tuned model that was exported stops by itself in other libraries, at the ends that it was trained to write."""

import pytest

import fulltune_nb as ft
from fulltune_nb.models.model_file import load_with_model_file, save_model_file
from nbs_tests.conftest import CHATML
from nbs_tests.models.parity import need, need_torch
from nbs_tests.training.conftest import TINY_LLAMA

ANSWER, MOST = "I am fine, thank you.", 40
ROWS = [{"prompt": "How are you today?", "completion": ANSWER}] * 4
QUESTION = [{"role": "user", "content": ROWS[0]["prompt"]}]
PLAIN = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n###\n{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"


@pytest.fixture(scope="module")
def tuned(make_tokenizer):
    """`tuned(template, special_tokens=True)`: a model that has learnt the answer; `</s>` is the tokenizer's EOS."""
    found = {}

    def make(template):
        if template not in found:
            tokenizer = make_tokenizer(template)
            lm = ft.LanguageModel.from_config({**TINY_LLAMA, "eos_token_id": 1, "bos_token_id": 0}, tokenizer, seed=1)
            config = ft.TrainConfig(iters=60, batch_size=4, learning_rate=1e-2, mask_prompt=True, max_seq_length=96)
            ft.Trainer(lm, ft.load_data({"train": ROWS}, tokenizer, config=config), config).run()
            found[template] = lm
        return found[template]

    return make


TEMPLATES = {"chatml, whose end is not the tokenizer's EOS": CHATML, "no template": None}


@pytest.mark.parametrize("template", TEMPLATES)
def test_transformers_stops(template, tuned, tmp_path):
    need_torch()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = tuned(TEMPLATES[template])
    assert lm.chat(QUESTION, max_tokens=MOST) == ANSWER
    lm.save(tmp_path / "out")
    tokenizer, model = (kind.from_pretrained(tmp_path / "out") for kind in (AutoTokenizer, AutoModelForCausalLM))
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=MOST, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert len(answer) < MOST and tokenizer.decode(answer, skip_special_tokens=True) == ANSWER


def test_transformers_stops_at_an_end_of_several_tokens_when_it_has_the_tokenizer(tuned, tmp_path):
    need_torch()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tuned(PLAIN).save(tmp_path / "out")
    tokenizer, model = (kind.from_pretrained(tmp_path / "out") for kind in (AutoTokenizer, AutoModelForCausalLM))
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, tokenizer=tokenizer, max_new_tokens=MOST, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert len(answer) < MOST and tokenizer.decode(answer) == ANSWER + "\n###"


@pytest.mark.parametrize("template", TEMPLATES)
def test_mlx_lm_stops(template, tuned, tmp_path):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    import mlx_lm

    tuned(TEMPLATES[template]).save(tmp_path / "out")
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    pieces = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=MOST))
    assert pieces[-1].finish_reason == "stop" and "".join(piece.text for piece in pieces).removesuffix("<|im_end|>") == ANSWER


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_a_model_file_brings_its_ends_along(template, ending, tuned, make_tokenizer, tmp_path):
    lm = tuned(template)
    base = ft.LanguageModel.from_config({**TINY_LLAMA, "eos_token_id": 1}, make_tokenizer(template), seed=1).save(tmp_path / "base")
    save_model_file(tmp_path / f"tuned.{ending}", lm)
    again = load_with_model_file(str(base), tmp_path / f"tuned.{ending}")
    assert (again.stop_ids, again.stop_strings) == (lm.stop_ids, lm.stop_strings)
    assert again.generate(lm.chat_tokens(QUESTION), max_tokens=MOST).rstrip("\n") == ANSWER
