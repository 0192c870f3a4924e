"""Chat templates in our own words, each with what its family's published one does: what it trims, folds, adds, drops, refuses
and writes for thoughts, tools and calls. A tokenizer of bytes goes with each."""

from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_CHATML_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\n%s<|im_end|>\n{% endif %}"
_HERMES_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}"
    "<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
)
_HERMES_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n' if not loop.first or text }}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
_HERMES_RESULTS = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user\n{% endif %}"
    "<tool_response>{{ m.content }}</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
_LAST_QUESTION = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
_THINKING = (
    _HERMES_TOOLS + _LAST_QUESTION + "{% for m in messages %}{% set text = m.content or '' %}"
    "{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set ns.thought = m.reasoning_content or '' %}"
    "{% if not ns.thought and '</think>' in text %}"
    "{% set ns.thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or ns.thought) %}"
    "{{ '<think>\n' + ns.thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}{% else %}{{ text }}{% endif %}"
    + _HERMES_CALLS
    + "<|im_end|>\n{% elif m.role == 'tool' %}"
    + _HERMES_RESULTS
    + "{% elif m.role == 'user' or not loop.first %}<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>\n{% endif %}{% endfor %}"
)
QWEN25 = (
    "{% if not tools %}" + _CHATML_SYSTEM.replace("%s", "You are kind.") + "{% endif %}" + _HERMES_TOOLS +
    "{% for m in messages %}{% set text = m.content %}{% if m.role == 'tool' %}" + _HERMES_RESULTS +
    "{% elif m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant{{ '\n' + text if text }}"
    + _HERMES_CALLS.replace("if not loop.first or text", "") + "<|im_end|>\n"
    "{% elif m.role != 'system' or not loop.first %}<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
QWEN3 = (
    _THINKING + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
QWEN3_THINKING = _THINKING + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
_LLAMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n{{ first }}<|eot_id|>"
    "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>'
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>{% else %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if tools and m.role == 'user' and loop.first %}{{ tools | tojson }}\n\n{% endif %}{{ m.content | trim }}<|eot_id|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = "{% set date_string = date_string | default('26 Jul 2024') %}" + _LLAMA
LLAMA32 = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}" + _LLAMA
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% set ns = namespace(turns=0, users=[]) %}"
    "{% for m in messages %}{% if m.role in ('user', 'assistant') and not m.tool_calls %}"
    "{% if (m.role == 'user') != (ns.turns % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.turns = ns.turns + 1 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ first if loop.last and first is defined }}{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if not c.id is defined or c.id | length != 9 %}{{ raise_exception('ids of calls have nine characters') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] }}, \"id\": \"{{ c.id }}\"}{{ ', ' if not loop.last }}{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {\"content\": {{ m.content }}, \"call_id\": \"{{ m.tool_call_id }}\"}"
    "[/TOOL_RESULTS]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first }}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SMOLLM2 = (
    _CHATML_SYSTEM.replace("%s", "You are small.")
    + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM3 = (
    "{% set thinks = not (messages[0].role == 'system' and '/no_think' in messages[0].content) %}"
    "<|im_start|>system\n## Metadata\nToday Date: {{ strftime_now('%d %B %Y') }}\n"
    "{{ messages[0].content if messages[0].role == 'system' }}<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{{ '<think>\n\n</think>\n' if not thinks }}{{ m.content.lstrip('\n') }}<|im_end|>\n"
    "{% elif m.role != 'system' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{{ '<think>\n\n</think>\n' if not thinks }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
GPT_OSS = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% if tools or first %}<|start|>developer<|message|>{{ first }}{{ tools | tojson if tools }}<|end|>{% endif %}"
    "{% set ns = namespace(name=none, final=false) %}{% for m in messages %}{% if m.role == 'user' %}"
    "<|start|>user<|message|>{{ m.content }}<|end|>{% elif m.role == 'tool' %}"
    "<|start|>functions.{{ ns.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
    "{% elif m.tool_calls %}{% set ns.final = false %}{% for later in messages[loop.index:] %}"
    "{% if later.role == 'assistant' and not later.tool_calls %}{% set ns.final = true %}{% endif %}{% endfor %}"
    "{% if (m.content or m.thinking) and not ns.final %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.content or m.thinking }}<|end|>{% endif %}"
    "{% set call = m.tool_calls[0].function %}{% set ns.name = call.name %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>{{ call.arguments | tojson }}<|call|>"
    "{% elif loop.last %}{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'assistant' %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
