"""Which tokens are trained on, for templates in the shapes that real ones have, and for random ones."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from fulltune_nb.chat_template import ChatRenderer
from fulltune_nb.data import load_data
from fulltune_nb.data.settings import DataSettings
from nbs_tests.data import chat_templates as templates
from nbs_tests.data.test_encoding import A1, A2, Q1, Q2, SYSTEM, encode, encode_one, problem, trained_runs

LAST = DataSettings(mask_prompt="last")
THINKING = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nFine."}
TALK = [Q1, A1, Q2, A2]
CHATML_ENDS = ["Fine.<|im_end|>\n", "Still fine.<|im_end|>\n"]
PROMPT_GOES_ON_WITH_A_TAG = templates.CHATML + "{% if add_generation_prompt %}<|off|>{% endif %}"


@pytest.mark.parametrize(
    "template, messages, expected",
    [
        (templates.EMPTY_THINKING_LAST, TALK, ["Fine.<|im_end|>\n", "<think>\n\n</think>\n\nStill fine.<|im_end|>\n"]),
        (templates.EMPTY_THINKING_LAST, [Q1, THINKING], ["<think>\nHm.\n</think>\n\nFine.<|im_end|>\n"]),
        (templates.THINKING_IN_PROMPT, TALK, CHATML_ENDS),
        (templates.THINKING_IN_PROMPT, [Q1, {"role": "assistant", "content": "<table>"}], ["<table><|im_end|>\n"]),
        (templates.THINKING_IN_PROMPT, [Q1, THINKING], ["Hm.\n</think>\n\nFine.<|im_end|>\n"]),
        (templates.SPACE_BEFORE_INST, TALK, ["Fine.</s>", "Still fine.</s> "]),
        (templates.OTHER_LAST_END, TALK, ["Fine.<|im_end|>", "Still fine.</s>"]),
        (templates.CLOSES_CONVERSATION, TALK, [CHATML_ENDS[0], "Still fine.<|im_end|>\n</s>"]),
        (templates.DEFAULT_SYSTEM, [A1, Q2, A2], CHATML_ENDS),
        (templates.DEFAULT_SYSTEM, [A1], CHATML_ENDS[:1]),
        (templates.EMPTY_THINKING, [A1, Q2, A2], ["</think>Fine.<|im_end|>\n", "</think>Still fine.<|im_end|>\n"]),
        (templates.EMPTY_THINKING, [A1], ["</think>Fine.<|im_end|>\n"]),
        (templates.WANTS_A_QUESTION, [A1, Q2, A2], CHATML_ENDS),
        (templates.WANTS_A_QUESTION, [SYSTEM, A1, Q2, A2], CHATML_ENDS),
        (templates.PROMPT_ENDS_WITH_SPACE, [Q1, {"role": "assistant", "content": "the answer"}], [" the answer</s>\n"]),
        (templates.CHATML, [Q1, {"role": "assistant", "content": "\nFine. "}, Q2, A2], ["\nFine. <|im_end|>\n", CHATML_ENDS[1]]),
        (templates.CHATML, [Q1, {"role": "assistant", "content": ""}, Q2, A2], ["<|im_end|>\n", CHATML_ENDS[1]]),
        (PROMPT_GOES_ON_WITH_A_TAG, [Q1, THINKING], ["<think>\nHm.\n</think>\n\nFine.<|im_end|>\n"]),
    ],
)
def test_turns_are_found_where_they_are_no_prefixes_of_the_text(make_tokenizer, template, messages, expected):
    tokenizer = make_tokenizer(template)
    example = encode_one({"messages": messages}, "chat", tokenizer)
    assert trained_runs(example, tokenizer) == expected
    assert example.tokens.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)


def test_last_trains_the_last_assistant_turn_and_the_refusal_of_all_turns_says_so(make_tokenizer):
    tokenizer = make_tokenizer(templates.EMPTY_THINKING_LAST)
    messages = [Q1, THINKING, Q2, {"role": "assistant", "content": "<think>\nStill.\n</think>\n\nStill fine."}]
    text = problem({"messages": messages}, "chat", tokenizer)
    assert "reasoning of assistant turn 1 ('Hm.')" in text and 'mask_prompt="last"' in text
    encoded = encode([{"messages": messages}], "chat", tokenizer, LAST)
    assert trained_runs(encoded.examples[0], tokenizer) == ["<think>\nStill.\n</think>\n\nStill fine.<|im_end|>\n"]
    assert encoded.left_out == {"the reasoning of earlier turns": ["train:1"]}
    assert encode([{"messages": messages}], "chat", tokenizer, DataSettings()).left_out == encoded.left_out


def test_refusal_of_a_turn_that_cannot_be_found_says_that_the_last_one_can(make_tokenizer):
    tokenizer = make_tokenizer(templates.ANSWERS_BEHIND_RESULT)
    messages = [Q1, {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}, {"role": "tool", "content": "rain"}, A2]
    assert 'mask_prompt="last"' in problem({"messages": messages}, "chat", tokenizer)
    assert trained_runs(encode_one({"messages": messages}, "chat", tokenizer, LAST), tokenizer) == CHATML_ENDS[1:]


@pytest.mark.parametrize("messages", [[Q1, A1], TALK, [SYSTEM, Q1, A1, A2], [A1, Q1], [Q1, {"role": "assistant", "content": ""}]])
def test_generation_markers_train_what_transformers_masks(make_tokenizer, messages):
    tokenizer = make_tokenizer(templates.GENERATION)
    example = encode_one({"messages": messages}, "chat", tokenizer)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    assert example.loss_mask.tolist() == list(map(bool, tokenizer.apply_chat_template(messages, **options)["assistant_masks"]))


def test_generation_markers_of_the_last_turn_and_of_turns_that_are_not_to_be_trained(make_tokenizer):
    tokenizer = make_tokenizer(templates.GENERATION)
    assert trained_runs(encode_one({"messages": TALK}, "chat", tokenizer, LAST), tokenizer) == ["Still fine.<|im_end|>"]
    bad = [Q1, {**A1, "train": False}, Q2, A2]
    assert trained_runs(encode_one({"messages": bad}, "chat", tokenizer), tokenizer) == ["Still fine.<|im_end|>"]


def test_generation_markers_that_are_others_in_a_part_of_the_conversation_are_not_counted(make_tokenizer):
    whole, halves = "{% generation %}{{ m.content }}|{% endgeneration %}", "{% generation %}{{ m.content[:2] }}{% endgeneration %}"
    halves += "{{ '' }}{% generation %}{{ m.content[2:] }}|{% endgeneration %}"
    turn = "{% if m.role != 'assistant' %}{{ m.content }}{% elif loop.last %}" + whole + "{% else %}" + halves + "{% endif %}"
    tokenizer = make_tokenizer("{% for m in messages %}" + turn + "{% endfor %}")
    assert trained_runs(encode_one({"messages": TALK}, "chat", tokenizer, LAST), tokenizer) == ["Still fine.|"]
    first_only = [Q1, A1, Q2, {**A2, "train": False}]
    assert trained_runs(encode_one({"messages": first_only}, "chat", tokenizer), tokenizer) == ["Fine.|"]


def test_a_generation_marker_behind_the_conversation_belongs_to_its_last_turn(make_tokenizer):
    closing = "{% if not add_generation_prompt %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"  # as in Phi 3's
    tokenizer = make_tokenizer(templates.GENERATION + closing)
    for untrained, expected in ((1, ["Still fine.<|im_end|>", "</s>"]), (3, ["Fine.<|im_end|>"])):
        messages = [{**message, "train": i != untrained} for i, message in enumerate(TALK)]
        assert trained_runs(encode_one({"messages": messages}, "chat", tokenizer), tokenizer) == expected


def test_words_that_a_template_leaves_out_of_its_generation_markers_are_told(make_tokenizer):
    calls = "{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}{% generation %}"
    tokenizer = make_tokenizer(templates.GENERATION.replace("{% generation %}", calls))
    rows = [{"messages": [Q1, {**A1, "tool_calls": [CALL]}]}, {"messages": TALK}]
    assert encode(rows, "chat", tokenizer).left_out == {"of training (by its {% generation %}) words of assistant turns": ["train:1"]}


@pytest.mark.parametrize("no", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_messages_with_weight_0_or_train_false_are_not_trained(tokenizer, no):
    messages = [Q1, {**A1, **no}, Q2, {**A2, "weight": 1, "train": True}]
    assert trained_runs(encode_one({"messages": messages}, "chat", tokenizer), tokenizer) == CHATML_ENDS[1:]
    runs = trained_runs(encode_one({"messages": messages}, "chat", tokenizer, DataSettings()), tokenizer)
    assert "".join(runs).count("ine.") == 1 and len(runs) == 2 and runs[0].endswith("assistant\n")
    assert not encode_one({"messages": messages[:2]}, "chat", tokenizer, LAST).loss_mask.any()
    untrained_question = [{**Q1, **no}, A1]
    runs = trained_runs(encode_one({"messages": untrained_question}, "chat", tokenizer, DataSettings()), tokenizer)
    assert "".join(runs) == "<|im_start|>assistant\nFine.<|im_end|>\n"


@pytest.mark.parametrize("wrong", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}])
def test_weight_or_train_of_another_value_is_an_error_of_the_row(tokenizer, wrong):
    assert "messages[1]" in problem({"messages": [Q1, {**A1, **wrong}]}, "chat", tokenizer)


class NoPlaces:
    """A tokenizer that does not tell which characters its tokens are, as those in Python."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, texts, **options):
        return BatchEncoding(dict(self._tokenizer(texts, **options)))


