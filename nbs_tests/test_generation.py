"""Sampling against brute force, answers against transformers, many answers against single ones."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fulltune_nb.errors import GenerationError
from fulltune_nb.models import generation
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.generation import Sampler, Sampling, batches_by_length, candidate_scores, decode, prefill
from fulltune_nb.models.kv_cache import make_cache
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.models.model_config import read_config
from fulltune_nb.models.rope import RopeConfig
from nbs_tests.gpu_like import gpu_like

SMALL = {
    "vocab_size": 500,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "phi": {"hidden_size": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
    "gemma": {"head_dim": 16},
    "olmo": {"clip_qkv": 0.6},
}
PROMPTS = ["The quick brown fox", "How many rows?", "a", "select name from cities where population > 1000", "Hello! How are you", "b"]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request, tokenizer):
    return LanguageModel.from_config({"model_type": request.param, **SMALL, **FAMILIES[request.param]}, tokenizer)


@pytest.fixture(scope="module")
def llama(tokenizer):
    return LanguageModel.from_config({"model_type": "llama", **SMALL}, tokenizer, seed=1)


class Scripted:
    """Stands for a model: says the given tokens, one after the other, whatever it reads."""

    def __init__(self, tokens, vocab_size=500):
        kinds = {"positions": None, "windows": (None,), "ropes": (RopeConfig(1e4, 2),), "by_length": False}
        kinds |= {"score_cap": None, "sinks": False}
        sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_kv_heads", "head_dim"), 1)
        self.config = SimpleNamespace(**kinds, **sizes, vocab_size=vocab_size)
        self.embed_tokens, self._tokens = SimpleNamespace(weight=mx.zeros((vocab_size, 1))), list(tokens)

    def parameters(self):
        return {"embed_tokens": {"weight": self.embed_tokens.weight}}

    def hidden_states(self, ids, cache):
        rows, length = ids.shape
        keys = mx.zeros((rows, 1, length, 1))
        cache[0].update(keys, keys)
        return mx.full((rows, length, 1), cache[0].offset)

    def head(self, hidden):
        self._start = getattr(self, "_start", int(hidden[0, 0].item()))  # the prompt's length
        token = self._tokens[int(hidden.reshape(-1)[-1].item()) - self._start]
        return mx.broadcast_to(mx.arange(self.config.vocab_size) == token, (*hidden.shape[:-1], self.config.vocab_size)).astype(mx.float32)

    def __call__(self, ids, cache):
        return self.head(self.hidden_states(ids, cache))


def scripted(tokenizer, text, **options):
    tokens = [*tokenizer.encode(text, add_special_tokens=False), *[tokenizer.eos_token_id] * 3]
    return LanguageModel(Scripted(tokens), tokenizer, **options)


# Answers


def test_greedy_tokens_are_those_of_the_whole_sequence_computed_again_each_time(lm):
    prompt = lm.tokenizer.encode("The quick brown fox")
    steps = decode(lm.model, [prompt], Sampling(max_tokens=20), [0])
    tokens = list(prompt)
    for (token,) in steps:
        assert token == mx.argmax(lm.model(mx.array([tokens]))[0, -1]).item()
        tokens.append(token)
    assert len(tokens) == len(prompt) + 20


def test_greedy_text_is_that_of_transformers_for_64_tokens(lm, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference implementation runs on torch; CI installs it")
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(lm.save(tmp_path / "model"))
    for prompt in PROMPTS[:2]:
        ids = lm.tokenizer.encode(prompt)
        found = reference.generate(torch.tensor([ids]), max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=2)
        tokens = [token for (token,) in decode(lm.model, [ids], Sampling(max_tokens=64), [0])]
        assert tokens == found[0, len(ids) :].tolist()


def read_whole(*prompt):
    """The logits after a prompt, and how far it was read after each chunk but the last."""
    reading, read = prefill(*prompt), []
    while True:
        try:
            read.append(next(reading))
        except StopIteration as end:
            return end.value, [(piece.read, piece.total) for piece in read]


@pytest.fixture
def chunks_of_512(monkeypatch):
    """Whatever computes."""
    monkeypatch.setattr(generation, "_FUSED_PREFILL_TOKENS", 512)


def test_a_long_prompt_is_read_in_chunks_with_the_same_result(llama, chunks_of_512):
    ids = mx.array([list(range(10, 490)) * 3])
    cache = make_cache(llama.config.windows)
    chunked, read = read_whole(llama.model, ids, cache)
    assert cache[0].offset == ids.shape[1] > 2 * 512 and read == [(512, 1440), (1024, 1440)]
    assert mx.allclose(chunked, llama.model(ids)[:, -1], atol=1e-5)


def test_on_a_cpu_chunks_get_smaller_the_more_their_tokens_cost(monkeypatch):
    monkeypatch.setattr(generation, "_CHUNK_WORK", 2**27)
    monkeypatch.setattr(generation, "on_cpu", lambda: True)
    for scaling in (None, {"type": "dynamic", "factor": 2.0}):  # of the second, all tokens depend on how many there are
        mx.random.seed(0)
        decoder = Decoder(read_config({"model_type": "llama", **SMALL, "max_position_embeddings": 600, "rope_scaling": scaling}))
        ids = mx.array([list(range(10, 490)) * 2])
        found, read = read_whole(decoder, ids, make_cache(decoder.config.windows))
        sizes = np.diff([0, *(read for read, _ in read), 960])
        assert len(read) > 4 and max(sizes) < 512 and min(sizes[:-1]) >= 32 and sizes[0] > sizes[-2]
        assert mx.allclose(found, decoder(ids)[:, -1], atol=1e-5)
        assert read_whole(decoder, ids[:, :512], make_cache(decoder.config.windows))[1] == []  # a short one at once


@pytest.mark.filterwarnings("ignore:.*the model was made for")
def test_a_stream_can_say_how_far_a_long_prompt_is_read_and_be_left_there(llama, chunks_of_512):
    prompt = list(range(10, 490)) * 3
    stream = llama.stream(prompt, max_tokens=5)
    steps = list(stream.steps)
    assert [(step.read, step.total) for step in steps if not step] == [(512, 1440), (1024, 1440)]
    pieces = list(llama.stream(prompt, max_tokens=5))
    assert all(pieces) and pieces == [step for step in steps if step] and "".join(pieces) == llama.generate(prompt, max_tokens=5)
    left = llama.stream(prompt, max_tokens=5)
    assert next(left.steps) == ""
    left.close()
    assert list(left) == list(left.steps) == []
    both = [prompt, "The quick"]
    assert llama.generate_many(both, max_tokens=5) == [llama.generate(text, max_tokens=5) for text in both]


@pytest.mark.filterwarnings("ignore:.*the model was made for")
def test_a_prompt_that_memory_cannot_hold_is_refused_before_anything_runs(llama, monkeypatch):
    weights = sum(array.nbytes for _, array in tree_flatten(llama.model.parameters()))
    monkeypatch.setattr(generation, "machine_limit", lambda: weights + 1000)
    monkeypatch.setattr(generation, "make_cache", None)
    for ask in (llama.generate, lambda prompt: next(llama.stream(prompt)), lambda prompt: llama.generate_many([prompt])):
        with pytest.raises(GenerationError, match="1 prompt of up to 1,440 tokens: keys and values take .* this machine has"):
            ask(list(range(10, 490)) * 3)


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({}, 64),
        ({"max_position_embeddings": None}, None),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 256),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}, 128),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, 64),
    ],
    ids=str,
)
def test_a_prompt_longer_than_the_model_was_made_for_is_warned_of(tokenizer, settings, length, recwarn):
    lm = LanguageModel.from_config({"model_type": "llama", **SMALL, "max_position_embeddings": 64, **settings}, tokenizer)
    assert lm.context_length == length
    for tokens in (length or 2048, (length or 10**4) + 1):
        prompt = [5] * tokens
        lm.generate(prompt, max_tokens=1)
        next(lm.stream(prompt, max_tokens=1), None)
        lm.generate_many([prompt, [5]], max_tokens=1)
        said = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
        assert len(said) == (3 if length and tokens > length else 0)
        assert all(f"has {tokens:,} tokens, but the model was made for {length:,}" in text for text in said)
    messages = [{"role": "user", "content": "Hello! " * 300}]
    if length:
        with pytest.warns(UserWarning, match=f"made for {length}"):
            lm.chat(messages, max_tokens=1)


def test_where_the_config_says_nothing_the_tokenizer_tells_how_long_a_text_may_be(make_tokenizer):
    tokenizer = make_tokenizer()
    lm = LanguageModel.from_config({"model_type": "llama", **SMALL, "max_position_embeddings": None}, tokenizer)
    assert lm.context_length is None
    tokenizer.model_max_length = 4096
    assert lm.context_length == 4096


@pytest.mark.parametrize(
    ("settings", "chunks"),
    [
        ({}, [32, 32, 13]),
        ({"model_type": "mistral", "sliding_window": 11}, [32, 32, 13]),
        ({"model_type": "gemma2", "head_dim": 8}, [8] * 9 + [5]),  # holds its scores
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16}, [32, 32, 13]),
    ],
    ids=str,
)
def test_on_a_gpu_chunks_of_a_long_prompt_are_larger_where_no_scores_are_held(settings, chunks, monkeypatch):
    assert (generation._PREFILL_TOKENS, generation._FUSED_PREFILL_TOKENS) == (512, 2048)
    monkeypatch.setattr(generation, "_PREFILL_TOKENS", 8)
    monkeypatch.setattr(generation, "_FUSED_PREFILL_TOKENS", 32)
    mx.random.seed(0)
    decoder = Decoder(read_config({"model_type": "llama", **SMALL, "num_hidden_layers": 1, **settings}))
    ids, read, hidden_states = mx.array([list(range(10, 87))]), [], decoder.hidden_states
    expected = decoder(ids)[:, -1]
    decoder.hidden_states = lambda ids, *rest, **more: (read.append(ids.shape[1]), hidden_states(ids, *rest, **more))[1]
    with gpu_like():
        found, _ = read_whole(decoder, ids, make_cache(decoder.config.windows))
    assert read == chunks
    assert mx.allclose(found, expected, atol=1e-5)


def test_on_a_mac_the_weights_and_the_cache_are_wired_while_an_answer_is_made(llama, monkeypatch):
    wired = [0]
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: (wired[-1], wired.append(limit))[0])
    weights = sum(array.nbytes for _, array in tree_flatten(llama.model.parameters()))
    with gpu_like():
        pieces = llama.stream("The quick", max_tokens=30)
        next(pieces)
        assert weights < wired[-1] < 2**35
        pieces.close()
        assert wired[-1] == 0
        llama.generate_many(["The quick", "a"], max_tokens=3)
        assert wired[-1] == 0 and max(wired[-2:]) > weights


def test_on_a_gpu_the_host_waits_once_a_token(llama, monkeypatch):
    """For the token itself, which it reads; the next one's step is sent off before."""
    waits, sent, wait, send = [], [], mx.eval, mx.async_eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (waits.append(arrays), wait(*arrays)))
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (sent.append(arrays), send(*arrays)))
    with gpu_like():
        steps = decode(llama.model, [[5, 6, 7]], Sampling(max_tokens=20, temperature=0.7), [0])
        assert len(list(steps)) == 20
    assert not waits and len(sent) == 19