GRANITE = (
    "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>"
    "Today's Date: {{ strftime_now('%B %d, %Y') }}.<|end_of_text|>\n{% endif %}"
    "{% if tools %}<|start_of_role|>available_tools<|end_of_role|>{{ tools | tojson }}<|end_of_text|>\n{% endif %}"
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n"
    "{% if loop.last and add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}{% endfor %}"
)
DEEPSEEK = (  # arguments are joined as text, and a call takes the place of the content
    "{{ bos_token }}{% set ns = namespace(after=false) %}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == 'tool' %}"
    "<|output|>{{ m.content }}<|/output|>{% set ns.after = true %}"
    "{% elif m.tool_calls %}<|Assistant|>{% for c in m.tool_calls %}"
    "{{ '<|call|>' + c.type + '<|sep|>' + c.function.name + '\n' + c.function.arguments + '<|/call|>' }}{% endfor %}"
    "{{ eos_token }}{% else %}{{ '<|Assistant|>' if not ns.after }}{{ m.content }}{{ eos_token }}{% set ns.after = false %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt and not ns.after %}<|Assistant|>{% endif %}"
)
GLM = (  # nothing closes an answer but the head of what is said next
    "{% if tools %}<|system|>\n{{ tools | tojson }}{% endif %}" + _LAST_QUESTION + "{% for m in messages %}"
    "{% set text = m.content or '' %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% set ns.thought = m.reasoning_content or '' %}{% if not ns.thought and '</think>' in text %}"
    "{% set ns.thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and ns.thought %}{{ '\n<think>' + ns.thought + '</think>' }}"
    "{% else %}{{ '\n<think></think>' }}{% endif %}{{ '\n' + text if text }}{% for c in m.tool_calls or [] %}"
    "{{ '\n<tool_call>' + c.function.name }}{% for key, value in c.function.arguments.items() %}"
    "{{ '\n' + key + '=' + value }}{% endfor %}{{ '\n</tool_call>' }}{% endfor %}{% elif m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|observation|>{% endif %}{{ '\n' + text }}"
    "{% else %}<|{{ m.role }}|>\n{{ text }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Family(NamedTuple):
    """A template, the special tokens that it writes (the first is bos), its eos, and added tokens that are not special."""

    template: str
    special: tuple[str, ...]
    eos: str
    added: tuple[str, ...] = ()


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_INST = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
_HARMONY = ("<|startoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
_CALL_OUTPUT = ("<|call|>", "<|sep|>", "<|/call|>", "<|output|>", "<|/output|>")
FAMILIES = {
    "qwen2.5": Family(QWEN25, _CHATML, "<|im_end|>", _MARKS[2:4]),
    "qwen3": Family(QWEN3, _CHATML, "<|im_end|>", _MARKS),
    "qwen3-thinking": Family(QWEN3_THINKING, _CHATML, "<|im_end|>", _MARKS),
    "llama-3.1": Family(LLAMA31, _HEADERS, "<|eot_id|>"),
    "llama-3.2": Family(LLAMA32, _HEADERS, "<|eot_id|>"),
    "mistral": Family(MISTRAL, (*_INST, "[/TOOL_RESULTS]"), "</s>"),
    "gemma-3": Family(GEMMA3, ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", ("\n", "\n\n", "<table>")),
    "smollm2": Family(SMOLLM2, _CHATML, "<|im_end|>"),
    "smollm3": Family(SMOLLM3, _CHATML, "<|im_end|>", _MARKS[:2]),
    "phi-4": Family(PHI4, (*_CHATML, "<|im_sep|>"), "<|im_end|>"),
    "gpt-oss": Family(GPT_OSS, _HARMONY, "<|return|>"),
    "r1-distill": Family(R1, ("<|begin|>", "<|User|>", "<|Assistant|>", "<|eos|>"), "<|eos|>", _MARKS[:2]),
    "deepseek-v3": Family(DEEPSEEK, ("<|begin|>", "<|User|>", "<|Assistant|>", "<|eos|>", *_CALL_OUTPUT), "<|eos|>"),
    "glm": Family(GLM, ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"), "<|user|>", _MARKS[:4]),
    "granite": Family(GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), "<|end_of_text|>"),
}


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A token a byte, the family's special and added tokens, and its template."""
    family = FAMILIES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in family.special])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.added])
    named = dict(bos_token=family.special[0], eos_token=family.eos, clean_up_tokenization_spaces=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=family.template, **named)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


RESULT = {"role": "tool", "content": "9 C", "tool_call_id": "call00001", "name": "weather"}
ROWS = {
    "turns": {"messages": [user("hi"), answer("Hello!\n\nYes?"), user("so"), answer("that")]},
    "system": {"messages": [{"role": "system", "content": "Be kind."}, user("hi"), answer("Yes.")]},
    "reasoning": {"messages": [user("2+2?"), answer("4", reasoning_content="two and two")]},
    "think": {"messages": [user("2+2?"), answer("<think>\ntwo and two\n</think>\n\n4")]},
    "earlier": {"messages": [user("2?"), answer("4", reasoning_content="b"), user("3?"), answer("6", reasoning_content="cc")]},
    "call": {"tools": TOOLS, "messages": [user("w?"), answer("", tool_calls=[CALL]), RESULT, answer("Nine.")]},
    "call+text": {"tools": TOOLS, "messages": [user("w?"), answer("I look.", tool_calls=[CALL]), RESULT, answer("Nine.")]},
    "cut": {"messages": [user("hi"), answer("Hel", truncated=True)]},
    "context": {"messages": [user("hi"), answer("wrong", weight=0), user("so"), answer("right")]},
}
