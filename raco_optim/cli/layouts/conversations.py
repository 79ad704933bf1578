"""Texts and lists of messages: how each is recognised, checked, split and written."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

Messages = list[dict[str, Any]]

# A list of messages as JSON, or as Python prints it, which is no JSON.
_LIKE_MESSAGES = re.compile(r"\s*(\[\s*)?\{\s*[\"'](role|content)[\"']\s*:")
# Transcripts of HH-RLHF, and prompts of several turns in HelpSteer2.
_TURNS = {
    "\n\nHuman:": re.compile(r"\n\n(Human|Assistant):"),
    "<extra_id_1>": re.compile(r"\n?<extra_id_1>(User|Assistant)\n"),
}
_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}
_NAMES = {"user": "Human", "assistant": "Assistant"}


def decoded(value: object) -> str | Messages:
    """Returns a text as it is, and messages as a list, where they come as JSON too.

    Args:
        value: A text or a list of messages.

    Raises:
        ValueError: It is neither, or looks like messages and is not JSON.

    Example:
        >>> from raco_optim.cli.layouts.conversations import decoded
        >>> decoded('[{"role": "user", "content": "Hi"}]')
        [{'role': 'user', 'content': 'Hi'}]
        >>> decoded("[1, 2]")
        '[1, 2]'
    """
    if isinstance(value, str):
        if not _LIKE_MESSAGES.match(value):
            _check_characters(value)
            return value
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"a text looks like messages but is not JSON ({error}); write it with json.dumps"
            ) from error
    if not isinstance(value, list):
        raise ValueError(f"a text or a list of messages is needed; got {value!r:.60}")
    if not value:
        raise ValueError("a list of messages has none")
    for message in value:
        if not _is_message(message):
            raise ValueError(f"a message has the texts `role` and `content`; got {message!r:.60}")
        _check_characters(f"{message['role']}{message.get('content')}")
    return value


def as_messages(value: object, role: str = "user") -> Messages:
    r"""Returns a text or a transcript as messages.

    Args:
        value: What `decoded` takes, or a transcript as of HH-RLHF or HelpSteer2.
        role: Who says the text, or the first turn of a transcript without a name.

    Raises:
        ValueError: It is no text and no list of messages.

    Example:
        >>> from raco_optim.cli.layouts.conversations import as_messages
        >>> [m["role"] for m in as_messages("\n\nHuman: Hi\n\nAssistant: Hello")]
        ['user', 'assistant']
    """
    value = decoded(value)
    if not isinstance(value, str):
        return value
    for start, turn in _TURNS.items():
        within = start == "<extra_id_1>" and role == "user" and turn.search(value)
        if value.startswith(start) or within:
            opening, *rest = turn.split(value)
            turns = [(role, opening)] if opening else []
            turns += [
                (_ROLES[name], text) for name, text in zip(rest[::2], rest[1::2], strict=True)
            ]
            if role == "user" and turns[-1][0] == "assistant" and not turns[-1][1].strip():
                turns.pop()  # a prompt ends where the answer begins
            return [{"role": who, "content": text.strip()} for who, text in turns]
    return [{"role": role, "content": value}]


def split(first: Messages, second: Messages) -> tuple[Messages, Messages, Messages]:
    """Splits two conversations into what they share and how each goes on.

    Args:
        first: A conversation that ends with an answer.
        second: Another one.

    Returns:
        The messages that they begin with, and the others of each, at least one.

    Example:
        >>> from raco_optim.cli.layouts.conversations import as_messages, split
        >>> [hi], [yes], [no] = map(as_messages, ("Hi", "Yes", "No"))
        >>> [len(part) for part in split([hi, yes], [hi, no])]
        [1, 1, 1]
    """
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    return first[:shared], first[shared:], second[shared:]


def as_text(messages: Sequence[dict[str, Any]]) -> str:
    r"""Writes messages as a transcript, as HH-RLHF has it; of a system message, the text alone.

    Args:
        messages: What is said.

    Raises:
        ValueError: Somebody else than system, user and assistant says something.

    Example:
        >>> from raco_optim.cli.layouts.conversations import as_messages, as_text
        >>> as_text(as_messages("Hi"))
        '\n\nHuman: Hi'
    """
    parts = []
    for message in messages:
        role, content = message["role"], message.get("content")
        if not isinstance(content, str):
            raise ValueError(
                "a message without a text has no form as text; use `--format messages`"
            )
        if role == "system":
            parts.append(content)
        elif role in _NAMES:
            parts.append(f"\n\n{_NAMES[role]}: {content}")
        else:
            raise ValueError(f"a message of {role!r} has no form as text; use `--format messages`")
    return "".join(parts)


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text has half a character ({error.reason})") from error


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and (isinstance(value.get("content"), str) or bool(value.get("tool_calls")))
    )
