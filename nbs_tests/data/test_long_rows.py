"""Rows with more tokens than `max_seq_length`: cut, split into windows, or left out."""

import numpy as np
import pytest

from fulltune_nb.data import DataSettings, load_data
from fulltune_nb.data.batches import StepBatches
from fulltune_nb.data.split import ExampleTable, TableWriter
from fulltune_nb.errors import ConfigError, DataError

TEXTS = [{"text": "A short one."}, {"text": " ".join(f"word {i}" for i in range(60))}, {"text": "The last."}]
CHAT = {"messages": [{"role": "user", "content": "Count to thirty."}, {"role": "assistant", "content": " ".join(map(str, range(1, 31)))}]}


def targets(examples):
    """Every trained target of some examples with the token before it."""
    return [(int(e.tokens[i - 1]), int(e.tokens[i])) for e in examples for i in np.flatnonzero(e.loss_mask)]


@pytest.mark.parametrize("length", range(2, 9))
@pytest.mark.parametrize("tokens", (10, 17, 24, 29))
def test_each_token_of_a_split_row_is_a_target_exactly_once(length, tokens):
    random = np.random.default_rng(tokens)
    ids, spans = random.permutation(1000)[:tokens].tolist(), [(0, 3), (5, tokens - 2)]
    writer = TableWriter(DataSettings(max_seq_length=length, long_rows="split"), None)
    writer.add(ids, spans, "text", "train:1", {})
    table = writer.table()
    trained = [ids[i] for start, end in spans for i in range(start, end) if i > 0]
    assert [int(t) for t in table.tokens[table.loss_mask]] == trained
    begins, lengths = table.before.tolist(), np.diff(table.begins).tolist()
    assert max(lengths) <= length and min(lengths) >= 2 and begins[0] == 0 and table.behind[-1] == 0
    for i, (begin, size) in enumerate(zip(begins, lengths, strict=True)):
        assert table.tokens[table.begins[i] : table.begins[i + 1]].tolist() == ids[begin : begin + size]
        assert begin + size + table.behind[i] == tokens
        assert i == 0 or begin == begins[i - 1] + lengths[i - 1] - 1  # the token before is there as context


@pytest.mark.parametrize("rows, settings", [(TEXTS, {}), ([CHAT], {"mask_prompt": True}), ([CHAT], {})], ids=["text", "masked", "chat"])
def test_split_rows_train_the_tokens_of_whole_ones_and_know_their_line(tokenizer, rows, settings):
    whole = load_data({"train": rows}, tokenizer, **settings).train
    split = load_data({"train": rows}, tokenizer, max_seq_length=16, long_rows="split", **settings).train
    assert targets(split) == targets(whole) and split.lengths.max() == 16
    long = [e.source for e in whole if len(e.tokens) > 16]
    assert {e.source for e in split if e.window != (0, 0)} == set(long) and split.split_rows == len(long) and split.tokens_cut == 0


def test_windows_show_their_own_text_and_the_end_token_stands_in_the_last_only(tokenizer):
    split = load_data({"train": TEXTS}, tokenizer, max_seq_length=16, long_rows="split").train
    windows = [e for e in split if e.source == "train:2"]
    assert [bool((e.tokens == tokenizer.eos_token_id).any()) for e in windows] == [False] * (len(windows) - 1) + [True]
    assert all(e.text == tokenizer.decode(e.tokens.tolist()) for e in windows)
    assert " 59</s>" in windows[-1].text and windows[0].text.startswith("word 0 word 1")


def test_windows_are_packed_and_batched_like_rows(tokenizer):
    split = load_data({"train": TEXTS}, tokenizer, max_seq_length=16, long_rows="split").train
    for packing in (False, True):
        batches = StepBatches(split, batch_size=2, seed=1, packing=packing, max_seq_length=16)
        seen = [row for step in range(batches.steps_per_epoch) for batch in batches.of_step(step) for row in batch.rows]
        assert sorted(seen) == list(range(len(split)))


def test_what_becomes_of_long_rows_is_counted_and_told(tokenizer):
    def load(**settings):
        return load_data({"train": TEXTS}, tokenizer, max_seq_length=16, **settings)

    cut, split, dropped = load(), load(long_rows="split"), load(long_rows="drop")
    assert len(cut.train) == 3 and cut.train.truncated == 1
    assert cut.notes == [f"train: 1 of 3 rows cut to max_seq_length=16 tokens ({cut.train.tokens_cut} tokens lost)."]
    assert split.notes == [f"train: 1 of 3 rows split into {split.train.windows} windows of at most max_seq_length=16 tokens."]
    assert [e.source for e in dropped.train] == ["train:1", "train:3"] and dropped.train.dropped == 1
    lost = dropped.train.tokens_dropped
    assert dropped.notes == [f"train: 1 of 3 rows left out, because they have more than max_seq_length=16 tokens ({lost} tokens lost)."]
    assert lost == cut.train.tokens_cut + 16
    assert len({data.fingerprint for data in (cut, split, dropped)}) == 3


def test_a_split_of_which_every_row_is_dropped_says_so(tokenizer):
    with pytest.raises(DataError, match="1 are left out, longer than max_seq_length=16: raise it"):
        load_data({"train": TEXTS[1:2]}, tokenizer, max_seq_length=16, long_rows="drop")


def test_another_word_for_long_rows_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="long_rows"):
        load_data({"train": TEXTS}, tokenizer, long_rows="trim")


def test_a_table_gives_the_same_object_while_it_is_held_and_takes_and_joins(tokenizer):
    table = load_data({"train": TEXTS}, tokenizer).train.examples
    first = table[0]
    assert table[0] is first and table[-3] is first and [e.source for e in table[1:]] == ["train:2", "train:3"]
    both = ExampleTable.joined([table.take(np.array([2, 0])), table])
    assert [e.source for e in both] == ["train:3", "train:1", "train:1", "train:2", "train:3"]
    for one, other in zip(both, [table[2], table[0], *table], strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.loss_mask.tolist() == other.loss_mask.tolist()


def test_a_window_says_which_tokens_of_its_row_it_has(tokenizer):
    data = load_data({"train": TEXTS}, tokenizer, max_seq_length=16, long_rows="split")
    total = len(load_data({"train": TEXTS}, tokenizer).train[1].tokens)
    second = next(i for i, e in enumerate(data.train) if e.window[0] == 15)
    assert f"tokens 16 to 31 of {total} in the row" in str(data.show(second + 1))
    assert f"tokens 16 to 31 of {total} in the row" in data.train[second]._repr_html_()
