"""Rows to tokens and loss masks.

chat and completions go through the tokenizer's chat template, which alone decides about special tokens. What is trained on is found in
the text (see `masks`); a token belongs to the turn that its last character belongs to. Where a template says itself
what is trained, `{% generation %}`, one character in it is enough, as in transformers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from typing import Any

from fulltune_nb.chat_template import ChatRenderer, LimitReached, answer_end, end_tokens
from fulltune_nb.data.example import Example, runs
from fulltune_nb.data.masks import TOOLS, WAYS_OUT, Conversation, Span, Word, is_written, words_of
from fulltune_nb.data.rows import RowError, row_format, template_unusable
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.data.skeleton import Forms, Skeleton
from fulltune_nb.data.split import ExampleTable, Split, TableWriter
from fulltune_nb.data.watching import watched
from fulltune_nb.errors import ConfigError

# ---- chat and completions rows: their text, what of it is trained on, and what the template leaves out

NO_TOOLS = "the tools"
EARLIER_REASONING = "the reasoning of earlier turns"
UNMARKED = "of training (by its {% generation %}) words of assistant turns"

HELP = {
    NO_TOOLS: "Use a template that writes them, or write them into the messages.",
    EARLIER_REASONING: 'The model will not see it in a conversation either; mask_prompt="last" trains the last turn only.',
    "the words of system messages": "Put them into the first user message, or use a template that writes them.",
}
"""What helps where a template leaves something out."""

_OWN_KINDS = ("content", "reasoning", "calls")
_FORMS_KNOWN = 4096  # of conversations; rows may have as many forms as there are rows


@dataclass
class Rendered:
    """What the model is to see of a row, before it is tokenized."""

    text: str
    spans: list[Span] | None = None
    """Characters that are trained on; None: all."""
    is_marked_by_template: bool = False
    """Whether the spans are those of the template's own `{% generation %}`."""
    left_out: list[str] = field(default_factory=list)
    """What the template does not write of it, such as "the tools"."""


def messages_of(row: Mapping[str, Any], format: str, settings: DataSettings) -> list[Mapping[str, Any]]:
    """The conversation of a chat or completions row; a completion is a user/assistant pair."""
    if format == "chat":
        return list(row[settings.chat_feature])
    return [
        {"role": "user", "content": row[settings.prompt_feature]},
        {"role": "assistant", "content": row[settings.completion_feature]},
    ]