def test_generate_is_the_joined_stream(llama):
    pieces = list(llama.stream("The quick", max_tokens=30))
    assert all(pieces)
    assert "".join(pieces) == llama.generate("The quick", max_tokens=30)


def test_a_prompt_may_be_ids(llama):
    assert llama.generate(llama.tokenizer.encode("The quick"), max_tokens=9) == llama.generate("The quick", max_tokens=9)


@pytest.mark.parametrize("text", ["Hello 🙂🙂 東京", "naïve café"])
def test_every_piece_holds_whole_characters(tokenizer, text):
    pieces = list(scripted(tokenizer, text).stream("Say:", max_tokens=200))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_that_max_tokens_cuts_is_left_out(tokenizer):
    size = len(tokenizer.encode("🙂"))
    assert scripted(tokenizer, "🙂🙂").generate("Say:", max_tokens=2 * size - 1) == "🙂"


def test_the_answer_ends_before_a_stop_id(tokenizer):
    assert scripted(tokenizer, "one</s>two").generate("Say:", max_tokens=200) == "one"
    stops = {"eos_token_id": [1, tokenizer.convert_tokens_to_ids("<|eot_id|>")]}
    assert scripted(tokenizer, "one<|eot_id|>two", generation_config=stops).generate("Say:", max_tokens=200) == "one"


