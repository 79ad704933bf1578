"""What a RACO training step costs beside a step of TRL's own trainer.

Each candidate is a Trainer that trains a few steps at a time, in turn with the others in one
process; a step's time is from `on_step_begin` to `on_step_end`, so that clipping and optimizer are
in it. Peak memory is that of a process with one candidate alone. All have LoRA on all linear
layers, the same pairs and batches:

- ``trl``: TRL's `DPOTrainer`, one preference: what weighted DPO costs there;
- ``floor``: the same with one backward pass per objective instead of one, and nothing else;
- ``linear``, ``raco``: `MultiObjectiveDPOTrainer` with two objectives.
"""

from __future__ import annotations

import random
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

from benchmarks import smollm2
from benchmarks.demo.data import OBJECTIVES, load_papers, sample_pairs
from benchmarks.demo.model import train_tokenizer
from benchmarks.harness import Parser, apart, environment, refusals_of, spread, write_results
from raco_optim.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer

CANDIDATES = ("trl", "floor", "linear", "raco")
MODELS = ("random", "smollm2")
BATCH = 4
STEPS = 3  # in a turn; the first is not counted


class OneBackwardPerObjective(DPOTrainer):  # type: ignore[misc]  # TRL is not type-checked
    """TRL's step with as many backward passes as there are objectives."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:  # noqa: ANN401
        """As the Trainer's, but for the number of backward passes."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for _ in OBJECTIVES[1:]:
            torch.autograd.grad(loss, parameters, retain_graph=True)
        loss.backward()
        return loss.detach()


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not type-checked
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401, D102
        self._wait()
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401, D102
        self._wait()
        self.seconds.append(time.perf_counter() - self._start)

    @staticmethod
    def _wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M, or a Llama of 12 M parameters with random weights and a vocabulary of 8192."""
    if name == "smollm2":
        return smollm2.load()
    texts = [text for paper in load_papers("train") for text in paper.get_all_sentences()]
    trained: Tokenizer = train_tokenizer(texts, vocab_size=8192)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), tokenizer


def trainer(candidate: str, model: str, *, precomputed: bool, folder: str) -> tuple[Any, Clock]:
    """A Trainer that trains `STEPS` steps at every call of `train`, and its clock."""
    papers = load_papers("train")
    titles = {paper.id: paper.title for paper in papers}
    rows = Dataset.from_list(
        [
            {
                "prompt": f'A sentence from the paper "{titles[pair.paper]}":',
                "chosen": f" {pair.first}",
                "rejected": f" {pair.second}",
                **{f"pref_{x}": sign for x, sign in zip(OBJECTIVES, pair.signs, strict=True)},
            }
            for pair in sample_pairs(papers, BATCH * STEPS, random.Random(0))
        ]
    )
    gpu = torch.cuda.is_available()
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "precompute_ref_log_probs": precomputed,
        "bf16": gpu,
        "gradient_checkpointing": False,
        "use_cpu": not gpu,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    clock = Clock()
    policy, tokenizer = load(model)
    shared = {
        "model": policy,
        "train_dataset": rows,
        "processing_class": tokenizer,
        "peft_config": LoraConfig(r=8, target_modules="all-linear"),
        "callbacks": [clock],
    }
    made: Any
    if candidate in ("trl", "floor"):
        kind = DPOTrainer if candidate == "trl" else OneBackwardPerObjective
        made = kind(args=DPOConfig(**common), **shared)
    else:
        weights = {"outcome": 0.7, "short": 0.3}
        args = MultiObjectiveDPOConfig(weights=weights, method=candidate, **common)
        made = MultiObjectiveDPOTrainer(args=args, **shared)
    made.remove_callback(PrinterCallback)
    return made, clock


def seconds(model: str, *, precomputed: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of every candidate, trained in turn in an order that changes."""
    with tempfile.TemporaryDirectory() as folder:
        made = {
            name: trainer(name, model, precomputed=precomputed, folder=f"{folder}/{name}")
            for name in CANDIDATES
        }
        found: dict[str, list[float]] = {name: [] for name in CANDIDATES}
        for round_ in range(rounds + 1):
            shift = round_ % len(CANDIDATES)
            for name in CANDIDATES[shift:] + CANDIDATES[:shift]:
                candidate, clock = made[name]
                clock.seconds.clear()
                candidate.train()
                if round_:  # the first round warms up
                    found[name] += clock.seconds[1:]
    return found


def peak(candidate: str, model: str, precomputed: bool) -> int:
    """Peak bytes of a process that trains one candidate; of the GPU if there is one."""
    be_quiet()
    with tempfile.TemporaryDirectory() as folder:
        made, _ = trainer(candidate, model, precomputed=precomputed, folder=folder)
        made.train()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            made.train()
            return torch.cuda.max_memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        made.train()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def be_quiet() -> None:
    """One thread, and nothing printed but results."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    disable_progress_bars()


def measure(model: str, *, rounds: int) -> dict[str, Any]:
    """Time and memory of all candidates, with and without precomputed reference."""
    found = {}
    for precomputed in (False, True):
        times = seconds(model, precomputed=precomputed, rounds=rounds)
        bytes_ = {name: apart(peak, name, model, precomputed, seconds=3600) for name in CANDIDATES}
        found["precomputed reference" if precomputed else "reference in the step"] = {
            name: {
                "seconds": spread(times[name]),
                "over_trl": spread(
                    [mine / trl for mine, trl in zip(times[name], times["trl"], strict=True)]
                ),
                "peak_bytes": bytes_[name],
                "peak_over_trl": bytes_[name] / bytes_["trl"],
            }
            for name in CANDIDATES
        }
    return found


@refusals_of("alignment_cost")
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes benchmarks/results/alignment_cost.json."""
    parser = Parser(prog="python -m benchmarks.alignment_cost")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=6, help="turns (default: %(default)s)")
    options = parser.parse_args(arguments)
    be_quiet()
    found: dict[str, Any] = {}
    for model in options.models:
        found[model] = measure(model, rounds=options.rounds)
        for case, candidates in found[model].items():
            for name, values in candidates.items():
                print(
                    f"{model:8} {case:22} {name:7} {values['seconds']['median']:7.3f} s  "
                    f"x{values['over_trl']['median']:.2f}  {values['peak_bytes'] / 2**20:7.0f} MiB "
                    f"x{values['peak_over_trl']:.2f}"
                )
    results = {
        "what": f"one training step, {BATCH} pairs, LoRA r=8 on all linear layers, 2 objectives",
        "environment": environment(packages=("transformers", "trl", "peft")),
        "results": found,
    }
    print(write_results("alignment_cost", results))


if __name__ == "__main__":
    main()