class ChatRows:
    """Renders the rows of a split, one after the other."""

    def __init__(self, renderer: ChatRenderer, format: str, settings: DataSettings, chat_template: str | Mapping[str, str]):
        self._renderer, self._format, self._settings = renderer, format, settings
        self._forms = Forms(chat_template)
        self._known: dict[tuple, tuple[Skeleton | None, Rendered]] = {}  # form of a conversation -> what was found of the latest such row

    def read_ahead(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Has the template write the texts of rows that are rendered next."""
        self._renderer.read_ahead((messages_of(row, self._format, self._settings), row.get("tools")) for row in rows)

    def render(self, row: Mapping[str, Any]) -> Rendered:
        """The row's text and what is trained of it.

        Raises:
            RowError: the template refuses the row, words that are to be trained are lost, or their places cannot be told.
        """
        try:
            return self._rendered(messages_of(row, self._format, self._settings), row.get("tools"))
        except RecursionError:
            raise RowError("messages or tools are nested too deeply: no template needs so many levels") from None

    def _rendered(self, messages: list[Mapping[str, Any]], tools: Any) -> Rendered:
        untrained = [i for i, message in enumerate(messages) if not _is_trained(message, i)]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [i for i in (answers[-1:] if self._settings.mask_prompt == "last" else answers) if i not in untrained]
        talk = Conversation(self._renderer, messages, tools, words_of(messages, tools))
        form = self._forms.of(talk, tuple(wanted), tuple(untrained))
        skeleton, found = self._known.get(form, (None, None))
        if skeleton is not None and (places := skeleton.places_in(talk)) is not None:
            spans = None if found.spans is None else list(zip(places[::2], places[1::2], strict=True))
            return replace(found, text=talk.text, spans=spans)
        rendered = self._looked_at(talk, wanted, untrained, answers[-1:])
        if form is not None and (form in self._known or len(self._known) < _FORMS_KNOWN):
            self._known[form] = Skeleton.of(talk, list(chain.from_iterable(rendered.spans or ()))), replace(rendered, text="")
        return rendered

    def _looked_at(self, talk: Conversation, wanted: list[int], untrained: list[int], last: list[int]) -> Rendered:
        """What is found of a row by itself, by further renderings."""
        left_out = self._left_out(talk, wanted)
        if not self._settings.mask_prompt:
            return Rendered(talk.text, self._all_but(talk, untrained), left_out=left_out)
        if (spans := talk.generated(wanted)) is not None:
            marked = talk.marked
            if marked is not None and any(word.message in wanted and marked.is_beside(n, spans) for n, word in enumerate(talk.words)):
                left_out.append(UNMARKED)
            return Rendered(talk.text, spans, True, left_out)
        return Rendered(talk.text, self._spans(talk, wanted, last), left_out=left_out)

    def _spans(self, talk: Conversation, wanted: list[int], last: list[int]) -> list[Span]:
        try:
            return talk.spans(wanted) if wanted else []
        except RowError as error:
            if wanted == last:
                raise
            try:
                talk.spans(last)
            except RowError:
                raise error from None
            raise RowError(f'{error}. mask_prompt="last", which trains the last assistant turn only, is possible') from None

    def _all_but(self, talk: Conversation, untrained: list[int]) -> list[Span] | None:
        """The whole text without some of the messages; None where there are none of them."""
        try:
            return _all_but(talk.spans(untrained), len(talk.text)) if untrained else None
        except RowError as error:
            reason = str(error).removeprefix("mask_prompt: ").removesuffix(f". {WAYS_OUT}")
            raise RowError(f"a message with weight 0 or train false cannot be told from the others: {reason}") from None

    def _left_out(self, talk: Conversation, wanted: Sequence[int]) -> list[str]:
        """What the template does not write of the conversation and may leave out.

        Raises:
            RowError: it is what the user says, or what is to be trained.
        """
        asked = max((i for i, message in enumerate(talk.messages) if message["role"] == "user"), default=-1)
        if (marked := talk.marked) is None:
            missing = [word for word in talk.words if not is_written(word.text, talk.text)]
        else:  # a string can stand in the text by chance, a marked one cannot
            missing = [word for number, word in enumerate(talk.words) if marked.is_missing(number)]
        if not missing:
            return []
        own = [word for word in missing if self._is_own(talk, word, wanted, asked)]
        if own:
            raise RowError(_lost(talk, own, wanted))
        return list(dict.fromkeys(_name(talk, word, missing) for word in missing))

    def _is_own(self, talk: Conversation, word: Word, wanted: Sequence[int], asked: int) -> bool:
        """Whether the word is what the user says or what the model is to learn."""
        role = _role(talk, word)
        if role == "assistant" and word.kind == "reasoning" and not self._settings.mask_prompt:
            return word.message in wanted and word.message > asked
        return word.kind in _OWN_KINDS and (role == "user" or word.message in wanted)


def _role(talk: Conversation, word: Word) -> str:
    return "" if word.message == TOOLS else talk.messages[word.message]["role"]


def _name(talk: Conversation, word: Word, missing: Sequence[Word]) -> str:
    """What has been left out, as it is named in the notes."""
    role = _role(talk, word)
    if word.message == TOOLS:
        return NO_TOOLS if sum(w.message == TOOLS for w in missing) == sum(w.message == TOOLS for w in talk.words) else "words of the tools"
    if word.kind not in _OWN_KINDS:
        return f"the key {word.kind!r} of {role} messages"
    if role != "assistant":
        return f"the words of {role} messages"
    return EARLIER_REASONING if word.kind == "reasoning" else "words of assistant turns that are not trained"


def _lost(talk: Conversation, own: Sequence[Word], wanted: Sequence[int]) -> str:
    """Why a row cannot be used whose own words are lost."""
    word, role = own[0], _role(talk, own[0])
    number = sum(message["role"] == role for message in talk.messages[: word.message + 1])
    what = {"calls": "the tool calls", "reasoning": "the reasoning", "content": "words"}[word.kind]
    ways = "use a template that writes them, or remove them"
    if wanted and all(w.message in wanted[:-1] for w in own):
        ways += ', or use mask_prompt="last", which trains the last assistant turn only'
    return f"the chat template leaves out {what} of {role} turn {number} ({word.text[:40]!r}): {ways}"


def _is_trained(message: Mapping[str, Any], i: int) -> bool:
    """Whether `weight` and `train`, which a message may have, let it be trained.

    Raises:
        RowError: they are neither yes nor no.
    """
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and weight not in (0, 1):
        raise RowError(f"messages[{i}]: 'weight' is {weight!r:.40}, expected 0 (not trained) or 1")
    if train is not None and train not in (True, False):
        raise RowError(f"messages[{i}]: 'train' is {train!r:.40}, expected true or false")
    return weight != 0 and train is not False and train != 0


def _all_but(spans: Sequence[Span], size: int) -> list[Span]:
    """The rest of [0, size)."""
    borders = [0, *(border for span in sorted(spans) for border in span), size]
    return [(start, end) for start, end in zip(borders[::2], borders[1::2], strict=True) if start < end]


# ---- tokens and loss masks

CHUNK_ROWS = 512
"""Rows tokenized in one call: enough for the tokenizer to work in parallel, few enough to keep the extra memory small."""


@dataclass
class Encoded:
    """What `encode_rows` made of the rows of a split."""

    examples: ExampleTable
    problems: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """What the chat template does not write into the text -> the sources of the rows that have it."""


def encode_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]], format: str, tokenizer, settings: DataSettings, name: str = "rows"
) -> Encoded:
    """Tokens and masks of rows that fit `format`.

    Args:
        rows: (source, row) pairs.
        format: "chat", "completions" or "text".
        name: of what is encoded, for who watches it.

    Returns:
        The examples in the rows' order, and a line for each row that could not be encoded.

    Raises:
        DataError: the chat template takes far too much time or memory with a row.
    """
    rows, writer, renderer = list(rows), TableWriter(settings, tokenizer), ChatRenderer(tokenizer, settings.template_date)
    chats, problems, left_out = ChatRows(renderer, format, settings, tokenizer.chat_template or ""), [], {}
    chunks = [rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)]
    with watched(f"{name}: tokenizing", len(rows)) as update, closing(_rendered(chunks, format, settings, chats, problems)) as rendered:
        for number, items in enumerate(rendered):
            update(number * CHUNK_ROWS)
            for source, item in _tokenize_chunk(_checked(items, problems), format, tokenizer, writer, problems):
                for what in item.left_out:
                    left_out.setdefault(what, []).append(source)
    return Encoded(writer.table(), problems, left_out)


_Item = tuple[str, Mapping[str, Any], Rendered]
"""File and line, the row, its text."""


def _rendered(
    chunks: Sequence[Sequence[tuple[str, Mapping[str, Any]]]], format: str, settings: DataSettings, chats: ChatRows, problems: list[str]
) -> Iterator[list[_Item]]:
    """The texts of each chunk. While one is tokenized, another process writes those of the next."""
    if format == "text":
        yield from (_texts(chunk, settings, problems) for chunk in chunks)
        return
    pool, ready = ThreadPoolExecutor(1), None
    try:
        for chunk, following in zip_longest(chunks, chunks[1:], fillvalue=()):
            ready = ready or pool.submit(chats.read_ahead, [row for _, row in chunk])
            ready.result()
            rendered = _render_chunk(chunk, chats, problems)
            ready = pool.submit(chats.read_ahead, [row for _, row in following])
            yield rendered
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _render_chunk(rows: Sequence[tuple[str, Mapping]], chats: ChatRows, problems: list[str]) -> list[_Item]:
    """The texts of the rows that have one; `problems` grows by a line for each other row."""
    rendered = []
    for source, row in rows:
        try:
            rendered.append((source, row, chats.render(row)))
        except RowError as error:
            problems.append(f"{source}: {error}")
        except LimitReached as error:  # at once: with each further row it could take as long
            raise template_unusable(source, error) from None
    return rendered


def _texts(rows: Sequence[tuple[str, Mapping]], settings: DataSettings, problems: list[str]) -> list[_Item]:
    """Plain texts as they are; with `mask_until`, what follows the last marker is trained on, and a text without it is a problem."""
    feature, marker = settings.text_feature, settings.mask_until
    if marker is None:
        return [(source, row, Rendered(row[feature])) for source, row in rows]
    found = []
    for source, row in rows:
        text = row[feature]
        if (place := text.rfind(marker)) < 0:
            problems.append(f"{source}: mask_until: the text has no {marker!r}, behind which it would be trained on")
        else:
            found.append((source, row, Rendered(text, [(place + len(marker), len(text))])))
    return found


def _checked(items: list[_Item], problems: list[str]) -> list[_Item]:
    """The items whose text can be encoded; `problems` grows by a line for each other."""
    good = []
    for source, row, item in items:
        try:
            item.text.encode("utf-8")
            good.append((source, row, item))
        except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can write and UTF-8 cannot
            half = f"{item.text[error.start]!r} at character {error.start}"
            problems.append(f"{source}: the text has half of a surrogate pair ({half}), which is no character: remove it")
    return good


def _tokenize_chunk(
    rendered: list[_Item], format: str, tokenizer, into: TableWriter, problems: list[str]
) -> Iterable[tuple[str, Rendered]]:
    """Adds the rows to the table, and to `problems` those that have none; yields what has been added."""
    encoding = _tokenize(tokenizer, [item.text for _, _, item in rendered], add_special_tokens=format == "text")
    eos = tokenizer.eos_token_id if format == "text" else None
    for number, (source, row, item) in enumerate(rendered):
        tokens = encoding["input_ids"][number]
        if eos is not None and tokens[-1:] != [eos]:
            tokens = [*tokens, eos]
        try:
            if item.spans is None:
                spans = [(0, len(tokens))]
            elif format == "text":
                spans = [(_tokens_before(item.spans[0][0], encoding, number, item.text, tokenizer), len(tokens))]
            elif encoding.encodings is not None:
                spans = _token_spans(encoding.encodings[number], item)
            else:
                spans = _token_spans_by_prefixes(tokens, item, tokenizer)
        except RowError as error:
            problems.append(f"{source}: {error}")
            continue
        into.add(tokens, spans, item.text, source, row)
        yield source, item


def _tokenize(tokenizer, texts: list[str], add_special_tokens: bool):
    """The encoding of many texts in one call, the same as one by one. Rendered chats have their special tokens already."""
    options = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=add_special_tokens, **options) if texts else {"input_ids": []}


def _token_spans(encoding, item: Rendered) -> list[Span]:
    """Token positions [start, end) of the spans. Several tokens can make one character, and one token many."""
    if item.is_marked_by_template:
        starts, ends = zip(*encoding.offsets, strict=True) if len(encoding) else ((), ())
        return [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in item.spans]
    return [(_tokens_up_to(start, encoding, item.text), _tokens_up_to(end, encoding, item.text)) for start, end in item.spans]


def _tokens_up_to(place: int, encoding, text: str) -> int:
    """How many tokens end at a character or before it."""
    if place == len(text):
        return len(encoding)
    found = encoding.char_to_token(place)  # without the list of all offsets, which takes a tenth of the time of tokenizing
    return bisect_right([end for _, end in encoding.offsets], place) if found is None else found


def _tokens_before(place: int, encoding, number: int, text: str, tokenizer) -> int:
    """How many tokens of a plain text, with the special ones before it, end at a character or before it."""
    if encoding.encodings is not None:  # special tokens have the place (0, 0), also behind the text
        offsets = encoding.encodings[number].offsets
        return next((i + 1 for i in range(len(offsets) - 1, -1, -1) if offsets[i][0] < offsets[i][1] <= place), 0)
    tokens, before = encoding["input_ids"][number], _tokenize(tokenizer, [text[:place]], add_special_tokens=True)["input_ids"][0]
    if before != tokens[: len(before)] and before[-1:] == [tokenizer.eos_token_id]:  # put behind every text
        before = before[:-1]
    if before != tokens[: len(before)]:
        raise RowError("mask_until: the marker's end is no token border: the tokenizer joins the characters on both sides of it")
    return len(before)


def _token_spans_by_prefixes(tokens: list[int], item: Rendered, tokenizer) -> list[Span]:
    """The same for tokenizers that do not tell places: the text up to a place must have the first of the tokens."""
    borders = list(dict.fromkeys(border for span in item.spans for border in span))
    counts = {}
    for border, prefix in zip(borders, _tokenize(tokenizer, [item.text[:b] for b in borders], False)["input_ids"], strict=True):
        if tokens[: len(prefix)] != prefix:
            where = f"character {border} of the text, where an assistant turn begins or ends,"
            raise RowError(
                f"mask_prompt: {where} is no token border: the tokenizer joins the characters on both sides of it. "
                f"Often the turn begins with a space or line break that can be removed. {WAYS_OUT}"
            )
        counts[border] = len(prefix)
    return [(counts[start], counts[end]) for start, end in item.spans]


# ---- where the turns end that a data set trains: what a model tuned on it writes last, and stops at

Ends = tuple[tuple[int, ...], tuple[str, ...]]
"""Stop ids, first the one that ends a conversation's last answer, and stop strings for ends that are several tokens."""
_ROWS_LOOKED_AT = 20_000  # of the split, spread evenly over it
_KINDS = 32  # of assistant turns: a row of each is tokenized again
_WHOLE = 2**31 - 1  # tokens: a row that is cut shows no end


def trained_ends(train: Split, tokenizer: Any, settings: DataSettings) -> Ends:
    """The ends that a split trains.

    For text it is the EOS that stands behind every row. For chat and completions it is what stands at the ends of the rows' assistant
    turns; these may differ: a template may end a turn that calls a tool, or one within the conversation, otherwise than the last.
    """
    if tokenizer is None:  # ids that come from elsewhere
        return (), ()
    if train.format == "text":
        return (() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)), ()
    probed_ids, probed_strings = answer_end(tokenizer)
    known, ids, strings, within = end_tokens(tokenizer), {}, {}, set()
    if "text" in train.format and tokenizer.eos_token_id is not None:  # some of the data sets are text
        ids[tokenizer.eos_token_id] = None
    for turn in _assistant_turns(train, tokenizer, settings):
        behind = _words(turn, known, tokenizer)
        end = [token for token in turn[behind:] if token in known]
        ids.update((token, None) for token in (*(token for token in end if token in probed_ids), *end[-1:]))
        within.update(turn[:behind])
        if not end:
            text = tokenizer.decode(turn, skip_special_tokens=False)
            strings.update((string, None) for string in probed_strings if string in text)
    if not ids and not strings:  # the turns could not be told apart, or are not trained up to their ends
        return probed_ids, () if probed_ids else probed_strings
    # A token that also stands within turns, as one between thinking and answer or two calls does, would end them half-way. Where all
    # do, words of a row may have the end of turn in them.
    ends = [token for token in ids if token not in within] or [token for token in ids if token in probed_ids]
    return tuple(ends), tuple(strings)


