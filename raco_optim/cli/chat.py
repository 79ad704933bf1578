"""`raco-optim chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from raco_optim.cli.errors import OneLineErrors, UsageError
from raco_optim.cli.models import Loaded, asking_options, check_asking, load, on_text

_HELP = "/reset starts a new conversation; /exit or Control-D ends."


def main(arguments: Sequence[str]) -> int:
    """Runs `raco-optim chat`."""
    parser = OneLineErrors(
        prog="raco-optim chat",
        description=f"Chats with a model or with adapters that `raco-optim align` saved. {_HELP}",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="the folder, or a name on the model hub")
    asking_options(parser, temperature=0.7)
    options = parser.parse_args(arguments)
    check_asking(options)
    loaded = load(options.model)
    plain = on_text([options.model]) or loaded.tokenizer.chat_template is None
    how = "plain text, without a chat template" if plain else "the model's chat template"
    sys.stderr.write(f"{options.model}, prompted with {how}. {_HELP}\n")
    turns: list[dict[str, str]] = []
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            turns.clear()
        elif line.startswith("/"):
            sys.stderr.write(f"unknown command {line.split()[0]}. {_HELP}\n")
        elif line:
            turns.append({"role": "user", "content": line})
            try:
                said = _said(loaded, turns, plain, options.max_new_tokens, options.temperature)
            except UsageError as error:
                sys.stderr.write(f"{error} /reset starts a new conversation.\n")
                turns.pop()
            else:
                turns.append({"role": "assistant", "content": said})
    return 0


def _said(
    loaded: Loaded, turns: list[dict[str, str]], plain: bool, length: int, temperature: float
) -> str:
    """Prints an answer as it is generated, and returns it."""
    from transformers import TextStreamer

    prompt = loaded.encode("\n".join(turn["content"] for turn in turns) if plain else turns)
    streamer = TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return loaded.text(loaded.answer(prompt, length, temperature, streamer))


def _lines() -> Iterator[str]:
    """Yields the lines that a user types or a pipe sends."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  # lets `input` edit the line
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> ") if terminal else next(sys.stdin)
        except (EOFError, StopIteration):
            return
        yield line.strip()