def test_a_special_token_ends_the_answer_if_it_is_named_among_the_stops(tokenizer):
    assert scripted(tokenizer, "one<|eot_id|>two").generate("Say:", max_tokens=200) != "one"
    assert scripted(tokenizer, "one<|eot_id|>two").generate("Say:", max_tokens=200, stop=["x", "<|eot_id|>"]) == "one"


def test_stop_strings_end_the_answer_and_are_not_in_it(tokenizer):
    lm = scripted(tokenizer, "The answer is 4\nQ: next")
    assert list(lm.stream("A:", max_tokens=200, stop="\nQ:"))[-1] != "\n"
    assert scripted(tokenizer, "The answer is 4\nQ: next").generate("A:", max_tokens=200, stop=["xyz", "\nQ:"]) == "The answer is 4"
    assert scripted(tokenizer, "The answer\n").generate("A:", max_tokens=200, stop="\nQ:") == "The answer\n"


def test_max_tokens_counts_tokens(tokenizer):
    tokens = tokenizer.encode("The quick brown fox", add_special_tokens=False)
    assert scripted(tokenizer, "The quick brown fox").generate("A:", max_tokens=3) == tokenizer.decode(tokens[:3])


def test_a_chat_answer_ends_where_the_template_ends_a_turn(tokenizer):
    messages = [{"role": "user", "content": "Hello!"}]
    assert scripted(tokenizer, "Hello!<|im_end|>\n<|im_start|>user").chat(messages, max_tokens=200) == "Hello!"