def _words(turn: list[int], known: frozenset[int], tokenizer: Any) -> int:
    """How many tokens a turn has without what ends it: end tokens, and line breaks behind them."""
    count = len(turn)
    while count and (turn[count - 1] in known or not tokenizer.decode([turn[count - 1]], skip_special_tokens=False).strip()):
        count -= 1
    return count


def _assistant_turns(train: Split, tokenizer: Any, settings: DataSettings) -> list[list[int]]:
    """Token ids of the assistant turns of a row of each kind, answers that are a row's last before all others; none where the template
    does not tell them apart."""
    rows = _rows_of_each_kind(train, settings)

    def calls_last(example: Example) -> bool:
        messages = example.row.get(settings.chat_feature)
        return isinstance(messages, list) and bool(messages[-1].get("tool_calls"))

    for mask in dict.fromkeys((settings.mask_prompt or True, "last")):
        try:
            whole = replace(settings, mask_prompt=mask, max_seq_length=_WHOLE)
        except ConfigError:
            continue
        encoded = [encode_rows(of_format, format, tokenizer, whole) for format, of_format in rows.items()]
        conversations = sorted((example for part in encoded for example in part.examples), key=calls_last)
        trained = [[ids.tolist() for ids, is_trained in runs(example) if is_trained] for example in conversations]
        if turns := [of_row for of_row in trained if of_row]:
            return [last for *_, last in turns] + [turn for *earlier, _ in turns for turn in earlier]
    return []


def _rows_of_each_kind(train: Split, settings: DataSettings) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    """(source, row) pairs, of chat and of completions, in which every kind of assistant turn occurs: what its message has, whether it
    calls several tools, what follows it, whether there are tools."""
    examples, kinds, rows = train.examples, set(), {"chat": [], "completions": []}
    for example in examples[:: 1 + len(examples) // _ROWS_LOOKED_AT]:
        before, format = len(kinds), row_format(example.row, settings)
        if format not in rows:
            continue
        messages = example.row[settings.chat_feature] if format == "chat" else ()
        roles = [*(message.get("role") for message in messages), None]
        for message, following in zip(messages, roles[1:], strict=True):
            if message.get("role") == "assistant":
                has, calls_several = frozenset(name for name, value in message.items() if value), len(message.get("tool_calls") or ()) > 1
                kinds.add((has, calls_several, following, bool(example.row.get("tools"))))
        if len(kinds) > before or not rows[format]:
            rows[format].append((example.source, example.row))
        if len(kinds) >= _KINDS or train.format == "completions":
            break
    return rows
