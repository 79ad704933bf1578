"""`raco-optim align`: trains a model on preference pairs; after a kill it resumes."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raco_optim.cli.arguments import Parsed, check_silenced, parse
from raco_optim.cli.data import content_hash, load_pairs
from raco_optim.cli.environment import environment
from raco_optim.cli.errors import refusals
from raco_optim.cli.files import held, make_folder
from raco_optim.cli.models import loadable_model, no_bars
from raco_optim.cli.processes import by_first, is_first, tell
from raco_optim.cli.records import plain
from raco_optim.cli.runs import RUN_FILE, last_checkpoint, open_run, save_run
from raco_optim.cli.tables import NOTHING, Table
from raco_optim.integrations.gguf import find_base, name_base

if TYPE_CHECKING:
    from datasets import Dataset

    from raco_optim.integrations.trl import MultiObjectiveDPOTrainer

SCORES = ("loss", "margin", "accuracy", "labelled")


def main(arguments: Sequence[str]) -> int:
    """Runs `raco-optim align`."""
    parsed = parse(arguments, "raco-optim align")
    check_silenced([parsed])
    folder = Path(parsed.config.output_dir)
    result = align(parsed, folder, save_model=True)
    if not is_first():
        return 0
    if result["evaluation"]:
        table = score_table(result["evaluation"], result.get("before"))
        sys.stdout.write(f"\n{table.text()}\n")
    what = "adapters" if (folder / "adapter_config.json").exists() else "model"
    sys.stdout.write(f"\n{what} and tokenizer: {folder}\nthe run: {folder / RUN_FILE}\n")
    if parsed.align.model.endswith(".gguf"):
        sys.stdout.write(f"base model: {loadable_model(parsed.align.model, folder)}\n")
    return 0


def align(parsed: Parsed, unpack_to: Path, *, save_model: bool) -> dict[str, Any]:
    """Trains and evaluates, or resumes an interrupted run.

    Args:
        parsed: The command line.
        unpack_to: Folder for an unpacked .gguf model.
        save_model: Whether to save model and tokenizer to the output folder.

    Returns:
        ``"evaluation"``: loss, margin, accuracy and labelled by objective, empty without held-out
        pairs; ``"before"``: the same before training, if `save_model`; ``"training"``: steps,
        seconds, hurting_steps and conflicting_steps.
    """
    no_bars()
    train, held_out = load_data(parsed)
    folder = Path(parsed.config.output_dir)
    model_path = Path(parsed.align.model)
    about = {
        "data": parsed.align.data,
        "eval_data": parsed.align.eval_data,
        "data_format": "text" if isinstance(train[0]["chosen"], str) else "conversation",
        "model_path": str(model_path.resolve() if model_path.exists() else model_path),
        "environment": environment(),
    }
    with contextlib.ExitStack() as stack:

        def opened() -> dict[str, Any]:
            make_folder(folder, "--output_dir")
            stack.enter_context(held(folder, "--output_dir"))
            return open_run(folder, plain(parsed.settings(data_hashes(parsed))), about)

        run = by_first(opened)
        if run["status"] == "finished":
            tell(f"{folder}: this run is already finished.")
            result: dict[str, Any] = run["result"]
            return result
        checkpoint = by_first(lambda: last_checkpoint(folder))
        model = by_first(lambda: loadable_model(parsed.align.model, unpack_to))
        trainer = _trainer(parsed, model, train, held_out)
        _tell_sizes(trainer, folder)
        run = by_first(lambda: save_run(folder, run, status="training"))
        if checkpoint:
            tell(f"{folder}: resuming from {checkpoint.name}.")
        # A sweep keeps no model here: its runs all have the same scores before training.
        trainer.args.eval_on_start = bool(save_model and held_out and not checkpoint)
        with refusals("the training stopped"):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        with refusals("the evaluation stopped"):
            evaluation = _scores(trainer.evaluate(), parsed) if held_out else {}
        if save_model:
            with refusals(f"{folder} can't be written"):
                trainer.save_model()
                _name_base(folder, model)
                trainer.create_model_card(model_name=folder.name)
        result = {"evaluation": evaluation, "training": _training(trainer)}
        evaluations = [x for x in trainer.state.log_history if "eval_loss" in x]
        if evaluations and evaluations[0]["step"] == 0:
            result["before"] = _scores(evaluations[0], parsed)
        result = plain(result)
        by_first(lambda: save_run(folder, run, status="finished", result=result))
    return result


def load_data(parsed: Parsed) -> tuple[Dataset, Dataset | None]:
    """Loads and checks the training pairs and, if given, the held-out pairs."""
    objectives, margins = list(parsed.config.objective_weights), parsed.config.margin_objectives
    train = load_pairs(parsed.align.data, "--data", objectives, margins)
    if parsed.align.eval_data is None:
        return train, None
    return train, load_pairs(parsed.align.eval_data, "--eval_data", objectives, margins)


def data_hashes(parsed: Parsed) -> dict[str, str | None]:
    """Returns the SHA-256 of the data files; None for held-out pairs that are not given."""
    held_out = parsed.align.eval_data
    return {
        "data_sha256": content_hash(parsed.align.data, "--data"),
        "eval_data_sha256": None if held_out is None else content_hash(held_out, "--eval_data"),
    }


def score_table(
    evaluation: Mapping[str, Mapping[str, float | None]],
    before: Mapping[str, Mapping[str, float | None]] | None = None,
) -> Table:
    """Returns the scores of each objective, and those before training, as a table."""
    rows = []
    for name, scores in evaluation.items():
        cells = [_cell(scores[score]) for score in SCORES]
        if before is not None:
            cells[:-1] = [
                f"{_cell(before[name][score])} -> {cell}"
                for score, cell in zip(SCORES[:-1], cells[:-1], strict=True)
            ]
        rows.append([name, *cells[:-1], cells[-1].removesuffix(".000")])
    title = "Held-out pairs" if before is None else "Held-out pairs, before -> after training"
    return Table(title, ["objective", *SCORES], rows)


def _cell(score: float | None) -> str:
    return NOTHING if score is None else f"{score:.3f}"


def _trainer(
    parsed: Parsed, model: str, train: Dataset, held_out: Dataset | None
) -> MultiObjectiveDPOTrainer:
    from transformers import TrainerCallback, TrainerControl
    from trl import get_peft_config, get_quantization_config

    from raco_optim.integrations.trl import MultiObjectiveDPOTrainer

    class Checkpoints(TrainerCallback):  # type: ignore[misc]  # transformers is not type-checked
        """Logs before each checkpoint, which forgets steps that were not logged."""

        def on_step_end(
            self, args: object, state: object, control: TrainerControl, **_: object
        ) -> None:
            control.should_log = control.should_log or control.should_save

        on_epoch_end = on_step_end

        def on_save(self, args: object, state: Any, *_: object, **__: object) -> None:  # noqa: ANN401
            checkpoint = Path(parsed.config.output_dir, f"checkpoint-{state.global_step}")
            _name_base(checkpoint, model)

    parsed.config.model_init_kwargs = {
        "revision": parsed.model.model_revision,
        "attn_implementation": parsed.model.attn_implementation,
        "dtype": parsed.model.dtype,
        **(parsed.config.model_init_kwargs or {}),
    }
    with refusals(f"setting up the training of {parsed.align.model}"):
        return MultiObjectiveDPOTrainer(
            model,
            args=parsed.config,
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[Checkpoints()],
            peft_config=get_peft_config(parsed.model),
            quantization_config=get_quantization_config(parsed.model),
        )


def _name_base(folder: Path, model: str) -> None:
    """Makes adapters on an unpacked .gguf model movable together with it."""
    base = Path(find_base(model) if (Path(model) / "adapter_config.json").is_file() else model)
    unpacked = base.name.startswith("base_model-")
    if is_first() and unpacked and (folder / "adapter_config.json").is_file():
        name_base(folder, base)


def _tell_sizes(trainer: MultiObjectiveDPOTrainer, folder: Path) -> None:
    """Prints how many parameters are trained, and the disk space they need."""
    parameters = list(trainer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    saved = trained if len(trained) < len(parameters) else parameters
    model = sum(p.numel() * p.element_size() for p in saved)
    # Adam stores two numbers per parameter, and other optimizers no more.
    checkpoint = model + 2 * sum(p.numel() * p.element_size() for p in trained)
    limit = trainer.args.save_total_limit
    kept = "no" if trainer.args.save_strategy == "no" else limit or "all"
    most = model + (checkpoint * (limit + 1) if isinstance(kept, int) else 0)
    free = shutil.disk_usage(folder).free
    tell(
        f"{folder}: training {sum(p.numel() for p in trained):,} of "
        f"{sum(p.numel() for p in parameters):,} parameters. The result needs about "
        f"{_megabytes(model)} of disk space, and a checkpoint {_megabytes(checkpoint)}. "
        f"Checkpoints to keep: {kept} (--save_total_limit). Free: {_megabytes(free)}."
        + (" This is too little: the training may fail." if most > free else "")
    )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e8 else f"{size / 1e9:,.1f} GB"


def _scores(metrics: Mapping[str, float], parsed: Parsed) -> dict[str, dict[str, float | None]]:
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
    """Returns the mean over steps of a value that is logged as means since the last log."""
    total, last = 0.0, 0
    for logs in history:
        if name in logs:
            total += logs[name] * (logs["step"] - last)
            last = logs["step"]
    return total / last if last else None
