"""Where the turns end that a data set trains: what a model tuned on it writes last, and stops at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fulltune_nb.chat_template import answer_end, end_tokens
from fulltune_nb.data.encode import encode_rows
from fulltune_nb.data.example import Example, runs
from fulltune_nb.data.rows import row_format
from fulltune_nb.errors import ConfigError

if TYPE_CHECKING:
    from fulltune_nb.data.dataset import DataSet

Ends = tuple[tuple[int, ...], tuple[str, ...]]
"""Stop ids, first the one that ends a conversation's last answer, and stop strings for ends that are several tokens."""
_ROWS_LOOKED_AT = 20_000  # of the split, spread evenly over it
_KINDS = 32  # of assistant turns: a row of each is tokenized again
_WHOLE = 2**31 - 1  # tokens: a row that is cut shows no end


def trained_ends(data: DataSet) -> Ends:
    """The ends that `data.train` trains.

    For text it is the EOS that stands behind every row. For chat and completions it is what stands at the ends of the rows' assistant
    turns; these may differ: a template may end a turn that calls a tool, or one within the conversation, otherwise than the last.
    """
    tokenizer = data.tokenizer
    if tokenizer is None:  # ids that come from elsewhere
        return (), ()
    if data.train.format == "text":
        return (() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)), ()
    probed_ids, probed_strings = answer_end(tokenizer)
    known, ids, strings, within = end_tokens(tokenizer), {}, {}, set()
    if "text" in data.train.format and tokenizer.eos_token_id is not None:  # some of the data sets are text
        ids[tokenizer.eos_token_id] = None
    for turn in _assistant_turns(data):
        behind = _words(turn, known, tokenizer)
        end = [token for token in turn[behind:] if token in known]
        ids.update((token, None) for token in (*(token for token in end if token in probed_ids), *end[-1:]))
        within.update(turn[:behind])
        if not end:
            text = tokenizer.decode(turn, skip_special_tokens=False)
            strings.update((string, None) for string in probed_strings if string in text)
    if not ids and not strings:  # the turns could not be told apart, or are not trained up to their ends
        return probed_ids, () if probed_ids else probed_strings
    # A token that also stands within turns, as one between thinking and answer does, would end them half-way.
    return tuple(token for token in ids if token not in within) or tuple(ids), tuple(strings)


def _words(turn: list[int], known: frozenset[int], tokenizer: Any) -> int:
    """How many tokens a turn has without what ends it: end tokens, and line breaks behind them."""
    count = len(turn)
    while count and (turn[count - 1] in known or not tokenizer.decode([turn[count - 1]], skip_special_tokens=False).strip()):
        count -= 1
    return count


def _assistant_turns(data: DataSet) -> list[list[int]]:
    """Token ids of the assistant turns of a row of each kind, answers that are a row's last before all others; none where the template
    does not tell them apart."""
    settings, rows = data.settings, _rows_of_each_kind(data)

    def calls_last(example: Example) -> bool:
        messages = example.row.get(settings.chat_feature)
        return isinstance(messages, list) and bool(messages[-1].get("tool_calls"))

    for mask in dict.fromkeys((settings.mask_prompt or True, "last")):
        try:
            whole = replace(settings, mask_prompt=mask, max_seq_length=_WHOLE)
        except ConfigError:
            continue
        encoded = [encode_rows(of_format, format, data.tokenizer, whole) for format, of_format in rows.items()]
        conversations = sorted((example for part in encoded for example in part.examples), key=calls_last)
        trained = [[ids.tolist() for ids, is_trained in runs(example) if is_trained] for example in conversations]
        if turns := [of_row for of_row in trained if of_row]:
            return [last for *_, last in turns] + [turn for *earlier, _ in turns for turn in earlier]
    return []


def _rows_of_each_kind(data: DataSet) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    """(source, row) pairs, of chat and of completions, in which every kind of assistant turn occurs: what its message has, what follows
    it, whether there are tools."""
    examples, kinds, rows = data.train.examples, set(), {"chat": [], "completions": []}
    for example in examples[:: 1 + len(examples) // _ROWS_LOOKED_AT]:
        before, format = len(kinds), row_format(example.row, data.settings)
        if format not in rows:
            continue
        messages = example.row[data.settings.chat_feature] if format == "chat" else ()
        roles = [*(message.get("role") for message in messages), None]
        for message, following in zip(messages, roles[1:], strict=True):
            if message.get("role") == "assistant":
                kinds.add((frozenset(name for name, value in message.items() if value), following, bool(example.row.get("tools"))))
        if len(kinds) > before or not rows[format]:
            rows[format].append((example.source, example.row))
        if len(kinds) >= _KINDS or data.train.format == "completions":
            break
    return rows
