"""Rows as people have them: what is recognized, what becomes of it, and that it is told."""

import importlib.util
import json
import os

import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.data.rows import read_table
from nbs_tests.data import chat_templates as templates

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PARTS = HEAD + "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}" + TAIL
BOTH = HEAD + "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}+{% endfor %}{% endif %}" + TAIL
FIRST_PART = HEAD + "{{ m.content[0].text }}" + TAIL


def calling(arguments):
    """A template that writes calls, with this for their arguments."""
    tools = "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    call = "<call>{{ c.function.name }} " + arguments + "</call>"
    return tools + HEAD + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}" + call + "{% endfor %}" + TAIL


AS_JSON = calling("{{ c.function.arguments | tojson }}")
EITHER = calling("{% set a = c.function.arguments %}{{ a if a is string else a | tojson }}")
OWN = calling("{% for k, v in c.function.arguments.items() %}{{ k }}:{{ v }} {% endfor %}")
AS_IT_IS = calling("{{ c.function.arguments }}")  # of an object it writes Python's repr
JOINED = calling("{{ '' + c.function.arguments }}")  # it refuses an object

Q1, A1 = {"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "I am fine."}
Q2, A2 = {"role": "user", "content": "Which city?"}, {"role": "assistant", "content": "Tokyo."}
SYSTEM = {"role": "system", "content": "Be brief."}


def load(row, tokenizer, **settings):
    return ft.load_data({"train": [row]}, tokenizer, **settings)


def text_of(row, tokenizer):
    return load(row, tokenizer).train[0].text


def expected(messages, tokenizer, tools=None):
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)


def trained(data):
    example = data.train[0]
    return example.tokenizer.decode(example.tokens[example.loss_mask])


# ---- content


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def in_parts(*texts):
    return {"messages": [{"role": "user", "content": parts(*texts)}, {"role": "assistant", "content": parts("Fine.")}]}


def test_parts_are_joined_where_the_template_takes_texts(make_tokenizer):
    tokenizer = make_tokenizer(templates.CHATML)
    data = load(in_parts("How are ", "you?"), tokenizer, mask_prompt=True)
    assert data.train[0].text == expected([{"role": "user", "content": "How are you?"}, {**A1, "content": "Fine."}], tokenizer)
    assert trained(data) == "Fine.<|im_end|>\n" and "1 row with content in parts: their texts are joined" in data.notes[0]


@pytest.mark.parametrize("template", [PARTS, BOTH])
def test_parts_stay_where_the_template_takes_them(template, make_tokenizer):
    tokenizer, row = make_tokenizer(template), in_parts("How are ", "you?")
    assert text_of(row, tokenizer) == expected(row["messages"], tokenizer)


def test_a_template_of_one_part_gets_all_texts_in_one(make_tokenizer):
    assert "<|im_start|>user\nHow are you?<|im_end|>" in text_of(in_parts("How are ", "you?"), make_tokenizer(FIRST_PART))


def test_a_text_is_given_in_a_part_to_a_template_that_takes_only_parts(make_tokenizer):
    data = load({"messages": [Q1, A1]}, make_tokenizer(PARTS))
    assert "Hello!" in data.train[0].text and "I am fine." in data.train[0].text and "given in parts" in data.notes[0]


def test_a_pair_of_texts_is_given_in_parts_too(make_tokenizer):
    data = load({"prompt": "Hello!", "completion": "I am fine."}, make_tokenizer(PARTS), mask_prompt=True)
    assert "Hello!" in data.train[0].text and trained(data) == "I am fine.<|im_end|>\n"


def test_many_roles_take_no_long_time(make_tokenizer):
    rows = [{"messages": [{"role": f"r{i}", "content": parts("Hello!")}, A1]} for i in range(2000)]
    data = ft.load_data({"train": rows}, make_tokenizer(BOTH))
    assert len(data.train) == 2000 and "r1999\nHello!" in data.train[1999].text


