"""Chat templates that read content as a string, and those that read a list of typed parts: each made to take the other.

Ours read strings with `<image>` marks, as LLaVA's data has them. Templates of llava-hf read parts (`{"type": "image"}, {"type": "text",
"text": ...}`) and write nothing at all for a string, silently.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

# Jinja's sandbox forbids changing a list in place; a namespace carries the new one out of the loop.
_STRINGS_TO_PARTS = (
    "{% set ns = namespace(all=[]) %}{% for message in messages %}{% if message['content'] is string %}"
    "{% set ns.all = ns.all + [{'role': message['role'], 'content': [{'type': 'text', 'text': message['content']}]}] %}"
    "{% else %}{% set ns.all = ns.all + [message] %}{% endif %}{% endfor %}{% set messages = ns.all %}"
)
_PARTS_TO_STRINGS = (
    "{% set ns = namespace(all=[], text='') %}{% for message in messages %}{% if message['content'] is string %}"
    "{% set ns.all = ns.all + [message] %}{% else %}{% set ns.text = '' %}{% for part in message['content'] %}"
    "{% set ns.text = ns.text + ('<image>\\n' if part['type'] == 'image' else part['text']) %}{% endfor %}"
    "{% set ns.all = ns.all + [{'role': message['role'], 'content': ns.text}] %}{% endif %}{% endfor %}{% set messages = ns.all %}"
)


def taking_strings(template: str, tokenizer: Any) -> str:
    """`template`, or, if it writes nothing for a string, one that hands it every string as one text part."""
    probe = "a probe"
    messages = [{"role": role, "content": probe} for role in ("user", "assistant")]  # both: stage 1's template drops the user's text
    try:
        written = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except (TemplateError, TypeError):
        written = ""
    return template if probe in written else _STRINGS_TO_PARTS + template


def taking_parts(template: str) -> str:
    """A template of strings as stock transformers users call it: typed parts become one string, an image part `<image>` and newline."""
    return template if template.startswith(_PARTS_TO_STRINGS) else _PARTS_TO_STRINGS + template
