"""`raco-optim align`: preference pairs + a model -> an aligned model; killed, it resumes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raco_optim.cli.arguments import Parsed, parse
from raco_optim.cli.data import load_pairs
from raco_optim.cli.environment import environment
from raco_optim.cli.errors import refusals
from raco_optim.cli.files import held, make_folder, sha256
from raco_optim.cli.models import loadable_model
from raco_optim.cli.processes import by_first, is_first, tell
from raco_optim.cli.records import plain
from raco_optim.cli.runs import RUN_FILE, last_checkpoint, open_run, save_run
from raco_optim.cli.tables import NOTHING, Table

if TYPE_CHECKING:
    from datasets import Dataset

    from raco_optim.integrations.trl import MultiObjectiveDPOTrainer

SCORES = ("loss", "margin", "accuracy", "labelled")


def main(arguments: Sequence[str]) -> int:
    """Runs `raco-optim align`.

    Args:
        arguments: What follows ``raco-optim align`` on the command line.

    Returns:
        The exit code.

    Raises:
        UsageError: The arguments, the data, the model or the output folder are not usable.
    """
    parsed = parse(arguments, "raco-optim align")
    folder = Path(parsed.config.output_dir)
    result = align(parsed, folder, save_model=True)
    if not is_first():
        return 0
    if result["evaluation"]:
        sys.stdout.write(f"\n{score_table(result['evaluation']).text()}\n")
    what = "adapters" if parsed.model.use_peft else "model"
    sys.stdout.write(f"\n{what} and tokenizer: {folder}\nthe run: {folder / RUN_FILE}\n")
    if parsed.align.model.endswith(".gguf"):
        sys.stdout.write(f"base model: {loadable_model(parsed.align.model, folder)}\n")
    return 0


def align(parsed: Parsed, unpack_to: Path, *, save_model: bool) -> dict[str, Any]:
    """Trains and evaluates, or goes on with a run that was interrupted.

    Args:
        parsed: The command line.
        unpack_to: Where to unpack a .gguf model.
        save_model: Whether to save model and tokenizer in the output folder when it is over.

    Returns:
        ``"evaluation"``: loss, margin, accuracy and labelled by objective, empty without data for
        it; ``"training"``: steps, seconds, hurting_steps and conflicting_steps.

    Raises:
        UsageError: The data, the model or the output folder are not usable, or a loss or its
            gradient became NaN or Inf.
    """
    train, held_out = load_data(parsed)
    folder = Path(parsed.config.output_dir)
    about = {
        "data": parsed.align.data,
        "eval_data": parsed.align.eval_data,
        "environment": environment(),
    }
    with contextlib.ExitStack() as stack:

        def opened() -> dict[str, Any]:
            make_folder(folder, "--output_dir")
            stack.enter_context(held(folder, "--output_dir"))
            return open_run(folder, plain(parsed.settings(data_hashes(parsed))), about)

        run = by_first(opened)
        if run["status"] == "finished":
            tell(f"{folder}: this run is finished; nothing to do.")
            result: dict[str, Any] = run["result"]
            return result
        checkpoint = by_first(lambda: last_checkpoint(folder))
        model = by_first(lambda: loadable_model(parsed.align.model, unpack_to))
        trainer = _trainer(parsed, model, train, held_out)
        run = by_first(lambda: save_run(folder, run, status="training"))
        if checkpoint:
            tell(f"{folder}: going on from {checkpoint.name}.")
        with refusals("the training stopped", FloatingPointError):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        result = {
            "evaluation": _evaluation(trainer, parsed) if held_out else {},
            "training": _training(trainer),
        }
        if save_model:
            trainer.save_model()
        by_first(lambda: save_run(folder, run, status="finished", result=plain(result)))
    return result


def load_data(parsed: Parsed) -> tuple[Dataset, Dataset | None]:
    """Loads and checks the training pairs and, if there are any, the held-out pairs.

    Args:
        parsed: The command line.

    Raises:
        UsageError: A file is not usable.
    """
    objectives, margins = list(parsed.config.objective_weights), parsed.config.margin_objectives
    train = load_pairs(Path(parsed.align.data), "--data", objectives, margins)
    if parsed.align.eval_data is None:
        return train, None
    return train, load_pairs(Path(parsed.align.eval_data), "--eval_data", objectives, margins)


def data_hashes(parsed: Parsed) -> dict[str, str | None]:
    """Returns the SHA-256 of the data files, None where there is none.

    Args:
        parsed: The command line.
    """
    held_out = parsed.align.eval_data
    return {
        "data_sha256": sha256(Path(parsed.align.data)),
        "eval_data_sha256": None if held_out is None else sha256(Path(held_out)),
    }


def score_table(evaluation: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Returns the scores of each objective as a table.

    Args:
        evaluation: Scores by objective.

    Example:
        >>> from raco_optim.cli.align import score_table
        >>> scores = {"loss": 0.5, "margin": 0.1, "accuracy": 0.75, "labelled": 8}
        >>> print(score_table({"helpful": scores}).text())
        Held-out pairs
          objective   loss  margin  accuracy  labelled
          helpful    0.500   0.100     0.750         8
    """
    rows = []
    for name, scores in evaluation.items():
        values = [scores[score] for score in SCORES]
        *means, labelled = (NOTHING if x is None else f"{x:.3f}" for x in values)
        rows.append([name, *means, labelled.removesuffix(".000")])
    return Table("Held-out pairs", ["objective", *SCORES], rows)


