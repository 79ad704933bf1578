"""One backward pass for all objectives: time and memory of the gradient stage, and whole steps.

    python -m benchmarks.one_pass [--quick] [--device cuda]

The stage is measured against the weighted loss's one pass, and one pass for each objective; the
trainer's step, with clipping and AdamW, against that of TRL's `DPOTrainer` with one preference,
which is what weighted DPO costs there. All are run in turn in one process; the time is the CPU's,
of one thread, or that between two CUDA events. Random weights: the models have the shapes of
SmolLM2-135M and of a small Llama, all weights trained; and a net of wide layers. Peaks are those of
processes of their own.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import apart, environment, write_results
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
STEPS = 3  # of a trainer in its turn; the first is not counted


def now(device: str) -> Any:  # noqa: ANN401  # a number or an event
    """CPU time of this process, or an event after the accelerator's work so far."""
    if device == "cpu":
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start: Any, end: Any) -> float:  # noqa: ANN401
    """Seconds between two moments of `now`."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def llama(name: str) -> Any:  # noqa: ANN401  # transformers is not type-checked
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    shape = dict(zip(FIELDS, LLAMAS[name], strict=True))
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))


def build(
    name: str, pairs: int, tokens: int, checkpointing: bool, device: str
) -> tuple[nn.Module, Any]:
    """Returns a model and a function that gives the scalars of a batch."""
    torch.manual_seed(SEED)
    if name == "wide layers":
        layers = [layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
        net = nn.Sequential(*layers, nn.Linear(1024, 1)).to(device)
        x = torch.randn(2 * pairs, 1024).to(device)
        return net, lambda: net(x)[:, 0]
    from trl.trainer.utils import add_fused_lm_head

    from raco_optim.integrations.forward import completion_log_probs

    model = llama(name).train().to(device)
    add_fused_lm_head(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, model.config.vocab_size, (2 * pairs, tokens)).to(device)
    mask = torch.ones_like(ids)
    completions = (torch.arange(tokens, device=device) >= 8).expand_as(ids).long()
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": completions}
    return model, lambda: completion_log_probs(model, inputs)


def losses_of(z: Tensor, m: int) -> list[Tensor]:
    """DPO's losses for objectives that disagree."""
    chosen, rejected = z.chunk(2)
    generator = torch.Generator().manual_seed(SEED)
    signs = (torch.randint(0, 2, (m, len(chosen)), generator=generator) * 2.0 - 1).to(z.device)
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


def timed(case: Sequence[Any], device: str) -> dict[str, Any]:
    """Seconds of the three ways, in turn, and ratios of each repetition."""
    name, m, pairs, tokens, checkpointing, repetitions = case
    model, scores = build(name, pairs, tokens, checkpointing, device)
    run = stage(model, m)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for repetition in range(repetitions + 1):  # the first is not counted: it checks all layers
        for way in WAYS if repetition else ("one",):
            z = scores()
            start = now(device)
            found = run(way, z)
            if repetition:
                times[way].append(seconds(start, now(device)))
            del found, z
            gc.collect()
    result = dict(zip(("model", "m", "pairs", "tokens", "checkpointing"), case, strict=False))
    result["seconds"] = {way: spread(x) for way, x in times.items()}
    for other in ("weighted", "passes"):
        ratios = [a / b for a, b in zip(times["one"], times[other], strict=True)]
        result[f"one / {other}"] = spread(ratios)
    return result


def spread(x: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(x), "low": min(x), "high": max(x)}