def test_a_tokenizer_that_tells_no_places_gives_the_same_masks_and_refuses_joined_characters(make_tokenizer):
    tokenizer = make_tokenizer(templates.EMPTY_THINKING_LAST)
    fast, slow = (encode_one({"messages": TALK}, "chat", each) for each in (tokenizer, NoPlaces(tokenizer)))
    assert slow.loss_mask.tolist() == fast.loss_mask.tolist()
    joined = {"messages": [Q1, {"role": "assistant", "content": "the answer"}]}
    assert "no token border" in problem(joined, "chat", NoPlaces(make_tokenizer(templates.PROMPT_ENDS_WITH_SPACE)))


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "template, messages, said",
    [
        (templates.CHATML, [Q1, {**A1, "reasoning_content": "all is well"}], "reasoning of assistant turn 1 ('all is well')"),
        (templates.CHATML, [Q1, {**A1, "thinking": "Fine."}], "reasoning of assistant turn 1"),  # its word stands in the text by chance
        (templates.CALLS_BY_NAME, [Q1, {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}], "assistant turn 1 ('I look.')"),
        (templates.CALLS_BY_NAME, [Q1, {"role": "assistant", "tool_calls": [CALL]}], "the tool calls of assistant turn 1 ('Oslo')"),
        (templates.IGNORES_ASSISTANT, [Q1, A1], "words of assistant turn 1"),
        (templates.CHATML.replace("message['content']", "message['content'][:6]"), [Q1, A1], "words of user turn 1"),
    ],
)
@pytest.mark.parametrize("mask_prompt", [False, True, "last"])
def test_lost_words_of_the_user_or_of_a_trained_turn_are_an_error_of_the_row(make_tokenizer, template, messages, said, mask_prompt):
    assert said in problem({"messages": messages}, "chat", make_tokenizer(template), DataSettings(mask_prompt=mask_prompt))


