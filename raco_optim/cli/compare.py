"""`raco-optim compare`: answers of several models, side by side, with their scores."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raco_optim.cli.errors import OneLineErrors, UsageError, refusals
from raco_optim.cli.files import write_atomically
from raco_optim.cli.models import Loaded, Turns, asking_options, check_asking, load, on_text
from raco_optim.cli.page import check_page, page
from raco_optim.cli.scores import Answer, implicit_rewards, judge_scores, reward_model_scores
from raco_optim.cli.sources import open_sources
from raco_optim.cli.tables import NOTHING, Table


@dataclass
class Case:
    """A prompt with the answers and scores of each model; None for a missing score."""

    prompt: str | Turns
    answers: list[Answer] = field(default_factory=list)
    scores: dict[str, list[float | None]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The prompt as text."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.prompt)


def main(arguments: Sequence[str]) -> int:
    """Runs `raco-optim compare`."""
    parser = OneLineErrors(
        prog="raco-optim compare",
        description="Lets several models answer the same prompts, and scores each answer with the "
        "rewards that the models learned.",
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="+", help="folders, or names on the model hub")
    parser.add_argument(
        "--prompts",
        required=True,
        help="a .txt file with one prompt per line, or a data file with a column `prompt`",
    )
    parser.add_argument(
        "--reward_model",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="sequence classifiers that score the answers",
    )
    parser.add_argument(
        "--judge",
        metavar="COMMAND",
        help="a command that reads one line of JSON (prompt, answer, model) per answer from its "
        "input, and prints one score per line",
    )
    parser.add_argument("--output", type=Path, help="an HTML page to write")
    asking_options(parser, temperature=0.0)
    options = parser.parse_args(arguments)
    check_asking(options)
    if len(set(options.models)) < len(options.models):
        raise UsageError(f"the models must differ; got {' '.join(options.models)}.")
    if options.output is not None:
        check_page(options.output, "--output")
    cases = [Case(prompt) for prompt in read_prompts(options.prompts)]
    for name in options.models:
        _answer(load(name), cases, options)
    _score(cases, options.models, options.reward_model, options.judge)
    tables = [*(case_table(i, case, options.models) for i, case in enumerate(cases, start=1))]
    if cases[0].scores:
        tables.append(_means(cases, options.models))
    width = shutil.get_terminal_size().columns
    sys.stdout.write("\n\n".join(_text(table, width) for table in tables) + "\n")
    if options.output is not None:
        title = f"Answers of {', '.join(options.models)}"
        write_atomically(options.output, page(title, f"{len(cases)} prompts.", tables))
        sys.stdout.write(f"\n{options.output}\n")
    return 0


def read_prompts(name: str) -> list[str | Turns]:
    """Reads distinct prompts from a .txt file, a line each, or from a column ``prompt``."""
    found: list[str | Turns] = []
    if Path(name).suffix == ".txt":
        with refusals(f"`--prompts` {name}"):
            lines = Path(name).read_text(encoding="utf-8").splitlines()
            found += [line for line in lines if line.strip()]
    else:
        for source in open_sources([name], "--prompts"):
            for place, fields in source.records():
                prompt = fields.get("prompt")
                if prompt is None or not _is_prompt(prompt):
                    raise UsageError(
                        f"`--prompts` must have a text or a list of messages in `prompt`; got "
                        f"{source.name}, {place}, with {prompt!r:.80}."
                    )
                found.append(prompt)
    distinct = {str(prompt): prompt for prompt in found}
    if not distinct:
        raise UsageError(f"`--prompts` must hold at least one prompt; got {name}, which is empty.")
    return list(distinct.values())


def _is_prompt(value: object) -> bool:
    if isinstance(value, list):
        return len(value) > 0 and all(
            isinstance(turn, dict)
            and isinstance(turn.get("role"), str)
            and isinstance(turn.get("content"), str)
            for turn in value
        )
    return isinstance(value, str) and value != ""


def as_asked(loaded: Loaded, prompt: str | Turns, *, plain: bool) -> str | Turns:
    """Returns a prompt in the form of the training data: a text (`plain`), or messages."""
    has_template = loaded.tokenizer.chat_template is not None
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if has_template and not plain else prompt
    if not has_template:
        raise UsageError(f"{loaded.name} must have a chat template for prompts that are messages.")
    return prompt


def _answer(loaded: Loaded, cases: Sequence[Case], options: argparse.Namespace) -> None:
    plain = on_text(options.models)
    sys.stderr.write(f"{loaded.name}: {len(cases)} answers\n")
    for case in cases:
        prompt = loaded.encode(as_asked(loaded, case.prompt, plain=plain))
        tokens = loaded.answer(prompt, options.max_new_tokens, options.temperature)
        case.answers.append(Answer(loaded.text(tokens), prompt.cpu(), tokens.cpu()))


def _score(
    cases: Sequence[Case], models: Sequence[str], reward_models: Sequence[str], judge: str | None
) -> None:
    pairs = [(case.text, case.prompt, answer) for case in cases for answer in case.answers]
    found: dict[str, list[float | None]] = {}
    for name in models:
        found |= implicit_rewards(load(name), [answer for *_, answer in pairs])
    for name in reward_models:
        found |= reward_model_scores(name, [(prompt, x.text) for _, prompt, x in pairs])
    if judge is not None:
        names = [name for _ in cases for name in models]
        rows = [
            {"prompt": prompt, "answer": x.text, "model": name}
            for (_, prompt, x), name in zip(pairs, names, strict=True)
        ]
        found["judge"] = list(judge_scores(judge, rows))
    n = len(models)
    for score, values in found.items():
        for i, case in enumerate(cases):
            case.scores[score] = values[i * n : (i + 1) * n]


def case_table(number: int, case: Case, models: Sequence[str]) -> Table:
    """Returns a table with a column per model: its answer and scores for a prompt."""
    rows = [["answer", *(answer.text for answer in case.answers)]]
    rows += [[score, *map(_number, values)] for score, values in case.scores.items()]
    return Table(f"{number}. {case.text}", ["", *models], rows, wrapped=True)


def _means(cases: Sequence[Case], models: Sequence[str]) -> Table:
    rows = []
    for score in cases[0].scores:
        columns = zip(*(case.scores[score] for case in cases), strict=True)
        known = [[x for x in column if x is not None] for column in columns]
        rows.append([score, *(_number(statistics.fmean(x) if x else None) for x in known)])
    return Table("Means over the prompts", ["", *models], rows, wrapped=True)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _text(table: Table, width: int) -> str:
    """Returns the table as text for a terminal, long cells wrapped."""
    columns = len(table.header)
    first = min(28, max(len(row[0]) for row in table.rows))
    each = max(16, (width - first - 2) // (columns - 1) - 2)
    lines = [table.title]
    for row in [table.header, *table.rows]:
        cells = [
            [part for line in cell.split("\n") for part in textwrap.wrap(line, size) or [""]]
            for cell, size in zip(row, [first] + [each] * (columns - 1), strict=True)
        ]
        for i in range(max(map(len, cells))):
            parts = [cell[i] if i < len(cell) else "" for cell in cells]
            padded = [parts[0].ljust(first), *(part.ljust(each) for part in parts[1:])]
            lines.append(("  " + "  ".join(padded)).rstrip())
    return "\n".join(lines)