IMAGE = {"type": "image_url", "image_url": {"url": "http://a/b.png"}}
NO_TEXTS = [(IMAGE, "a part of the type 'image_url'"), ({"type": "text", "text": None}, "of the type 'text'"), (3, "is a number")]


@pytest.mark.parametrize("part, found", NO_TEXTS)
def test_a_part_that_is_no_text_is_a_problem_with_its_place(part, found, tmp_path, tokenizer):
    row = {"messages": [{"role": "user", "content": [*parts("What is this?"), part]}, A1]}
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": [Q1, A1]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ft.DataError) as error:
        ft.load_data(tmp_path, tokenizer)
    assert error.value.problems[0].startswith("train.jsonl:2: messages[0].content[1] is ") and found in error.value.problems[0]


# ---- tools and calls


def calls(arguments, **message):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **message}


OBJECT = {"city": 'the "big" one'}


@pytest.mark.parametrize("template", [AS_JSON, EITHER, OWN, AS_IT_IS, JOINED], ids=["json", "either", "own", "as it is", "joined"])
def test_arguments_reach_the_template_in_the_form_that_it_takes(template, make_tokenizer):
    tokenizer = make_tokenizer(template)
    texts = {text_of({"messages": [Q1, calls(arguments), A1]}, tokenizer) for arguments in (OBJECT, json.dumps(OBJECT))}
    wanted = json.dumps(OBJECT) if template in (AS_IT_IS, JOINED) else OBJECT
    assert texts == {expected([Q1, calls(wanted), A1], tokenizer)}


def test_a_text_that_the_template_writes_as_it_is_keeps_its_spaces(make_tokenizer):
    assert '<call>add {"a":1}</call>' in text_of({"messages": [Q1, calls('{"a":1}'), A1]}, make_tokenizer(EITHER))


@pytest.mark.parametrize("arguments, said", [('{"a": 1', "as JSON"), ("[1]", "JSON text of a list"), ('{"a": 1, "a": 2}', "given twice")])
def test_arguments_that_are_no_object_are_a_problem_with_their_place(arguments, said, make_tokenizer):
    with pytest.raises(ft.DataError, match=r"train:1: 'messages\[1\]\.tool_calls\[0\]\.function\.arguments' is .*" + said):
        load({"messages": [Q1, calls(arguments), A1]}, make_tokenizer(AS_JSON))


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}
CALL = calls({"a": 1})["tool_calls"][0]
AS_TEXT = [
    {"messages": json.dumps([Q1, calls({"a": 1})]), "tools": [TOOL]},
    {"messages": [Q1, calls({"a": 1})], "tools": json.dumps([TOOL])},
    {"messages": [Q1, calls({"a": 1})], "tools": [json.dumps(TOOL)]},
    {"messages": [Q1, calls({"a": 1})], "tools": [{**TOOL, "function": json.dumps(TOOL["function"])}]},
    {"messages": [Q1, calls(0, tool_calls=json.dumps([CALL]))], "tools": [TOOL]},
    {"messages": [Q1, calls(0, tool_calls=[json.dumps(CALL)])], "tools": [TOOL]},
    {"messages": [Q1, calls(0, tool_calls=[{**CALL, "function": json.dumps(CALL["function"])}])], "tools": [TOOL]},
    {
        "messages": [Q1, calls({"a": 1})],
        "tools": [{**TOOL, "function": {"name": "add", "parameters": json.dumps(TOOL["function"]["parameters"])}}],
    },
]


@pytest.mark.parametrize("row", AS_TEXT, ids=range(len(AS_TEXT)))
def test_json_text_is_parsed_so_that_nothing_is_escaped_twice(row, make_tokenizer):
    tokenizer = make_tokenizer(AS_JSON)
    data = load(row, tokenizer)
    assert data.train[0].text == expected([Q1, calls({"a": 1})], tokenizer, [TOOL]) and "as JSON text: parsed" in data.notes[0]


