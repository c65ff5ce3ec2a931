"""The packaged base model: its size, its shape, its tokenizer, and that it knows English but no SQL."""

import pytest

import fulltune_nb as ft
from fulltune_nb import tiny
from fulltune_nb.tiny import text


@pytest.fixture(scope="module")
def lm():
    return ft.load_model(tiny.BASE_MODEL)


def test_the_folder_is_complete_and_at_most_8_mb():
    files = {path.name: path.stat().st_size for path in tiny.BASE_MODEL.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sum(files.values()) <= 8e6


def test_it_is_a_llama_of_one_to_four_million_bf16_parameters(lm):
    assert lm.config.family == "llama"
    assert 1e6 <= lm.num_parameters <= 4e6
    assert lm.dtype == "bfloat16"


@pytest.mark.parametrize("string", ["SELECT a FROM b WHERE c >= 1987", "Zoë — 🎉\n\t x  y", "  two  blanks ", "It's 'red'.", "\x00\x7f"])
def test_any_text_survives_the_tokenizer(lm, string):
    assert lm.tokenizer.decode(lm.tokenizer.encode(string)) == string


def test_every_digit_is_a_token_of_its_own(lm):
    assert lm.tokenizer.convert_ids_to_tokens(lm.tokenizer.encode("1987")) == ["1", "9", "8", "7"]
    digits = [token for token in lm.tokenizer.get_vocab() if any(c.isdigit() for c in token) and len(token) > 1]
    assert digits == []


def test_chat_is_rendered_with_one_token_a_mark_and_nothing_else(lm):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = lm.tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<|system|>s<|user|>a<|assistant|>b<|end|>"
    assert len(lm.tokenizer.encode(rendered)) == 7
    assert lm.tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True) == "<|system|>s<|user|>a<|assistant|>"
    assert all(len(lm.tokenizer.encode(token)) == 1 for token in lm.tokenizer.all_special_tokens)


def test_an_unknown_role_is_refused(lm):
    with pytest.raises(Exception, match="expected a role"):
        lm.tokenizer.apply_chat_template([{"role": "pirate", "content": "arr"}], tokenize=False)


def test_an_answer_ends_at_the_end_mark(lm):
    assert lm.stop_ids == (lm.tokenizer.convert_tokens_to_ids("<|end|>"),)


def test_only_the_answer_is_trained_on_with_the_prompt_masked(lm):
    rows = tiny.text_to_sql(train=5, valid=1, test=1)
    data = ft.load_data(rows, lm.tokenizer, mask_prompt=True)
    for row, example in zip(rows["train"], data.train, strict=True):
        assert lm.tokenizer.decode(example.tokens[example.loss_mask]) == row["completion"] + "<|end|>"


def test_the_base_knows_english_about_the_world_but_no_sql(lm):
    english = ft.load_data({"train": [{"text": t} for t in text.documents(seed=9, number=64)]}, lm.tokenizer)
    sql = ft.load_data({"train": tiny.text_to_sql(train=64, valid=1, test=1)["train"]}, lm.tokenizer, mask_prompt=True)
    config = ft.TrainConfig(batch_size=32)
    assert ft.Trainer(lm, english, config).evaluate("train").perplexity < 4
    assert ft.Trainer(lm, sql, config.replace(mask_prompt=True)).evaluate("train").perplexity > 100


def test_the_base_names_the_table_of_a_schema_it_has_not_seen(lm):
    schemas = [row["prompt"].splitlines()[0] for row in tiny.text_to_sql(train=5, valid=5, test=60)["test"]]
    answers = lm.chat_many([[{"role": "user", "content": f"{schema}\nWhat is the table called?"}] for schema in schemas], max_tokens=16)
    right = sum(answer == schema.split("(")[0] for answer, schema in zip(answers, schemas, strict=True))
    assert right >= 50  # 59 when it was made