CALL_INSTEAD_OF_CONTENT = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_reasoning_that_is_lost_is_an_error_also_behind_rows_with_a_thinking_in_their_content(make_tokenizer):
    written = {"messages": [Q1, {**A1, "content": "<think>\nHm.\n</think>\n\nFine."}]}
    lost = {"messages": [Q1, {**A1, "reasoning_content": "Fine."}]}  # its word stands in the text by chance
    data = load_data({"train": [written, lost, written]}, make_tokenizer(templates.CHATML), bad_rows="skip", mask_prompt=True)
    assert len(data.train) == 2 and "the reasoning of assistant turn 1 ('Fine.')" in data.train.skipped[0]


@pytest.mark.parametrize("mask_prompt", [False, True, "last"])
def test_words_that_only_the_question_has_are_lost_also_behind_rows_where_such_words_were_written(make_tokenizer, mask_prompt):
    question = {"role": "user", "content": "Let me see Oslo"}
    lost = {"messages": [question, {"role": "assistant", "content": "Let me see", "tool_calls": [CALL]}]}
    written = [{"messages": [Q1, A1]}, {"messages": [Q1, {"role": "assistant", "content": "", "tool_calls": [CALL]}]}] * 2
    tokenizer = make_tokenizer(CALL_INSTEAD_OF_CONTENT)
    data = load_data({"train": [*written, lost]}, tokenizer, bad_rows="skip", mask_prompt=mask_prompt)
    assert len(data.train) == 4 and "assistant turn 1 ('Let me see')" in data.train.skipped[0]


def test_other_words_that_are_lost_are_told_with_their_number_and_first_row(make_tokenizer):
    tool = {"role": "tool", "content": "rain, 7 degrees"}
    rows = [[Q1, A1], [SYSTEM, Q1, A1], [Q1, tool, A1], [SYSTEM, Q1, {**A1, "note": "nobody reads this"}]]
    rows = {"train": [{"messages": row} for row in rows]}
    for mask_prompt in (False, True):
        notes = load_data(rows, make_tokenizer(templates.TWO_ROLES), mask_prompt=mask_prompt).notes
        assert any("leaves out the words of system messages of 2 of 4 rows, first train:2. Put them into" in note for note in notes)
        assert any("leaves out the words of tool messages of 1 of 4 rows, first train:3" in note for note in notes)
        assert any("the key 'note' of assistant messages of 1 of 4 rows" in note for note in notes)
        assert load_data({"train": rows["train"][:1]}, make_tokenizer(templates.TWO_ROLES), mask_prompt=mask_prompt).notes == []