def test_what_is_nested_too_deeply_is_a_problem(tmp_path, tokenizer):
    for depth in (300, 900, 5000):
        tools = '{"a": ' * depth + "1" + "}" * depth
        (tmp_path / "train.jsonl").write_text(f'{{"messages": {json.dumps([Q1, A1])}, "tools": [{tools}]}}\n')
        try:
            ft.load_data(tmp_path, tokenizer)
        except ft.DataError as error:
            assert error.problems[0].startswith("train.jsonl:1: ")


NO_JSON = [({"messages": "Hi"}, "'messages' is a string"), ({"messages": [Q1, A1], "tools": "[{"}, "'tools' is a string")]


@pytest.mark.parametrize("row, said", [*NO_JSON, ({"messages": "[" * 100_000}, "'messages' is a string")], ids=range(3))
def test_text_that_should_be_json_and_is_not_is_a_problem(row, said, tokenizer):
    with pytest.raises(ft.DataError, match=f"train:1: {said}.*as JSON: "):
        load(row, tokenizer)


def test_empty_text_counts_as_no_tools(tokenizer):
    data = load({"messages": [Q1, A1], "tools": ""}, tokenizer)
    assert data.train[0].text == expected([Q1, A1], tokenizer) and data.notes == []


def test_a_call_without_content_gets_an_empty_one_where_the_template_needs_it(make_tokenizer):
    tokenizer = make_tokenizer(AS_JSON.replace("{{ m.content or '' }}", "{{ m['content'] + '' }}"))
    call = calls({"a": 1})
    for content in ({}, {"content": None}):
        row = {"messages": [Q1, {"role": "assistant", "tool_calls": call["tool_calls"], **content}]}
        assert text_of(row, tokenizer) == expected([Q1, call], tokenizer)


def test_openais_older_calls_are_tool_calls(make_tokenizer):
    tokenizer, function = make_tokenizer(AS_JSON), CALL["function"]
    older = [Q1, {"role": "assistant", "content": None, "function_call": function}, {"role": "function", "name": "add", "content": "3"}]
    newer = [Q1, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "name": "add", "content": "3"}]
    for functions in ([TOOL["function"]], json.dumps([TOOL["function"]])):
        assert text_of({"messages": older, "functions": functions}, tokenizer) == expected(newer, tokenizer, [TOOL])


def test_a_completion_that_is_json_but_no_messages_stays_text(tokenizer):
    for completion in ('[{"a": 1}]', '[{"role": 1', '{"role": "assistant"}'):
        row = {"prompt": json.dumps([Q1]), "completion": completion}
        assert completion in load(row, tokenizer).train[0].text


# ---- forms of rows

SHAREGPT = [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "I am fine."}]
FORMS = [
    ({"conversations": SHAREGPT}, [Q1, A1], "ShareGPT"),
    ({"conversations": SHAREGPT, "system": "Be brief."}, [SYSTEM, Q1, A1], "ShareGPT"),
    ({"conversations": [{"from": "system", "value": "Be brief."}, *SHAREGPT], "system": ""}, [SYSTEM, Q1, A1], "ShareGPT"),
    ({"conversations": json.dumps(SHAREGPT)}, [Q1, A1], "ShareGPT"),
    ({"conversations": [Q1, A1], "id": 3}, [Q1, A1], "under 'conversations'"),
    ({"conversations": {"from": ["human", "gpt"], "value": ["Hello!", "I am fine."]}}, [Q1, A1], "object of lists"),
    ({"messages": {"role": ["user", "assistant"], "content": ["Hello!", "I am fine."]}}, [Q1, A1], "object of lists"),
    ({"instruction": "Hello!", "output": "I am fine."}, [Q1, A1], "Alpaca"),
    ({"instruction": "Hello!", "input": "", "output": "I am fine."}, [Q1, A1], "Alpaca"),
    ({"instruction": "Which", "input": "city?", "output": "Tokyo."}, [{**Q2, "content": "Which\ncity?"}, A2], "Alpaca"),
    (
        {"instruction": "Which city?", "output": "Tokyo.", "system": "Be brief.", "history": [["Hello!", "I am fine."]]},
        [SYSTEM, Q1, A1, Q2, A2],
        "Alpaca",
    ),
    ({"prompt": [SYSTEM, Q1], "completion": [A1]}, [SYSTEM, Q1, A1], "TRL"),
    ({"prompt": json.dumps([SYSTEM, Q1]), "completion": json.dumps([A1])}, [SYSTEM, Q1, A1], "JSON text of messages"),
]


