"""The chat template a tokenizer gets where it has none of its own.

Base models such as Mistral-7B-v0.1 come without a chat template. The text then used is ChatML, the one that the
documentation of the `mlx_lm` commands shows for such models: `<|im_start|>role\\ncontent<|im_end|>\\n` per message. It is
set on the tokenizer, so that generation uses what training used and an exported folder carries it.
"""

from __future__ import annotations

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CHATML_NOTE = (
    "The tokenizer has no chat template: the ChatML text <|im_start|>role, content, <|im_end|> is used. "
    "It is set on the tokenizer, so that generation uses it and an exported model carries it."
)


def ensure_chat_template(tokenizer) -> str | None:
    """Give `tokenizer` the ChatML template if it has none; one with a template is left as it is.

    Returns:
        The line to announce where the template was set, None where there was one.
    """
    if tokenizer.chat_template:
        return None
    tokenizer.chat_template = CHATML
    return CHATML_NOTE