def preferences(m: int, pairs: int) -> tuple[Any, Any]:
    """A data set of random words, 128 in a text, with m preferences; and its tokenizer."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", *(f"w{i}" for i in range(LLAMAS["small Llama"][0] - 2))]
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[2]))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token=words[0], eos_token=words[1]
    )
    draw = random.Random(SEED)
    lengths = {"prompt": 32, "chosen": 95, "rejected": 95}
    rows: list[dict[str, Any]] = [
        {name: " " + " ".join(draw.choices(words[2:], k=n)) for name, n in lengths.items()}
        | {f"pref_{i}": draw.choice((-1, 1)) for i in range(m)}
        for _ in range(pairs * STEPS)
    ]
    return Dataset.from_list(rows), tokenizer


def trainer(
    name: str, m: int, pairs: int, lora: bool, device: str, folder: str
) -> tuple[Any, list[float]]:
    """A trainer of all weights or adapters, TRL's own for m = 0, and the seconds of its steps."""
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from raco_optim.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer

    found: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not type-checked
        def on_step_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
            self.start = now(device)

        def on_step_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
            found.append(seconds(self.start, now(device)))

    options: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": pairs,
        "max_steps": STEPS,
        "precompute_ref_log_probs": True,
        "bf16": device != "cpu",
        "use_cpu": device == "cpu",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    if m:
        weights = {str(i): 1 / m for i in range(m)}
        options |= {"weights": weights, "method": "raco"}
    kind, config = (
        (MultiObjectiveDPOTrainer, MultiObjectiveDPOConfig) if m else (DPOTrainer, DPOConfig)
    )
    rows, tokenizer = preferences(m, pairs)
    made = kind(
        llama(name),
        args=config(**options),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear") if lora else None,
        callbacks=[Clock()],
    )
    made.remove_callback(PrinterCallback)
    return made, found


def steps(
    m: int, pairs: int, rounds: int, device: str, name: str = "small Llama", lora: bool = False
) -> dict[str, Any]:
    """Seconds of whole steps, and ratios, of our trainer and TRL's, which take turns."""
    times: dict[str, list[float]] = {"TRL": [], "one": []}
    with tempfile.TemporaryDirectory() as folder:
        made = {
            who: trainer(name, number, pairs, lora, device, f"{folder}/{who}")
            for who, number in (("TRL", 0), ("one", m))
        }
        for _ in range(rounds):
            for who, (candidate, found) in made.items():
                found.clear()
                candidate.train()
                times[who] += found[1:]
    ratios = [a / b for a, b in zip(times["one"], times["TRL"], strict=True)]
    what = f"{name}, whole step{' with LoRA' if lora else ''}"
    result: dict[str, Any] = {"model": what, "m": m, "pairs": pairs}
    result["seconds"] = {who: spread(x) for who, x in times.items()}
    return result | {"one / TRL": spread(ratios)}


def peak(way: str, m: int, device: str) -> float:
    """Peak of a second gradient stage over the model's memory, in MB, in a process of its own."""
    torch.set_num_threads(1)
    model, scores = build("small Llama", 4, 128, checkpointing=False, device=device)
    run = stage(model, m)

    def megabytes(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(field))

    on_cpu = device == "cpu"
    model_alone = megabytes("VmRSS") if on_cpu else torch.cuda.memory_allocated() / 2**20
    for _ in range(2):
        run(way, scores())
    most = megabytes("VmHWM") if on_cpu else torch.cuda.max_memory_allocated() / 2**20
    return most - model_alone


def main() -> None:
    """Runs the cases; a full run writes `benchmarks/results/one_pass.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three cases, and no memory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = [(*CASES[0][:-1], 1), CASES[4]] if given.quick else CASES
    results = []
    for case in cases:
        results.append(timed(case, given.device))
        print(json.dumps(results[-1]), flush=True)
    # Pairs of a batch, turns: a quick one counts from the second step on, without a warm turn.
    pairs, rounds = (1, 1) if given.quick else (4, 3)
    for m in (2,) if given.quick else (2, 4):
        results.append(steps(m, pairs, rounds, given.device))
        print(json.dumps(results[-1]), flush=True)
    memory = {}
    for m in () if given.quick else (2, 4):
        for way in WAYS:
            memory[f"{way}, m = {m}"] = round(apart(peak, way, m, given.device, seconds=300))
    print(json.dumps(memory))
    about = environment(seed=SEED, packages=("transformers", "trl"))
    if given.device != "cpu":
        about["accelerator"] = torch.cuda.get_device_name()
    if not given.quick:
        name = "one_pass" if given.device == "cpu" else f"one_pass_{given.device}"
        everything = {"about": about, "cases": results, "peak over the model, MB": memory}
        write_results(name, everything)


if __name__ == "__main__":
    main()
