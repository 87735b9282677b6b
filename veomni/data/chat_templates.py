"""Chat templates by name, each marking what the assistant says with ``{% generation %}``.

They follow the published prompt formats: OpenAI's ChatML, Meta's Llama 2 and Llama 3, Google's Gemma, Alibaba's Qwen
2.5. The end-of-turn token is inside the marks, so that a model learns to stop.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from veomni.errors import ConfigError, DataError
from veomni.registry import Registry, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATES: Registry[str] = Registry("chat template")
"""Name to Jinja source, as ``tokenizer.chat_template`` holds it."""

_CHATML_TURNS = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

_QWEN = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

_SYSTEM_IN_FIRST_TURN = """\
{%- set turn = namespace(system='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set turn.system = SYSTEM %}
"""

_LLAMA2 = (
    _SYSTEM_IN_FIRST_TURN.replace("SYSTEM", "'<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n'")
    + """\
    {%- elif message['role'] == 'user' %}
        {{- bos_token }}
        {{- '[INST] ' + turn.system + message['content'] | trim + ' [/INST]' }}
        {%- set turn.system = '' %}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}{{- ' ' + message['content'] | trim + ' ' }}{{- eos_token }}{% endgeneration %}
    {%- else %}
        {{- raise_exception('llama2 has no role ' + message['role']) }}
    {%- endif %}
{%- endfor %}"""
)

_GEMMA = (
    "{{- bos_token }}\n"
    + _SYSTEM_IN_FIRST_TURN.replace("SYSTEM", "message['content'] + '\\n\\n'")
    + """\
    {%- elif message['role'] == 'user' %}
        {{- '<start_of_turn>user\\n' + turn.system + message['content'] | trim + '<end_of_turn>\\n' }}
        {%- set turn.system = '' %}
    {%- elif message['role'] == 'assistant' %}
        {{- '<start_of_turn>model\\n' }}
        {%- generation %}{{- message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- raise_exception('gemma has no role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}"""
)

for _name, _source in {
    "chatml": _CHATML_TURNS,
    "qwen": _QWEN + _CHATML_TURNS,
    "llama2": _LLAMA2,
    "llama3": _LLAMA3,
    "gemma": _GEMMA,
}.items():
    CHAT_TEMPLATES.register(_name)(_source)


def find_chat_template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a template's Jinja source.

    Args:
        name: A registered name, the path of a Jinja file, or None for the tokenizer's own template.
        tokenizer: Asked when ``name`` is None.

    Raises:
        DataError: the tokenizer has no template of its own.
        ConfigError: ``name`` is neither registered nor a file.
    """
    if name is None:
        if not tokenizer.chat_template:
            known = ", ".join(CHAT_TEMPLATES)
            raise DataError("the tokenizer has no chat template", f"set data.chat_template to one of: {known}")
        return tokenizer.get_chat_template()
    if name in CHAT_TEMPLATES:
        return CHAT_TEMPLATES.get(name)
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    fix = did_you_mean(name, list(CHAT_TEMPLATES))
    raise ConfigError(f"data.chat_template: {name!r} is neither a known template nor a file", fix)
