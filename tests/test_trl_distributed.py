"""The trainer in two processes: the steps, logs and checkpoints of one with the joint batch."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import raco_optim
from raco_optim.cli import main
from raco_optim.cli.runs import RUN_FILE
from raco_optim.integrations import trl as trl_module
from raco_optim.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
from tests import test_trl_trainer as base
from tests.ranks import Failure, Ranks
from tests.test_trl_losses import tiny_mixture
from tests.test_trl_settings import Watch, stream
from tests.test_trl_trainer import Settings, make_trainer, parameters
from tests.tiny_language_models import tiny_model, tiny_pairs, tiny_tokenizer

pytestmark = base.pytestmark
offline, settings = base.offline, base.settings

Rows = list[dict[str, Any]]
Logs = list[dict[str, float]]
Trained = tuple[dict[str, Tensor], Logs]  # parameters, and all that was logged
TIMES = ("runtime", "second", "flos", "_time")  # differ, or count padding


@contextmanager
def launched(rank: int | None, number: int = 2) -> Iterator[None]:
    """Tells this process what torchrun would."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    named = {} if rank is None else {name: str(value) for name, value in told.items()}
    with mock.patch.dict(os.environ, named | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}):
        yield


def train(
    rank: int | None,
    settings: Settings,
    data: Rows | Path,
    *,
    lora: dict[str, Any] | None = None,
    streamed: bool = False,
    eval_rows: Rows | None = None,
    resume: bool | None = None,
    stop_at: int | None = None,
    experts: bool = False,
) -> Trained:
    """Trains, and evaluates if there is something to evaluate on.

    A process that trains alone has batches that are as large as those of two.
    """
    settings = dict(settings)
    if rank is None and experts:  # their auxiliary loss is a mean over micro-batches, not pairs
        settings["gradient_accumulation_steps"] *= 2
    elif rank is None:
        for key in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            settings[key] *= 2
    peft = None if lora is None else LoraConfig(r=2, target_modules="all-linear", **lora)

    def stop(state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == stop_at

    with launched(rank):
        pairs = stream(data) if streamed else data
        if isinstance(data, Path):
            pairs = Dataset.from_json(str(data), cache_dir=str(data.parent / "cache"))
        model = tiny_mixture() if experts else tiny_model()
        trainer = make_trainer(settings, pairs, model=model, eval_rows=eval_rows, peft_config=peft)
        trainer.add_callback(Watch("on_step_end", stop))
        trainer.train(resume_from_checkpoint=resume)
        if eval_rows is not None:
            trainer.evaluate()
    history = [
        {key: value for key, value in entry.items() if not any(t in key for t in TIMES)}
        for entry in trainer.state.log_history
    ]
    return parameters(trainer), history


def ranked(rank: int, settings: Settings, data: Rows | Path, options: dict[str, Any]) -> Trained:
    return train(rank, settings, data, **options)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    difference = sum(float((a[name] - b[name]).square().sum()) for name in a)
    return (difference / sum(float(x.square().sum()) for x in b.values())) ** 0.5


def assert_same(a: Trained, b: Trained) -> None:
    assert all(torch.equal(a[0][name], b[0][name]) for name in b[0])
    assert a[1] == b[1]


def assert_logged_alike(found: Logs, expected: Logs, tolerance: float = 1e-3) -> None:
    assert [entry.keys() for entry in found] == [entry.keys() for entry in expected]
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


EIGHT: Settings = {"per_device_train_batch_size": 2, "max_steps": 8}
MICRO: Settings = EIGHT | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
CASES: dict[str, tuple[Settings, dict[str, Any]]] = {
    "raco": (EIGHT, {}),
    "micro-batches": (MICRO, {}),
    "adapters": (MICRO | {"gradient_checkpointing": True}, {"lora": {}}),
    "mgda": (EIGHT | {"method": "mgda", "loss_type": "ipo"}, {}),
    "linear": (EIGHT | {"method": "linear"}, {}),
    "experts": (MICRO, {"experts": True}),
    "linear micro-batches": (MICRO | {"method": "linear"}, {"lora": {}}),
    "amopo": (MICRO | {"method": "amopo"}, {}),
    "modpo": (EIGHT | {"method": "modpo"}, {}),
    "stream": (EIGHT, {"streamed": True}),
    "shuffled": (
        EIGHT | {"train_sampling_strategy": "random", "max_steps": -1, "num_train_epochs": 1},
        {},
    ),
    "rarely logged": (EIGHT | {"logging_steps": 5, "method": "linear"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process_with_the_joint_batch(
    two_ranks: Ranks, settings: Settings, case: str
) -> None:
    """Few pairs are labelled, so that an objective has none on a rank, or on both; 7 held out."""
    changed, options = CASES[case]
    rows, held_out = tiny_pairs(32, missing=0.6, seed=3), tiny_pairs(7, missing=0.3, seed=8)
    for row in rows + held_out:
        row["margin_harmless"] = 0.5
    if case != "experts":  # whose auxiliary loss sees the pairs that fill the last batch up
        options = options | {"eval_rows": held_out}
    expected, expected_logs = train(None, settings | changed, rows, **options)
    mine, theirs = two_ranks.run(ranked, settings | changed, rows, options)
    assert_same(mine, theirs)
    assert distance(mine[0], expected) < 1e-4
    assert_logged_alike(mine[1], expected_logs)


# --- Data ----------------------------------------------------------------------------------------


def test_reference_log_probs_that_were_computed_before(
    two_ranks: Ranks, settings: Settings, tmp_path: Path
) -> None:
    rows = tiny_pairs(16, missing=0.3)
    settings |= {"per_device_train_batch_size": 2, "max_steps": 4}
    expected = train(None, settings, rows)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["precompute_ref_log_probs"] = True
    mine, theirs = two_ranks.run(ranked, settings, path, {})
    assert_same(mine, theirs)
    assert distance(mine[0], expected[0]) < 1e-4
    for failure in two_ranks.outcomes(ranked, settings, rows, {}):
        assert "`precompute_ref_log_probs` must be False with several proce" in failure.trace


SIZES = (1, 3, 5, 6, 13)


def trainer_of(settings: Settings, model: nn.Module) -> MultiObjectiveDPOTrainer:
    return MultiObjectiveDPOTrainer(
        model,
        tiny_model(seed=2),
        MultiObjectiveDPOConfig(**settings, weights=base.WEIGHTS),
        train_dataset=Dataset.from_list(tiny_pairs(4)),
        processing_class=tiny_tokenizer(),
    )


def evaluations(rank: int | None, settings: Settings) -> list[dict[str, float]]:
    if rank is None:
        settings = settings | {"per_device_eval_batch_size": 6}
    with launched(rank):
        trainer = trainer_of(settings, tiny_model(seed=1))
        rows = tiny_pairs(max(SIZES), missing=0.3, seed=5)
        sets = [Dataset.from_list(rows[:size]) for size in SIZES] + [stream(rows[:12])]
        found = [trainer.evaluate(one) for one in sets]
    return [
        {k: v for k, v in metrics.items() if not any(t in k for t in TIMES)} for metrics in found
    ]


def test_evaluation_counts_each_pair_once(two_ranks: Ranks, settings: Settings) -> None:
    """Though the last batch is filled up with pairs from the beginning, so that both have some."""
    expected = evaluations(None, settings)
    mine, theirs = two_ranks.run(evaluations, settings)
    assert mine == theirs
    for found, alone in zip(mine, expected, strict=True):
        assert found == pytest.approx(alone, rel=1e-4, abs=1e-6)


# --- Checkpoints ---------------------------------------------------------------------------------


def test_resumes_where_it_was(two_ranks: Ranks, settings: Settings, tmp_path: Path) -> None:
    rows = tiny_pairs(20, missing=0.3)
    settings |= MICRO | {"lr_scheduler_type": "linear", "train_sampling_strategy": "random"}
    settings |= {"disable_dropout": False}
    options: dict[str, Any] = {"lora": {"lora_dropout": 0.2}}
    whole = two_ranks.run(ranked, settings, rows, options)
    settings |= {"save_strategy": "steps", "save_steps": 3}
    two_ranks.run(ranked, settings, rows, options | {"stop_at": 3})
    saved = {path.name for path in Path(settings["output_dir"], "checkpoint-3").iterdir()}
    assert {"optimizer.pt", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"} <= saved
    again = two_ranks.run(ranked, settings, rows, options | {"resume": True})
    for mine, before in zip(again, whole, strict=True):
        assert_same((mine[0], mine[1][:-1]), (before[0], before[1][:-1]))


def test_goes_on_in_one_process(two_ranks: Ranks, settings: Settings) -> None:
    rows = tiny_pairs(32, missing=0.3)
    settings |= EIGHT
    expected = train(None, settings, rows)
    settings |= {"save_strategy": "steps", "save_steps": 4}
    two_ranks.run(ranked, settings, rows, {"stop_at": 4})
    found = train(None, settings, rows, resume=True)
    assert distance(found[0], expected[0]) < 1e-4


# --- Accidents -----------------------------------------------------------------------------------


def in_backward(_: Tensor) -> None:
    raise KeyError("backward")


def accident(kind: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Another forward pass, with something wrong."""

    def changed(*arguments: Any) -> Tensor:
        found = original(*arguments)
        if kind == "forward":
            raise KeyError("forward")
        if kind == "backward":
            found.register_hook(in_backward)
        return found * math.nan if kind == "nan" else found

    return changed


def hurt(rank: int, settings: Settings, rows: Rows, kind: str, options: dict[str, Any]) -> None:
    if kind == "pair":
        options["streamed"], rows = True, [*rows[:2], dict(rows[2], pref_helpful=7), *rows[3:]]
    forward = trl_module.completion_log_probs
    wrong = accident(kind if rank == 1 else "none", forward)
    with mock.patch.object(trl_module, "completion_log_probs", wrong):
        train(rank, settings, rows, **options)


@pytest.mark.parametrize(
    ("kind", "method", "error", "elsewhere"),
    [
        ("forward", "raco", KeyError, "rank 1: KeyError"),
        ("forward", "linear", KeyError, "rank 1: KeyError"),
        ("backward", "raco", KeyError, "rank 1: KeyError"),
        ("nan", "raco", FloatingPointError, "is NaN or Inf on rank 1"),
        ("nan", "linear", FloatingPointError, "rank 1: FloatingPointError"),
        ("pair", "raco", ValueError, "rank 1: ValueError: column `pref_helpful`"),
    ],
)
def test_what_fails_in_one_process_fails_in_all(
    two_ranks: Ranks,
    settings: Settings,
    kind: str,
    method: str,
    error: type[Exception],
    elsewhere: str,
) -> None:
    settings |= MICRO | {"method": method, "per_device_train_batch_size": 2}
    outcomes = two_ranks.outcomes(hurt, settings, tiny_pairs(32), kind, {})
    assert all(isinstance(outcome, Failure) for outcome in outcomes)
    assert isinstance(outcomes[1].error, error)
    assert elsewhere in outcomes[0].trace


def skipping(rank: int, settings: Settings, rows: Rows) -> Trained:
    """The scores of one process are NaN in the first micro-batch of the second step."""
    forward, calls = trl_module.completion_log_probs, []

    def spoiled(*arguments: Any) -> Tensor:
        calls.append(1)
        return forward(*arguments) * (math.nan if rank == 1 and len(calls) == 3 else 1.0)

    with mock.patch.object(trl_module, "completion_log_probs", spoiled):
        return train(rank, settings, rows)


def test_all_skip_what_is_not_finite_in_one_process(two_ranks: Ranks, settings: Settings) -> None:
    rows = tiny_pairs(12, missing=0.3)
    settings |= MICRO | {"max_steps": 3, "nonfinite": "skip"}
    mine, theirs = two_ranks.run(skipping, settings, rows)
    assert_same(mine, theirs)
    expected = two_ranks.run(ranked, settings | {"max_steps": 2}, [*rows[:4], *rows[8:]], {})
    assert all(torch.equal(mine[0][name], x) for name, x in expected[0][0].items())
    assert [entry.get("skipped") for entry in mine[1][:3]] == [None, 1, 1]
    assert mine[1][1]["labelled/helpful"] == 0


def set_apart(rank: int, settings: Settings, rows: Rows) -> None:
    def change(*_: Any, optimizer: Any, **__: Any) -> None:
        raco_optim.unwrap(optimizer).c = 0.1 * (rank + 1)

    with launched(rank):
        trainer = make_trainer(settings, rows)
        trainer.add_callback(Watch("on_step_end", change))
        trainer.train()


def test_what_is_set_between_steps_is_the_same_in_all(two_ranks: Ranks, settings: Settings) -> None:
    for outcome in two_ranks.outcomes(set_apart, settings | EIGHT, tiny_pairs(32)):
        assert isinstance(outcome.error, ValueError)
        assert "`c` must be the same in all processes" in outcome.trace


def run_out_of_memory(rank: int, settings: Settings, rows: Rows) -> Trained:
    forward, calls = trl_module.completion_log_probs, []

    def too_large(*arguments: Any) -> Tensor:
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            raise RuntimeError("CUDA out of memory.")
        return forward(*arguments)

    with mock.patch.object(trl_module, "completion_log_probs", too_large):
        return train(rank, settings, rows)


def test_all_try_again_with_smaller_batches(two_ranks: Ranks, settings: Settings) -> None:
    """After an error in the second of two micro-batches of one process."""
    settings |= {"gradient_accumulation_steps": 2, "max_steps": 2}
    rows = tiny_pairs(24, missing=0.3)
    found = two_ranks.run(run_out_of_memory, settings | {"auto_find_batch_size": True}, rows)
    expected = two_ranks.run(ranked, settings | {"per_device_train_batch_size": 3}, rows, {})
    for mine, other in zip(found, expected, strict=True):
        assert_same(mine, other)


def test_trains_after_accidents(two_ranks: Ranks, settings: Settings) -> None:
    """The group is still of use, so nothing was left waiting."""
    mine, theirs = two_ranks.run(ranked, settings, tiny_pairs(16), {})
    assert_same(mine, theirs)


def differ(rank: int, settings: Settings, changed: Settings, model_seeds: list[int]) -> None:
    with launched(rank):
        model = tiny_model(seed=model_seeds[rank])
        settings = settings | changed if rank == 1 else settings
        make_trainer(settings, tiny_pairs(8), model=model).train()


@pytest.mark.parametrize(
    ("changed", "seeds", "named"),
    [
        ({"weights": {"helpful": 0.6, "harmless": 0.4}}, [0, 0], "`weights`"),
        ({"c": 0.1}, [0, 0], "`c`"),
        ({"max_steps": 3}, [0, 0], "`max_steps`"),
        ({}, [0, 1], "the values of the parameters"),
    ],
)
def test_processes_that_differ_do_not_start(
    two_ranks: Ranks, settings: Settings, changed: Settings, seeds: list[int], named: str
) -> None:
    for outcome in two_ranks.outcomes(differ, settings, changed, seeds):
        assert isinstance(outcome.error, ValueError)
        assert f"{named} must be the same in all processes" in outcome.trace


# --- What is refused -----------------------------------------------------------------------------


def refused(rank: int, settings: Settings, is_launched: bool) -> None:
    with launched(rank if is_launched else None):
        MultiObjectiveDPOConfig(**settings, weights=base.WEIGHTS)


@pytest.mark.parametrize(
    ("changed", "is_launched", "message"),
    [
        ({"accelerator_config": {"even_batches": False}}, True, "must have `even_batches`"),
        ({"accelerator_config": {"dispatch_batches": True}}, True, "must have `dispatch_batches`"),
        ({"use_cpu": False}, True, "the Trainer must see all processes, 2; it sees 1"),
        ({}, False, "the Trainer must see all processes, 2; it sees 1"),
    ],
)
def test_launch_that_would_go_wrong(
    two_ranks: Ranks, settings: Settings, changed: Settings, is_launched: bool, message: str
) -> None:
    for outcome in two_ranks.outcomes(refused, settings | changed, is_launched):
        assert isinstance(outcome.error, ValueError)
        assert message in outcome.trace


def shard(rank: int, settings: Settings) -> None:
    with launched(rank):
        model = tiny_model()
        fully_shard(model)
        trainer_of(settings, model)


def test_sharded_models_are_refused(two_ranks: Ranks, settings: Settings) -> None:
    for outcome in two_ranks.outcomes(shard, settings):
        assert isinstance(outcome.error, ValueError)
        assert "sharding of the model before the training must be off" in outcome.trace
    deepspeed = {"deepspeed": {"zero_optimization": {"stage": 2}}}
    with pytest.raises((ValueError, ImportError), match=r"use FSDP2|[Dd]eep[Ss]peed"):
        MultiObjectiveDPOConfig(**settings | deepspeed, weights=base.WEIGHTS)
    with pytest.raises(ValueError, match="`ddp_static_graph` must be False"):
        MultiObjectiveDPOConfig(**settings, ddp_static_graph=True, weights=base.WEIGHTS)


# --- The command line ----------------------------------------------------------------------------


def raco(rank: int | None, arguments: list[str], cache: Path) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    cached = mock.patch.object(datasets.config, "HF_DATASETS_CACHE", cache)
    with launched(rank), cached, redirect_stdout(out), redirect_stderr(err):
        return main(arguments), out.getvalue(), err.getvalue()


def test_raco_align(two_ranks: Ranks, tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, rows in (("train", tiny_pairs(16, missing=0.2)), ("test", tiny_pairs(7, seed=1))):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)

    def arguments(output: str, batch: int) -> list[str]:
        options = {
            "model": tmp_path / "model",
            "data": tmp_path / "train.jsonl",
            "eval_data": tmp_path / "test.jsonl",
            "output_dir": tmp_path / output,
            "weights": "helpful=0.7,harmless=0.3",
            "per_device_train_batch_size": batch,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "adam_epsilon": 1e-3,  # with 1e-8, Adam magnifies rounding
            "report_to": "none",
            "use_cpu": "true",
            "disable_tqdm": "true",
        }
        return [
            "align",
            *(word for key, value in options.items() for word in (f"--{key}", f"{value}")),
        ]

    def results(output: str) -> dict[str, Any]:
        found = json.loads((tmp_path / output / RUN_FILE).read_text())["result"]
        return found["evaluation"]

    assert raco(None, arguments("one", 4), tmp_path)[0] == 0
    mine, theirs = two_ranks.run(raco, arguments("two", 2), tmp_path)
    assert mine[0] == theirs[0] == 0
    assert "Held-out pairs" in mine[1]
    assert not theirs[1]
    for name, scores in results("one").items():
        assert results("two")[name] == pytest.approx(scores, rel=1e-3, abs=1e-5)

    again, _ = two_ranks.run(raco, arguments("two", 2), tmp_path)
    assert again[0] == 0 and "this run is already finished" in again[2]
    for code, out, err in two_ranks.run(raco, arguments("two", 4), tmp_path):
        assert (code, out) == (2, "")
        assert not err or err.startswith("raco-optim: ")
        assert not err or "per_device_train_batch_size was 2 and is now 4" in err
    assert "processes was 2 and is now None" in raco(None, arguments("two", 2), tmp_path)[2]
    (code, _, err), _ = two_ranks.run(raco, ["report", "x.jsonl", "--output", "y"], tmp_path)
    assert code == 2
    assert err == "raco-optim: `raco-optim report` must run in one process. Leave out torchrun.\n"