def test_tools_of_which_a_part_is_written_are_told(make_tokenizer):
    names = "{% for tool in tools or [] %}{{ tool.function.name + '\n' }}{% endfor %}" + templates.CHATML
    row = {"messages": [Q1, A1], "tools": [TOOL]}
    assert encode([row], "chat", make_tokenizer(names)).left_out == {"words of the tools": ["train:1"]}


def test_words_that_json_or_the_template_writes_in_another_way_are_not_lost(make_tokenizer):
    call = {"type": "function", "function": {"name": "say", "arguments": {"text": 'a "quoted" é\nline', "n": 5}}}
    messages = [Q1, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "done"}, {**A1, "content": " Fine. \n"}]
    template = templates.TOOLS.replace("message.content }}", "message.content | trim }}")
    assert encode([{"messages": messages}], "chat", make_tokenizer(template)).left_out == {}
    ascii_only = template.replace("tojson", "tojson(ensure_ascii=True)")
    assert encode([{"messages": messages}], "chat", make_tokenizer(ascii_only)).left_out == {}
    spaced = {"role": "assistant", "content": "<think>Hm, so.</think>Fine."}
    assert encode([{"messages": [Q1, spaced]}], "chat", make_tokenizer(templates.EMPTY_THINKING_LAST)).left_out == {}