def _trainer(
    parsed: Parsed, model: str, train: Dataset, held_out: Dataset | None
) -> MultiObjectiveDPOTrainer:
    from transformers import TrainerCallback, TrainerControl
    from trl import get_peft_config, get_quantization_config

    from raco_optim.integrations.trl import MultiObjectiveDPOTrainer

    class LogBeforeSaving(TrainerCallback):  # type: ignore[misc]  # transformers is not type-checked
        """A checkpoint has no memory of steps that were not logged yet."""

        def on_step_end(
            self, args: object, state: object, control: TrainerControl, **_: object
        ) -> None:
            control.should_log = control.should_log or control.should_save

        on_epoch_end = on_step_end

    parsed.config.model_init_kwargs = {
        "revision": parsed.model.model_revision,
        "attn_implementation": parsed.model.attn_implementation,
        "dtype": parsed.model.dtype,
        **(parsed.config.model_init_kwargs or {}),
    }
    with refusals(
        f"setting up the training of {parsed.align.model}", ValueError, OSError, ImportError
    ):
        return MultiObjectiveDPOTrainer(
            model,
            args=parsed.config,
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[LogBeforeSaving()],
            peft_config=get_peft_config(parsed.model),
            quantization_config=get_quantization_config(parsed.model),
        )


def _evaluation(
    trainer: MultiObjectiveDPOTrainer, parsed: Parsed
) -> dict[str, dict[str, float | None]]:
    metrics = trainer.evaluate()
    return {
        name: {score: metrics.get(f"eval_{score}/{name}") for score in SCORES}
        for name in parsed.config.objective_weights
    }


def _training(trainer: MultiObjectiveDPOTrainer) -> dict[str, float | None]:
    history = trainer.state.log_history
    seconds = [logs["train_runtime"] for logs in history if "train_runtime" in logs]
    return {
        "steps": trainer.state.global_step,
        "seconds": seconds[-1] if seconds else None,
        "hurting_steps": mean_over_steps(history, "hurting"),
        "conflicting_steps": mean_over_steps(history, "conflicting"),
    }


def mean_over_steps(history: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Returns the mean over training steps of what was logged as means since the last log.

    Args:
        history: The Trainer's logs.
        name: What was logged.

    Returns:
        The mean, or None where it was never logged.

    Example:
        >>> from raco_optim.cli.align import mean_over_steps
        >>> mean_over_steps([{"step": 2, "hurting": 0.5}, {"step": 3, "hurting": 1.0}], "hurting")
        0.6666666666666666
    """
    total, last = 0.0, 0
    for logs in history:
        if name in logs:
            total += logs[name] * (logs["step"] - last)
            last = logs["step"]
    return total / last if last else None
