"""Chat templates by name, for base models that ship none, and what makes a text a chat template.

They are written anew after the formats that their sources describe, for messages of system, user and assistant; what a
template leaves out, such as tools, is refused with the record that has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from qlora_trainer.data.chat import TEMPLATE_FIELD as FIELD
from qlora_trainer.data.chat import EndlessTurn
from qlora_trainer.data.formats import Conversation
from qlora_trainer.data.rendering import LimitedRenderer
from qlora_trainer.outcome import UserError

NAMED_TEMPLATES: Mapping[str, str] = {
    # OpenAI's Chat Markup Language: github.com/openai/openai-python, chatml.md of release 0.28.
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # Google's Gemma: ai.google.dev/gemma/docs/core/prompt-structure; a system message opens the first user's turn.
    "gemma": (
        "{{ bos_token }}"
        "{% set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
        "{% for message in messages if message['role'] != 'system' %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
        "{{ (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    # Meta's Llama 3: github.com/meta-llama/llama3, llama/tokenizer.py, ChatFormat.
    "llama3": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}"
        "{{ '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    # Microsoft's Phi-3: the chat format of the model card of microsoft/Phi-3-mini-4k-instruct.
    "phi3": (
        "{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
}
PROBES = ("qloraprobeone", "qloraprobetwo")
"""Words of a user and an assistant that every template writes as they are."""


def named_template(value: str | None) -> str | None:
    """The chat template that the job's field stands for: a name's, or the text itself."""
    if value is None or value in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[value] if value else None
    if not re.search(r"\{\{|\{%", value):
        raise UserError(
            f"{FIELD} is {_short(value)}, which is neither the text of a Jinja template nor a name of one; known names "
            f"are {', '.join(NAMED_TEMPLATES)}"
        )
    return value


def refuse_chats_without_template(tokenizer: Any) -> None:
    """Refuse answers that are messages where no template, or a useless one, would write them."""
    if not tokenizer.chat_template:
        raise UserError(
            f"the dataset's answers are messages, but the model has no chat template: set {FIELD}, choose the model's "
            "instruct variant, or give `prompt`, `chosen` and `rejected` as texts"
        )
    refuse_useless_template(tokenizer)


def refuse_useless_template(tokenizer: Any) -> None:
    """Refuse, once for all records, a template that does not write what is said, or never ends a turn."""
    said = [{"role": role, "content": word} for role, word in zip(("user", "assistant"), PROBES, strict=True)]
    chat = Conversation(messages=said)
    renderer = LimitedRenderer(tokenizer, "assistant", warn=lambda _: None)
    try:
        text = renderer.text(chat)
        useless = not all(word in text for word in PROBES)
        if not useless:
            renderer.render(chat, text)
    except EndlessTurn as error:
        raise UserError(
            "the chat template ends a turn of the assistant with nothing that is a token of the model's tokenizer, so "
            f"that the model would not learn to stop; write one, such as eos_token, or choose another in {FIELD}"
        ) from error
    except ValueError:
        return  # it may want other messages than these
    if useless:
        raise UserError(
            f"the chat template does not write what messages say: of a user and an assistant it makes {_short(text)}; "
            f"give a Jinja template in {FIELD}, or a name: {', '.join(NAMED_TEMPLATES)}"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