@pytest.mark.parametrize("template", [templates.CHATML, templates.EMPTY_THINKING_LAST, templates.DROPS_EARLIER_THINKING])
def test_private_characters_in_the_rows_are_words_like_others(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    for private in ("\U000f0000", "\U000f0003 \U00100000", "\U000f0001\U0010fffd"):  # some fonts have icons there
        messages = [Q1, {"role": "assistant", "content": f"{private} Fine."}, Q2, A2]
        trained = trained_runs(encode_one({"messages": messages}, "chat", tokenizer), tokenizer)
        assert private in trained[0] and A2["content"] in trained[1] and len(trained) == 2


@pytest.mark.parametrize("template", [templates.CHATML, templates.EMPTY_THINKING_LAST, templates.THINKING_IN_PROMPT, templates.GENERATION])
def test_the_number_of_renderings_does_not_grow_with_the_number_of_turns(make_tokenizer, template, monkeypatch):
    run, calls = ChatRenderer._run, []
    monkeypatch.setattr(ChatRenderer, "_run", lambda self, render: calls.append(1) or run(self, render))

    def renderings(turns):
        calls.clear()
        messages = [{"role": ("user", "assistant")[i % 2], "content": f"Words {i} here."} for i in range(2 * turns)]
        tokenizer = make_tokenizer(template)
        assert len(trained_runs(encode_one({"messages": messages}, "chat", tokenizer), tokenizer)) == turns
        return len(calls)

    assert renderings(4) == renderings(40) <= 16


def test_hostile_rows_are_errors_of_the_row_or_quick(make_tokenizer):
    deep = "x"
    for _ in range(100_000):
        deep = {"a": deep}
    call = {"function": {"name": "f", "arguments": deep}}
    assert "nested too deeply" in problem({"messages": [Q1, {**A1, "tool_calls": [call]}]}, "chat", make_tokenizer(templates.TOOLS))
    tokenizer = make_tokenizer(templates.CHATML)
    start = time.process_time()
    encode([{"messages": [Q1, {**A1, "note": "a" * 100_000, "reasoning": "<" * 30_000}]}], "chat", tokenizer)
    encode([{"messages": [Q1, {**A1, "content": "<think>" * 5_000 + "<a" * 10_000}, Q2, A2]}], "chat", tokenizer)
    assert time.process_time() - start < 10  # quadratic, it would be minutes


def test_a_message_without_training_that_cannot_be_found_is_an_error_that_says_so(make_tokenizer):
    tokenizer = make_tokenizer(templates.ANSWERS_BEHIND_RESULT)
    messages = [Q1, {"role": "assistant", "content": "I look.", "tool_calls": [CALL], "weight": 0}, {"role": "tool", "content": "rain"}, A2]
    text = problem({"messages": messages}, "chat", tokenizer, DataSettings())
    assert "weight 0" in text and "mask_prompt" not in text


# ---- random conversations and random small templates

HEADS = {"user": "User: ", "assistant": "Bot: ", "system": "Note: ", "tool": "Result: "}


@st.composite
def small_templates(draw):
    """A template, and which kinds of words it writes: a predicate of (message, its index, the index of the last user's message)."""
    tails = {role: draw(st.sampled_from(["\n", "</s>", "<|im_end|>\n", "</s> ", " ;\n"])) for role in HEADS}
    heads = {role: draw(st.sampled_from([head, f"<|im_start|>{role}\n", head.upper() + "\n"])) for role, head in HEADS.items()}
    written_roles = {"user", "assistant", *draw(st.sets(st.sampled_from(["system", "tool"])))}
    reasoning = draw(st.sampled_from(["never", "always", "last"]))
    prompt = heads["assistant"] + draw(st.sampled_from(["", "<think>"])) if draw(st.booleans()) else ""
    begin = draw(st.sampled_from(["", "{{ bos_token }}", "{% if messages[0].role != 'system' %}Note: help.\n{% endif %}"]))
    trim, last_end = draw(st.sampled_from(["", " | trim"])), draw(st.sampled_from(["", "</s>"]))
    condition = {"never": "false", "always": "true", "last": "loop.index0 > asked.at"}[reasoning]
    parts = [begin, "{% set asked = namespace(at=-1) %}"]
    parts.append("{% for m in messages %}{% if m.role == 'user' %}{% set asked.at = loop.index0 %}{% endif %}{% endfor %}")
    parts.append("{% for m in messages %}")
    for role in HEADS:
        thinking = f"{{% if m.thinking and {condition} %}}<think>{{{{ m.thinking }}}}</think>{{% endif %}}" if role == "assistant" else ""
        body = f"{heads[role]}{thinking}{{{{ m.content{trim} }}}}{tails[role]}" if role in written_roles else ""
        parts.append(f"{{% if m.role == '{role}' %}}{body}{{% endif %}}")
    parts.append(f"{{% if loop.last and m.role == 'assistant' and not add_generation_prompt %}}{last_end}{{% endif %}}{{% endfor %}}")
    parts.append(f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}")
    keeps = {"never": lambda i, asked: False, "always": lambda i, asked: True, "last": lambda i, asked: i > asked}[reasoning]
    return "".join(f"{{{{ {part!r} }}}}" if not part.startswith("{") else part for part in parts), written_roles, keeps


@st.composite
def conversations(draw):
    """Messages whose words are all different, with spaces around them."""
    messages = []
    for i in range(draw(st.integers(1, 7))):
        message = {"role": draw(st.sampled_from(["user", "assistant", "assistant", "system", "tool"]))}
        message["content"] = f"{draw(st.sampled_from(['', ' ', chr(10)]))}said{i}q{draw(st.sampled_from(['', ' ', chr(10)]))}"
        if message["role"] == "assistant" and draw(st.booleans()):
            message["thinking"] = f"thought{i}q"
        if message["role"] == "assistant" and draw(st.integers(0, 3)) == 0:
            message["train"] = False
        messages.append(message)
    return messages


@given(small_templates(), conversations(), st.sampled_from([True, "last", False]))
@settings(max_examples=60, deadline=None)
def test_marked_words_of_trained_turns_are_trained_no_others_and_lost_ones_are_told(make_tokenizer, template, messages, mask_prompt):
    template, written_roles, keeps_reasoning = template
    tokenizer = make_tokenizer(template)
    asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = {i for i in (answers[-1:] if mask_prompt == "last" else answers) if messages[i].get("train") is not False}
    lost_reasoning = {i for i in answers if "thinking" in messages[i] and not keeps_reasoning(i, asked)}
    is_refused = any(i in wanted and (mask_prompt or i > asked) for i in lost_reasoning)
    encoded = encode([{"messages": messages}], "chat", tokenizer, DataSettings(mask_prompt=mask_prompt))
    assert bool(encoded.problems) == is_refused, encoded.problems
    if is_refused:
        return
    is_lost = bool(lost_reasoning) or any(message["role"] not in written_roles for message in messages)
    assert bool(encoded.left_out) == is_lost
    trained = "\n".join(trained_runs(encoded.examples[0], tokenizer))
    for i, message in enumerate(messages):
        is_trained = i in wanted if mask_prompt else message.get("train") is not False
        assert (f"said{i}q" in trained) == (is_trained and message["role"] in written_roles)
        assert (f"thought{i}q" in trained) == (is_trained and "thinking" in message and i not in lost_reasoning)
