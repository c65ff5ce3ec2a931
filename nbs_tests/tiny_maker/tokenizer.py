"""The tiny model's tokenizer: byte-level BPE, trained here, every digit a token of its own, with a compact chat template."""

from __future__ import annotations

from collections.abc import Iterable

from fulltune_nb.tiny import text_to_sql
from fulltune_nb.tiny.text import documents

VOCAB_SIZE = 1280
END = "<|end|>"
"""Ends an assistant's turn and every text; the token at which generation stops."""
PAD = "<|pad|>"
SPECIAL_TOKENS = (PAD, END, "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|system|>' + (tools | tojson) }}{% endif -%}
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant', 'tool') -%}
{{ raise_exception("expected a role of system, user, assistant or tool, found " + (message.role | string)) }}
{%- endif -%}
{{- '<|' + message.role + '|>' + (message.content or '') -}}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif -%}
{%- if message.role == 'assistant' %}{{ '<|end|>' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif -%}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE):
    """A `transformers` fast tokenizer of at most `vocab_size` tokens, specials and the 256 bytes included.

    Any text survives encoding and decoding. The same texts give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Digits before words, so that no merge ever joins two of them: 1987 is always four tokens.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in (PAD, END)],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_tokenizer(vocab_size: int = VOCAB_SIZE):
    """The packaged tokenizer: trained on pretraining text and on the text-to-SQL *training* rows.

    The rows are in it so that SQL's words are single tokens; the base model's weights never see them.
    """
    texts = documents(seed=0, number=12000)
    texts += [f"{row['prompt']}\n{row['completion']}" for row in text_to_sql()["train"]]
    # Special tokens are marks, not text: merges must not be learned from them.
    return train_tokenizer((_without_marks(text) for text in texts), vocab_size)


def _without_marks(text: str) -> str:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\n")
    return text
