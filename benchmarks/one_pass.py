"""One backward pass for all objectives: time and peak memory of the gradient stage.

    python -m benchmarks.one_pass [--quick] [--out one_pass.json]

Against the weighted loss's one pass, and one pass for each objective, in turn in one process, by
CPU time of one thread. Random weights: the models have the shapes of SmolLM2-135M and of a small
Llama, all weights trained; and a net of wide layers. Peaks are those of processes of their own.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import environment
from raco_optim import per_loss_gradients
from raco_optim.gradients.per_example import LayerGradients

SEED = 0
# Vocabulary, width, width of the MLP, layers, heads, heads of keys.
LLAMAS = {
    "small Llama": (8192, 384, 1024, 8, 6, 2),
    "SmolLM2-135M": (49152, 576, 1536, 30, 9, 3),
}
FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
# Model, objectives, pairs, tokens of a text, whether with checkpointing, timed repetitions.
CASES = [
    ("small Llama", 2, 4, 128, False, 2),
    ("small Llama", 4, 4, 128, False, 2),
    ("small Llama", 4, 4, 128, True, 2),
    ("small Llama", 4, 16, 32, False, 2),
    ("wide layers", 2, 64, 1, False, 9),
    ("wide layers", 4, 64, 1, False, 9),
    ("wide layers", 8, 64, 1, False, 9),
    ("SmolLM2-135M", 4, 2, 128, False, 1),
]
WAYS = ("weighted", "passes", "one")


def build(name: str, pairs: int, tokens: int, checkpointing: bool) -> tuple[nn.Module, Any]:
    """Returns a model and a function that gives the scalars of a batch."""
    torch.manual_seed(SEED)
    if name == "wide layers":
        layers = [layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
        net, x = nn.Sequential(*layers, nn.Linear(1024, 1)), torch.randn(2 * pairs, 1024)
        return net, lambda: net(x)[:, 0]
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    from raco_optim.integrations.forward import completion_log_probs

    model = LlamaForCausalLM(
        LlamaConfig(**dict(zip(FIELDS, LLAMAS[name], strict=True)), tie_word_embeddings=True)
    ).train()
    add_fused_lm_head(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, model.config.vocab_size, (2 * pairs, tokens))
    mask = torch.ones_like(ids)
    completions = (torch.arange(tokens) >= 8).expand_as(ids).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": completions}
    return model, lambda: completion_log_probs(model, inputs)


def losses_of(z: Tensor, m: int) -> list[Tensor]:
    """DPO's losses for objectives that disagree."""
    chosen, rejected = z.chunk(2)
    generator = torch.Generator().manual_seed(SEED)
    signs = torch.randint(0, 2, (m, len(chosen)), generator=generator) * 2.0 - 1
    return list(nn.functional.softplus(-0.1 * signs * (chosen - rejected)).mean(1))


def stage(model: nn.Module, m: int) -> Callable[[str, Tensor], object]:
    """Returns the gradient stage: a way and the scalars -> gradients."""
    parameters = list(model.parameters())
    layers = LayerGradients(model, parameters)
    names = [str(i) for i in range(m)]

    def run(way: str, z: Tensor) -> object:
        losses = losses_of(z, m)
        if way == "weighted":
            total = torch.stack(losses).mean()
            return torch.autograd.grad(total, parameters)
        if way == "passes":
            return per_loss_gradients(losses, parameters)
        rows, why = layers.gradients(z, losses, names, keep_graph=False)
        assert rows is not None and not why, why
        return rows

    return run


def timed(case: Sequence[Any]) -> dict[str, Any]:
    """CPU seconds of the three ways, in turn, and ratios of each repetition."""
    name, m, pairs, tokens, checkpointing, repetitions = case
    model, scores = build(name, pairs, tokens, checkpointing)
    run = stage(model, m)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repetition in range(repetitions + 1):  # the first is not counted: it checks all layers
        for way in WAYS if repetition else ("one",):
            z = scores()
            start = time.process_time()
            found = run(way, z)
            if repetition:
                seconds[way].append(time.process_time() - start)
            del found, z
            gc.collect()
    result = dict(zip(("model", "m", "pairs", "tokens", "checkpointing"), case, strict=False))
    result["seconds"] = {way: spread(x) for way, x in seconds.items()}
    for other in ("weighted", "passes"):
        ratios = [a / b for a, b in zip(seconds["one"], seconds[other], strict=True)]
        result[f"one / {other}"] = spread(ratios)
    return result


def spread(x: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(x), "low": min(x), "high": max(x)}


def peak(way: str, m: int) -> float:
    """Peak of a second gradient stage over the model's memory, in MB, in a process of its own."""
    model, scores = build("small Llama", 4, 128, checkpointing=False)
    run = stage(model, m)

    def megabytes(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(field))

    model_alone = megabytes("VmRSS")
    for _ in range(2):
        run(way, scores())
    return megabytes("VmHWM") - model_alone


def main() -> None:
    """Runs the cases and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two cases, and no memory")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--peak", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        way, m = given.peak.split(",")
        print(peak(way, int(m)))
        return
    cases = [CASES[0], CASES[4]] if given.quick else CASES
    results = []
    for case in cases:
        results.append(timed(case))
        print(json.dumps(results[-1]), flush=True)
    memory = {}
    for m in () if given.quick else (2, 4):
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.one_pass", "--peak", f"{way},{m}"]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            memory[f"{way}, m = {m}"] = round(float(found))
    print(json.dumps(memory))
    about = environment(seed=SEED, packages=("transformers", "trl"))
    if given.out is not None:
        everything = {"about": about, "cases": results, "peak over the model, MB": memory}
        given.out.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