@pytest.mark.parametrize("row, messages, said", FORMS, ids=range(len(FORMS)))
def test_a_form_that_is_recognized_is_read_as_chat_and_told(row, messages, said, tokenizer):
    data = load(row, tokenizer)
    assert data.train.format == "chat" and data.train[0].text == expected(messages, tokenizer)
    assert sum(said in note and "1 row" in note for note in data.notes) == 1 and not any("nothing reads" in note for note in data.notes)
    same = load(row, tokenizer, mask_prompt=True)
    assert trained(same).startswith("I am fine." if A1 in messages else "Tokyo.")


def test_sharegpts_calls_are_tool_calls(make_tokenizer):
    tokenizer = make_tokenizer(AS_JSON)
    conversation = [{"from": "human", "value": "Hello!"}, {"from": "function_call", "value": json.dumps(CALL["function"])}]
    conversation += [{"from": "observation", "value": "3"}, {"from": "gpt", "value": "I am fine."}]
    row = {"conversations": conversation, "tools": json.dumps([TOOL["function"]])}
    messages = [Q1, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, A1]
    assert text_of(row, tokenizer) == expected(messages, tokenizer, [TOOL])


def test_sharegpts_names_are_read_under_any_key(tokenizer):
    assert text_of({"messages": SHAREGPT}, tokenizer) == expected([Q1, A1], tokenizer)
    assert load({"turns": SHAREGPT}, tokenizer, chat_feature="turns").train[0].text == expected([Q1, A1], tokenizer)


def test_of_a_prompt_in_messages_no_answer_is_trained_on(tokenizer):
    row = {"prompt": [Q1, A1, Q2], "completion": [A2]}
    data = load(row, tokenizer, mask_prompt=True)
    assert data.train[0].text == expected([Q1, A1, Q2, A2], tokenizer) and trained(data) == "Tokyo.<|im_end|>\n"
    assert load(row, tokenizer).train[0].row["messages"] == [Q1, A1, Q2, A2]


WRONG = [
    ({"conversations": [{"from": "alien", "value": "Hi"}]}, "conversations[0]: 'from' is 'alien', expected human"),
    ({"conversations": ["Hi", "Hello"]}, "conversations[0] is a string"),
    ({"conversations": [{"from": "human", "value": None}]}, "conversations[0]: 'content' is null"),
    ({"instruction": 3, "output": "b"}, "'instruction' is a number"),
    ({"instruction": "a", "output": "b", "history": [["a"]]}, "history[0] is a list, expected a question and its answer"),
    ({"prompt": [Q1], "completion": [{"role": "assistant"}]}, "completion[0]: 'content' is missing"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "preference data ('chosen' and 'rejected')"),
    ({"chosen": [Q1, A1], "rejected": [Q1, A2]}, "preference data"),
    ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": SHAREGPT[1]}, "preference data"),
    ({"instruction": "Hello!", "output": None}, "'output' is null"),
    ({"conversations": None}, "'conversations' is null"),
]


