"""What does a step of the trainer cost beside a step of TRL's own?

    python -m benchmarks.alignment_cost

Each candidate is a Trainer with LoRA on all linear layers; they train a few steps at a time, in
turn, on the same pairs. Peak memory is that of a process with one candidate alone.

- ``trl``: TRL's `DPOTrainer`, one preference: what weighted DPO costs there;
- ``floor``: the same with one backward pass per objective instead of one, and nothing else;
- ``linear``, ``raco``: `MultiObjectiveDPOTrainer` with two objectives.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from trl import DPOTrainer

from benchmarks import smollm2
from benchmarks.demo.data import OBJECTIVES, load_papers, sample_pairs
from benchmarks.demo.model import train_tokenizer
from benchmarks.harness import Parser, apart, environment, refusals_of, spread, write_results
from benchmarks.trainers import STEPS, make_trainer, resident_bytes, seconds_of_steps
from raco_optim.integrations.trl import MultiObjectiveDPOTrainer

CANDIDATES = ("trl", "floor", "linear", "raco")
MODELS = ("random", "smollm2")
BATCH, ROUNDS = 4, 6


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


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M, or a Llama of 12 M parameters with random weights and a vocabulary of 8192."""
    if name == "smollm2":
        return smollm2.load()
    texts = [text for paper in load_papers("train") for text in paper.get_all_sentences()]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(texts, vocab_size=8192),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
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


def trainer(candidate: str, model: str, precomputed: bool, folder: str) -> DPOTrainer:
    """Makes a candidate's Trainer."""
    papers = load_papers("train")
    titles = {paper.id: paper.title for paper in papers}
    rows = [
        {
            "prompt": f'A sentence from the paper "{titles[pair.paper]}":',
            "chosen": f" {pair.first}",
            "rejected": f" {pair.second}",
            **{f"pref_{x}": sign for x, sign in zip(OBJECTIVES, pair.signs, strict=True)},
        }
        for pair in sample_pairs(papers, BATCH * STEPS, random.Random(0))
    ]
    kinds = {"trl": DPOTrainer, "floor": OneBackwardPerObjective}
    ours = {"weights": {"outcome": 0.7, "short": 0.3}, "method": candidate}
    return make_trainer(
        kinds.get(candidate, MultiObjectiveDPOTrainer),
        load(model),
        rows,
        "cuda" if torch.cuda.is_available() else "cpu",
        lora=True,
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        precompute_ref_log_probs=precomputed,
        **({} if candidate in kinds else ours),
    )


def peak(candidate: str, model: str, precomputed: bool) -> int:
    """Peak bytes of a process that trains one candidate; of the GPU if there is one."""
    be_quiet()
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(candidate, model, precomputed, folder)
        made.train()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            made.train()
            return torch.cuda.max_memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        made.train()
    return resident_bytes("VmHWM")


def be_quiet() -> None:
    """One thread, and nothing printed but results."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    disable_progress_bars()


def measure(model: str, precomputed: bool, rounds: int) -> dict[str, Any]:
    """Time and memory of all candidates."""
    with tempfile.TemporaryDirectory() as folder:
        made = {x: trainer(x, model, precomputed, f"{folder}/{x}") for x in CANDIDATES}
        seconds = seconds_of_steps(made, rounds)
    peaks = {x: apart(peak, x, model, precomputed, seconds=3600) for x in CANDIDATES}
    return {
        name: {
            "seconds": spread(seconds[name]),
            "over_trl": spread([a / b for a, b in zip(seconds[name], seconds["trl"], strict=True)]),
            "peak_bytes": peaks[name],
            "peak_over_trl": peaks[name] / peaks["trl"],
        }
        for name in CANDIDATES
    }


@refusals_of("alignment_cost")
def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a line a candidate and writes benchmarks/results/alignment_cost.json."""
    parser = Parser(prog="python -m benchmarks.alignment_cost")
    parser.add_argument("--quick", action="store_true", help="the small model, not written")
    options = parser.parse_args(arguments)
    be_quiet()
    models, rounds = (MODELS[:1], 1) if options.quick else (MODELS, ROUNDS)
    found: dict[str, Any] = {}
    for model in models:
        found[model] = {}
        for precomputed in (False, True):
            case = "precomputed reference" if precomputed else "reference in the step"
            found[model][case] = measure(model, precomputed, rounds)
            for name, values in found[model][case].items():
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
    if not options.quick:
        print(f"Written to {write_results('alignment_cost', results)}.")


if __name__ == "__main__":
    main()