def test_without_a_chat_template_chatml_is_used_and_announced_once(make_tokenizer):
    lm = scripted(make_tokenizer(), "Hello!<|im_end|>\nmore")
    messages = [{"role": "user", "content": "Hello!"}]
    with pytest.warns(UserWarning, match="ChatML"):
        assert "".join(lm.stream_chat(messages, max_tokens=200)) == "Hello!"
    assert lm.tokenizer.decode(lm.chat_tokens(messages)) == "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"


def test_a_stream_that_is_left_or_interrupted_leaves_everything_usable(llama):
    expected = llama.generate("The quick", max_tokens=12)
    stream = llama.stream("The quick", max_tokens=50)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    for _ in llama.stream("How many", max_tokens=50):
        break
    assert llama.generate("The quick", max_tokens=12) == expected


def test_broken_weights_are_an_error(tokenizer):
    lm = LanguageModel.from_config({"model_type": "llama", **SMALL}, tokenizer)
    lm.model.norm.weight = lm.model.norm.weight * mx.nan
    with pytest.raises(GenerationError, match="NaN"):
        lm.generate("Hello")


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0), ("max_tokens", 2.5), ("max_tokens", None), ("max_tokens", True), ("temperature", -0.1), ("temperature", "1"),
        ("temperature", float("nan")), ("temperature", float("inf")), ("temperature", True), ("top_p", 0), ("top_p", 1.01), ("top_k", -1),
        ("top_k", 2.5), ("min_p", -0.1), ("min_p", 1.5), ("stop", ""), ("stop", ["a", ""]), ("stop", 3), ("stop", [1]), ("seed", -1),
        ("seed", 1.5), ("seed", "0"), ("seed", 2**63),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_before_anything_runs(llama, name, value):
    with pytest.raises(GenerationError, match=f"^{name}: expected"):
        llama.stream("Hello", **{name: value})


