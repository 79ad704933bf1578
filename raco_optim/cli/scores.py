"""Scores of answers: implicit rewards, reward models, and a judge."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raco_optim.cli.errors import UsageError, refusals
from raco_optim.cli.models import Loaded, Turns, log_probability, reference_of


class Answer(NamedTuple):
    """An answer of a model.

    Attributes:
        text: The answer.
        prompt: Tokens of its prompt, as the model was asked.
        tokens: Its tokens, with the one that ends it.

    Example:
        >>> import torch
        >>> from raco_optim.cli.scores import Answer
        >>> Answer("Hi", torch.tensor([1]), torch.tensor([2])).text
        'Hi'
    """

    text: str
    prompt: Tensor
    tokens: Tensor


def implicit_rewards(loaded: Loaded, answers: Sequence[Answer]) -> dict[str, list[float | None]]:
    r"""Returns the reward that a run has learned, for each answer.

    .. math:: \beta \log \frac{\pi(y \mid x)}{\pi_\text{ref}(y \mid x)}

    per token for the loss types that are normalised by length. A run that was trained on one
    objective alone has that objective's reward; any other, that of its weights.

    Args:
        loaded: The run's model.
        answers: Those of all models, which must have the same tokens.

    Returns:
        Name of the reward -> its values; empty for a model without a reference: one that
        `raco-optim align` has not trained, or with a loss that needs none.
    """
    from raco_optim.alignment.losses import REFERENCE_FREE
    from raco_optim.integrations.trl_config import LOSS_TYPES

    settings = loaded.run.get("settings")
    if not settings:
        return {}
    forms = [LOSS_TYPES[name] for name in settings["loss_type"]]
    per_token = [normalised for loss, normalised in forms if loss not in REFERENCE_FREE]
    if not per_token or settings["method"] == "amopo":
        return {}
    used = {name: w for name, w in settings["weights"].items() if w}
    asked = ", ".join(name if w == 1 else f"{name} {w:g}" for name, w in used.items())
    pairs = [(x.prompt.to(loaded.device), x.tokens.to(loaded.device)) for x in answers]
    with refusals(f"the reward of {loaded.name}"):
        ours = [log_probability(loaded.model, *pair) for pair in pairs]
        with reference_of(loaded) as reference:
            if reference is None:
                return {}
            theirs = [log_probability(reference, *pair) for pair in pairs]
    lengths = [len(x.tokens) if per_token[0] else 1 for x in answers]
    rewards: list[float | None] = [
        settings["beta"] * (a - b) / n for a, b, n in zip(ours, theirs, lengths, strict=True)
    ]
    return {f"reward of {loaded.name} ({asked})": rewards}


def reward_model_scores(
    name: str, answers: Sequence[tuple[str | Turns, str]]
) -> dict[str, list[float | None]]:
    """Returns the scores of a sequence classifier, one a label.

    Args:
        name: Its folder, or a name on the model hub.
        answers: Prompts and answers. They are passed in the classifier's chat template, or, if it
            has none, as one text.

    Raises:
        UsageError: It cannot be loaded or used.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = []
    with refusals(f"`--reward_model` {name}"), torch.inference_mode():
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        for prompt, answer in answers:
            if tokenizer.chat_template is not None:
                asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
                turns = [*asked, {"role": "assistant", "content": answer}]
                ids = tokenizer.apply_chat_template(turns, return_dict=False)
            elif isinstance(prompt, str):
                ids = tokenizer(prompt + answer)["input_ids"]
            else:
                raise UsageError(f"`--reward_model` {name} must have a chat template for messages.")
            rows.append(model(torch.tensor([ids], device=model.device)).logits[0].tolist())
        labels = [model.config.id2label[i] for i in range(len(rows[0]))]
    titles = [name] if len(labels) == 1 else [f"{name}: {label}" for label in labels]
    return dict(zip(titles, map(list, zip(*rows, strict=True)), strict=True))


def judge_scores(command: str, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Returns the scores that a command prints, a line each.

    Args:
        command: The command, with its arguments.
        rows: What it reads from its input, as a line of JSON each.

    Raises:
        UsageError: It cannot be started, fails, or prints something else than as many numbers.

    Example:
        >>> from raco_optim.cli.scores import judge_scores
        >>> judge_scores("wc -l", [{"prompt": "Hi", "answer": "Hello"}])
        [1.0]
    """
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with refusals(f"`--judge` {command}"):
        done = subprocess.run(shlex.split(command), input=lines, capture_output=True, text=True)
    if done.returncode:
        *_, last = done.stderr.splitlines() or [""]
        raise UsageError(f"`--judge` {command} ended with {done.returncode}: {last}")
    printed = done.stdout.split()
    try:
        scores = list(map(float, printed))
    except ValueError:
        scores = []
    if len(scores) != len(rows) or not all(map(math.isfinite, scores)):
        raise UsageError(
            f"`--judge` must print {len(rows)} numbers, one a line; got {done.stdout[:80]!r}."
        )
    return scores
