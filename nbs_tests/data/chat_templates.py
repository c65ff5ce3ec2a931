"""Chat templates in the shapes that models on the hub have, shortened."""

from nbs_tests.conftest import CHATML

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# Thinking is kept in the last turn only, as in Qwen3 and the DeepSeek-R1 family.
DROPS_EARLIER_THINKING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Tools in the system turn, calls as JSON, as in Qwen2.5.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools:' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message.content %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The generation prompt ends with a space, which byte-level BPE joins with the word that follows.
PROMPT_ENDS_WITH_SPACE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)

# Closes the whole conversation with </s>, not each turn.
CLOSES_CONVERSATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Writes the conversation without what the assistant said in it.
IGNORES_ASSISTANT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|im_start|>user\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CHATML_TURN = "{{ '<|im_start|>' + message.role + '\n' + %s + '<|im_end|>\n' }}"
_CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

# Thinking is kept in the last turn only, and an empty one is written where it has none, as in Qwen3.
EMPTY_THINKING_LAST = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% set content = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thinking = message.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in message.content else '' %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n' + thinking + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}"
    "{% else %}" + _CHATML_TURN % "message.content" + "{% endif %}{% endfor %}" + _CHATML_PROMPT
)

# The generation prompt opens a thinking that finished turns do not have, as in DeepSeek-R1 and QwQ.
THINKING_IN_PROMPT = (
    "{% for message in messages %}" + _CHATML_TURN % "message.content" + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

# A space between a turn and the next [INST], which goes into one token with the bracket, as in Mistral v0.1.
SPACE_BEFORE_INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ message.content + eos_token + ' ' }}{% endif %}{% endfor %}"
)

# The last turn ends otherwise than the others where no generation prompt follows, as in gpt-oss.
OTHER_LAST_END = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{{ '</s>' if loop.last and message.role == 'assistant' and not add_generation_prompt else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Says itself what is trained: the answer and its end, not the line break behind.
GENERATION = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}" + _CHATML_TURN % "message.content" + "{% endif %}{% endfor %}" + _CHATML_PROMPT
)

# Writes users and assistants and nothing else.
TWO_ROLES = (
    "{% for message in messages %}{% if message.role in ('user', 'assistant') %}"
    + _CHATML_TURN % "message.content"
    + "{% endif %}{% endfor %}"
) + _CHATML_PROMPT

# Writes the name of a call and not its arguments, and no content beside calls.
CALLS_BY_NAME = (
    "{% for message in messages %}"
    + _CHATML_TURN % "(message.tool_calls[0].function.name if message.tool_calls else message.content)"
    + "{% endfor %}"
) + _CHATML_PROMPT

# Begins with a system turn of its own where there is none, and cannot render an empty conversation.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}" + _CHATML_TURN % "message.content" + "{% endfor %}" + _CHATML_PROMPT
)

# The same with an empty thinking in every answer, which the generation prompt opens only, as in Nemotron 3.
EMPTY_THINKING = DEFAULT_SYSTEM.replace(
    "+ message.content", "+ ('<think></think>' if message.role == 'assistant' else '') + message.content"
).replace("assistant\n' }}", "assistant\n<think>\n' }}")

# Refuses a conversation in which the user has not asked anything, as Qwen 3.5 does.
WANTS_A_QUESTION = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('No user query.') }}{% endif %}" + CHATML
)

# Writes what the assistant says beside its calls behind the tool's result, as in Gemma 4.
ANSWERS_BEHIND_RESULT = (
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{{ message.content + messages[loop.index0 - 1].content + '<|im_end|>\n' }}"
    "{% elif message.tool_calls %}{{ '<|im_start|>assistant\n' + (message.tool_calls | tojson) }}"
    "{% else %}" + _CHATML_TURN % "message.content" + "{% endif %}{% endfor %}" + _CHATML_PROMPT
)

# What tokenizers without a template were given once; the runs of that time go on with it.
PLAIN_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