def test_numpy_numbers_and_one_stop_text_are_fine():
    settings = Sampling(max_tokens=np.int64(3), temperature=np.float32(0.5), top_k=np.int32(2), stop="end", seed=np.uint8(7))
    assert (settings.max_tokens, settings.temperature, settings.top_k, settings.stop, settings.seed) == (3, 0.5, 2, ("end",), 7)


@pytest.mark.parametrize("method", [LanguageModel.generate, LanguageModel.stream, LanguageModel.chat, LanguageModel.stream_chat])
def test_every_way_to_an_answer_takes_the_same_settings(method):
    settings = list(inspect.signature(Sampling).parameters.values())
    found = [p for p in inspect.signature(method).parameters.values() if p.name not in ("self", "prompt", "messages", "tools")]
    assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in settings]


# Drawing


def brute_force(logits, temperature, top_p, top_k, min_p):
    """Probabilities token by token, in plain loops."""
    weights = np.exp((logits - logits.max()) / temperature)
    probabilities = weights / weights.sum()
    order = sorted(range(len(logits)), key=lambda token: -probabilities[token])
    if top_k:
        order = order[:top_k]
    total, kept, so_far = sum(probabilities[token] for token in order), [], 0.0
    for token in order:
        if so_far < top_p:
            kept.append(token)
        so_far += probabilities[token] / total
    kept = [token for token in kept if probabilities[token] >= min_p * probabilities[order[0]]]
    expected = np.zeros(len(logits))
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    return expected


SETTINGS = [
    {"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.2}, {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.05}, {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "min_p": 1.0}, {"temperature": 1.0, "top_k": 1000},
]  # fmt: skip


@pytest.mark.parametrize("chosen", SETTINGS)
def test_probabilities_are_those_of_brute_force(chosen):
    logits = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32) * 2
    candidates, scores = candidate_scores(mx.array(logits), Sampling(**chosen))
    found = np.zeros((5, 12))
    ids = np.tile(np.arange(12), (5, 1)) if candidates is None else np.array(candidates)
    np.put_along_axis(found, ids, np.array(mx.softmax(scores, axis=-1)), axis=-1)
    for row in range(5):
        expected = brute_force(logits[row].astype(np.float64), **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, **chosen})
        np.testing.assert_allclose(found[row], expected, atol=1e-6)


@pytest.mark.parametrize("chosen", [SETTINGS[0], SETTINGS[1], SETTINGS[5]])
def test_tokens_are_drawn_with_these_probabilities(chosen):
    draws, logits = 4000, np.random.default_rng(1).normal(size=12).astype(np.float32)
    sampler = Sampler(Sampling(**chosen), range(draws))
    drawn = np.array(sampler(mx.broadcast_to(mx.array(logits), (draws, 12))))
    expected = brute_force(logits.astype(np.float64), **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, **chosen}) * draws
    counts = np.bincount(drawn, minlength=12)
    assert not counts[expected == 0].any()
    likely = expected > 0
    chi_square = (((counts - expected) ** 2)[likely] / expected[likely]).sum()
    assert chi_square < 35  # with at most 11 degrees of freedom, one in 4000 is larger; the seeds are fixed


def test_steps_of_one_row_are_drawn_independently():
    sampler = Sampler(Sampling(temperature=1.0), [3])
    drawn = np.array([sampler(mx.zeros((1, 4))).item() for _ in range(1600)])
    pairs = np.bincount(drawn[:-1] * 4 + drawn[1:], minlength=16)
    assert ((pairs - 100) ** 2 / 100).sum() < 45  # 15 degrees of freedom


def test_extreme_logits_and_temperatures_draw_a_token(llama):
    logits = mx.array([[1e30, -1e30, 0.0, 1e30]])
    for temperature in (1e-30, 1e-6, 1.0, 1e30):
        assert Sampler(Sampling(temperature=temperature, top_p=0.9), [0])(logits).item() in (0, 1, 2, 3)
    assert llama.generate("Hello", 8, temperature=1e-30, seed=1) == llama.generate("Hello", 8)


