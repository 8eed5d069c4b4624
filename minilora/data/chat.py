"""Conversations as SmolLM2 reads them: what each side says, between two special tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Message = Mapping[str, str]

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
START, END, ROLES = "<|im_start|>", "<|im_end|>", ("system", "user", "assistant")

# The same for transformers, in the language of Jinja.
TEMPLATE = (
    "{% if messages[0].role != 'system' %}"
    r"{{ '<START>system\n<SYSTEM><END>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    r"{{ '<START>' + message.role + '\n' + message.content + '<END>\n' }}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<START>assistant\n' }}{% endif %}"
).replace("<START>", START).replace("<END>", END).replace("<SYSTEM>", SYSTEM)


def conversation(messages: str | Sequence[Message], system: str | None) -> list[Message]:
    """Return the messages, one or more, with `system` as the first if they have none of their own.

    Raises ValueError for a message that has not a role and a content.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    for m in messages or [{}]:
        m = m if isinstance(m, Mapping) else {"content": m}
        if m.get("role") not in ROLES or not isinstance(m.get("content"), str):
            raise ValueError(f"a message needs a role of {', '.join(ROLES)} and a content that is "
                             f"text, got {str(m)[:100]}")
    if messages[0]["role"] == "system" or system is None:
        return list(messages)
    return [{"role": "system", "content": system}, *messages]
