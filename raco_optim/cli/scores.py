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
    """The text of an answer, the tokens of its prompt, and its tokens."""

    text: str
    prompt: Tensor
    tokens: Tensor


def implicit_rewards(loaded: Loaded, answers: Sequence[Answer]) -> dict[str, list[float | None]]:
    r"""Returns the implicit reward of a trained model for each answer.

    .. math:: \beta \log \frac{\pi(y \mid x)}{\pi_\text{ref}(y \mid x)}

    It is divided by the number of tokens if the loss is. The result maps the name of the reward to
    its values, and is empty if the model has no reference model.
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
    """Returns the scores of a sequence classifier by label.

    Prompt and answer are passed in its chat template or, if it has none, as one text.
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
    """Runs a command that reads a line of JSON per answer and prints a score for each."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with refusals(f"`--judge` {command}"):
        done = subprocess.run(shlex.split(command), input=lines, capture_output=True, text=True)
    if done.returncode:
        *_, last = done.stderr.splitlines() or [""]
        raise UsageError(f"`--judge` {command} failed with exit code {done.returncode}: {last}")
    printed = done.stdout.split()
    try:
        scores = list(map(float, printed))
    except ValueError:
        scores = []
    if len(scores) != len(rows) or not all(map(math.isfinite, scores)):
        raise UsageError(
            f"`--judge` must print {len(rows)} numbers, one per line; got {done.stdout[:80]!r}."
        )
    return scores
