"""Texts and lists of messages: recognised, checked, split and written."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

Messages = list[dict[str, Any]]

# A list of messages as JSON, or as Python prints it.
_LIKE_MESSAGES = re.compile(r"\s*(\[\s*)?\{\s*[\"'](role|content)[\"']\s*:")
# Transcripts of HH-RLHF, and prompts with several turns of HelpSteer2.
_TURNS = {
    "\n\nHuman:": re.compile(r"\n\n(Human|Assistant):"),
    "<extra_id_1>": re.compile(r"\n?<extra_id_1>(User|Assistant)\n"),
}
_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}
_NAMES = {"user": "Human", "assistant": "Assistant"}


def decoded(value: object) -> str | Messages:
    """Returns a text unchanged, and messages as a list, also from JSON; or raises."""
    if isinstance(value, str):
        if not _LIKE_MESSAGES.match(value):
            _check_characters(value)
            return value
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(
                f"a text looks like messages but is not JSON ({error}). Write it with json.dumps"
            ) from error
    if not isinstance(value, list):
        raise ValueError(f"an answer or prompt must be a text or messages; got {value!r:.60}")
    if not value:
        raise ValueError("a list of messages must not be empty")
    for message in value:
        if not _is_message(message):
            raise ValueError(
                f"a message must have the texts `role` and `content`; got {message!r:.60}"
            )
        _check_characters(f"{message['role']}{message.get('content')}")
    return value


def as_messages(value: object, role: str = "user") -> Messages:
    """Returns a text, a transcript of HH-RLHF or HelpSteer2, or messages as messages.

    The `role` is the speaker of a text, and of a first turn without a name.
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
    """Splits two conversations into their common start and the rest of each, not empty."""
    shared = 0
    while shared < min(len(first), len(second)) - 1 and first[shared] == second[shared]:
        shared += 1
    return first[:shared], first[shared:], second[shared:]


def as_text(messages: Sequence[dict[str, Any]]) -> str:
    """Writes messages as a transcript in the form of HH-RLHF; or raises `ValueError`."""
    parts = []
    for message in messages:
        role, content = message["role"], message.get("content")
        if not isinstance(content, str):
            raise ValueError(
                "a message without a text can't be written as text. Use `--format messages`"
            )
        if role == "system":
            parts.append(content)
        elif role in _NAMES:
            parts.append(f"\n\n{_NAMES[role]}: {content}")
        else:
            raise ValueError(
                f"a message of {role!r} can't be written as text. Use `--format messages`"
            )
    return "".join(parts)


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text must be valid Unicode ({error.reason})") from error


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and (isinstance(value.get("content"), str) or bool(value.get("tool_calls")))
    )