def test_a_seed_gives_the_same_text_again_and_another_seed_another(llama):
    texts = [llama.generate("Hello", 20, temperature=1.0, seed=seed) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_seed_each_text_is_another(llama):
    assert llama.generate("Hello", 20, temperature=1.0) != llama.generate("Hello", 20, temperature=1.0)


def test_a_longer_answer_with_the_same_seed_goes_on_from_the_shorter_one(llama):
    short, long = (llama.generate("Hello", size, temperature=1.0, seed=2) for size in (10, 20))
    assert long.startswith(short)


def test_the_global_random_state_is_neither_used_nor_changed(llama):
    def state():
        return [array.tolist() for array in mx.random.state]

    mx.random.seed(11)
    before = state()
    first = llama.generate("Hello", 10, temperature=1.0, seed=3)
    llama.generate("Hello", 10, temperature=1.0)
    llama.generate_many(["Hello"], max_tokens=3, temperature=1.0)
    assert state() == before
    mx.random.seed(12)
    assert llama.generate("Hello", 10, temperature=1.0, seed=3) == first


# Many at once


def test_many_greedy_answers_are_the_single_ones(lm):
    expected = [lm.generate(prompt, max_tokens=24) for prompt in PROMPTS]
    assert lm.generate_many(PROMPTS, max_tokens=24) == expected
    assert lm.generate_many(PROMPTS, max_tokens=24, batch_size=2) == expected


def test_many_drawn_answers_are_the_single_ones_with_seeds_that_count_up(llama):
    expected = [llama.generate(prompt, 16, temperature=1.0, top_p=0.9, seed=40 + row) for row, prompt in enumerate(PROMPTS)]
    assert llama.generate_many(PROMPTS, max_tokens=16, temperature=1.0, top_p=0.9, seed=40) == expected


def test_many_answers_stop_each_at_its_own_end(llama):
    whole = llama.generate_many(PROMPTS, max_tokens=24)
    stop = whole[1][4:6]
    expected = [llama.generate(prompt, max_tokens=24, stop=stop) for prompt in PROMPTS]
    found = llama.generate_many(PROMPTS, max_tokens=24, stop=stop)
    assert found == expected
    assert found[1] == whole[1][: whole[1].index(stop)]


def test_the_same_prompt_many_times_is_drawn_differently(llama):
    assert len(set(llama.generate_many(["Hello"] * 8, max_tokens=12, temperature=1.0, seed=0))) == 8


def test_many_chats_are_the_single_ones(llama):
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    expected = [llama.chat(messages, max_tokens=12) for messages in conversations]
    assert llama.chat_many(conversations, max_tokens=12) == expected


def test_no_prompts_give_no_answers_and_a_bad_one_is_named(llama):
    assert llama.generate_many([]) == []
    with pytest.raises(GenerationError, match=r"prompts\[1\]: .*500"):
        llama.generate_many(["Hello", [500]])
    with pytest.raises(GenerationError, match=r"conversations\[0\]: "):
        llama.chat_many(["Hello"])
    with pytest.raises(GenerationError, match="list of prompts"):
        llama.generate_many("Hello")


def test_batches_hold_every_row_once_and_lengths_that_differ_little():
    lengths = list(np.random.default_rng(0).integers(1, 90, size=200))
    batches = batches_by_length(lengths, 8)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    assert max(len(batch) for batch in batches) == 8
    assert all(max(lengths[row] for row in batch) - min(lengths[row] for row in batch) <= 16 for batch in batches)


def test_a_model_may_be_read_without_a_tokenizer():
    model = Decoder(read_config({"model_type": "llama", **SMALL}))
    (first,) = next(decode(model, [[1, 2, 3]], Sampling(max_tokens=1), [0]))
    assert first == mx.argmax(model(mx.array([[1, 2, 3]]))[0, -1]).item()