@pytest.mark.parametrize("row, said", WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_in_a_form_is_told_in_its_own_names(row, said, tokenizer):
    with pytest.raises(ft.DataError) as error:
        load(row, tokenizer)
    assert error.value.problems[0].startswith(f"train:1: {said}")
    data = ft.load_data({"train": [row, {"messages": [Q1, A1]}]}, tokenizer, bad_rows="skip")
    assert len(data.train) == 1 and data.train.skipped == error.value.problems


def test_settings_and_formats_come_before_what_is_recognized(tokenizer):
    row = {"instruction": "Hello!", "input": "Please.", "output": "I am fine."}
    data = load(row, tokenizer, prompt_feature="instruction", completion_feature="output")
    assert data.train.format == "completions" and data.train[0].row is row
    assert data.notes == ["train: nothing reads 'input' (1 row, the first: train:1)."]
    assert load({**row, "text": "abc def"}, tokenizer).train.format == "text"


def test_keys_that_look_like_data_and_that_nothing_reads_are_named_once_with_their_rows(tokenizer):
    rows = [{"messages": [Q1, A1], "id": 1}, {"messages": [Q1, A1], "system": "Be brief.", "images": []}]
    rows += [{"messages": [{**Q1, "images": ["a.png"]}, A1], "system": "Be kind."}]
    notes = ft.load_data({"train": rows}, tokenizer).notes
    assert notes == ["train: nothing reads 'system' (2 rows, the first: train:2), 'messages[].images' (1 row, the first: train:3)."]


# ---- tables

INSTALLED_IN_CI = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None and not os.environ.get("CI"), reason="datasets is not installed; it is in CI"
)


@pytest.mark.parametrize("key", ["training", "loss_weight", "mask"])
def test_what_other_trainers_call_train_is_named_where_nothing_reads_it(key, tokenizer):
    data = load({"messages": [Q1, {**A1, key: 0}, Q2, A2]}, tokenizer, mask_prompt=True)
    assert f"train: nothing reads 'messages[].{key}' (1 row, the first: train:1)." in data.notes


def tool_row(name, arguments):
    properties = {key: {"type": "string"} for key in arguments}
    tool = {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"messages": [Q1, calls(0, tool_calls=[call]), A1], "tools": [tool]}


@INSTALLED_IN_CI
def test_rows_of_a_table_train_as_the_same_rows_in_json_lines(tmp_path, make_tokenizer):
    import datasets

    tokenizer, rows = make_tokenizer(AS_JSON), [tool_row("weather", {"city": "Bonn"}), tool_row("sum", {"left": "1", "right": "2"})]
    table = datasets.Dataset.from_list(rows)
    (tmp_path / "parquet").mkdir()
    table.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    wanted = ft.load_data({"train": rows}, tokenizer).fingerprint
    sources = [tmp_path / "parquet", {"train": table}, {"train": table.to_iterable_dataset()}, {"train": table.to_pandas()}]
    for source in sources:
        data = ft.load_data(source, tokenizer)
        assert data.fingerprint == wanted and "2 rows of a table had nulls inside tools or tool calls" in data.notes[0]


def test_arrays_within_arrays_of_a_frame_are_lists():
    call = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    as_arrays = {"messages": np.array([Q1, {**call, "tool_calls": np.array(call["tool_calls"])}])}
    split = read_table("train", "train", [as_arrays])
    assert split.rows == [("train:1", {"messages": [Q1, call]})] and split.notes == []


def test_rows_that_were_taken_out_of_a_table_are_known_by_their_tools(make_tokenizer):
    tokenizer, whole = make_tokenizer(AS_JSON), tool_row("weather", {"city": "Bonn"})
    padded = tool_row("weather", {"city": "Bonn", "left": None})
    padded["tools"][0]["function"]["parameters"]["properties"]["left"] = None
    data = load(padded, tokenizer)
    assert data.train[0].text == text_of(whole, tokenizer) and "with null for properties of tools" in data.notes[0]


def test_a_null_that_json_lines_write_stays(tmp_path, make_tokenizer):
    row = tool_row("weather", {"city": "Bonn", "unit": None})
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    data = ft.load_data(tmp_path, make_tokenizer(AS_JSON))
    assert '{"city": "Bonn", "unit": null}' in data.train[0].text
    assert "train: 1 row with null as a call's argument" in data.notes[0] and "train.jsonl:1" in data.notes[0]
