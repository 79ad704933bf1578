"""One backward pass for all objectives: time and memory of the gradient stage, and whole steps.

    python -m benchmarks.one_pass [--quick] [--device cuda]

The stage is measured against the weighted loss's one pass, and one pass for each objective; the
trainer's step, with clipping and AdamW, against that of TRL's `DPOTrainer` with one preference,
which is what weighted DPO costs there. All are run in turn in one process on one thread. Random
weights: the models have the shapes of SmolLM2-135M and of a small Llama, all weights trained; and a
net of wide layers. Peaks are those of processes of their own.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    Parser,
    apart,
    check_device,
    clock_of,
    environment,
    refusals_of,
    write_results,
)
from raco_optim import per_loss_gradients
from raco_optim.gradients.per_example import LayerGradients

SEED = 0
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
            return torch.autograd.grad(torch.stack(losses).mean(), parameters)
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
    run, clock = stage(model, m), clock_of(device)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for repetition in range(repetitions + 1):  # the first is not counted: it checks all layers
        for way in WAYS if repetition else ("one",):
            z = scores()
            start = clock()
            found = run(way, z)
            if repetition:
                times[way].append(clock() - start)
            del found, z
            gc.collect()
    result = dict(zip(("model", "m", "pairs", "tokens", "checkpointing"), case, strict=False))
    return result | _ratios(times, ("weighted", "passes"))


def _ratios(times: dict[str, list[float]], others: Sequence[str]) -> dict[str, Any]:
    """Seconds of each way, and how many times as long as the others one pass takes."""

    def spread(x: list[float]) -> dict[str, float]:
        return {"median": statistics.median(x), "low": min(x), "high": max(x)}

    found: dict[str, Any] = {"seconds": {way: spread(x) for way, x in times.items()}}
    for other in others:
        ratios = [a / b for a, b in zip(times["one"], times[other], strict=True)]
        found[f"one / {other}"] = spread(ratios)
    return found


def preferences(m: int, pairs: int) -> tuple[list[dict[str, Any]], Any]:
    """Rows of random words, 128 in a text, with m preferences; and their tokenizer."""
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
        for _ in range(pairs)
    ]
    return rows, tokenizer


def steps(
    m: int, pairs: int, rounds: int, device: str, name: str = "small Llama", lora: bool = False
) -> dict[str, Any]:
    """Seconds of whole steps, and ratios, of our trainer and TRL's, which take turns."""
    from trl import DPOTrainer

    from benchmarks.trainers import STEPS, make_trainer, seconds_of_steps  # needs peft
    from raco_optim.integrations.trl import MultiObjectiveDPOTrainer

    ours = {"weights": {str(i): 1 / m for i in range(m)}, "method": "raco"}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for who, kind, settings, number in (
            ("TRL", DPOTrainer, {}, 0),
            ("one", MultiObjectiveDPOTrainer, ours, m),
        ):
            rows, tokenizer = preferences(number, pairs * STEPS)
            trainers[who] = make_trainer(
                kind,
                (llama(name), tokenizer),
                rows,
                device,
                lora=lora,
                output_dir=f"{folder}/{who}",
                per_device_train_batch_size=pairs,
                precompute_ref_log_probs=True,
                **settings,
            )
        times = seconds_of_steps(trainers, rounds)
    what = f"{name}, whole step{' with LoRA' if lora else ''}"
    return {"model": what, "m": m, "pairs": pairs} | _ratios(times, ("TRL",))


def peak(way: str, m: int, device: str) -> float:
    """Peak of a second gradient stage over the model's memory, in MB, in a process of its own."""
    from benchmarks.trainers import resident_bytes

    torch.set_num_threads(1)
    model, scores = build("small Llama", 4, 128, checkpointing=False, device=device)
    run = stage(model, m)
    on_cpu = device == "cpu"
    model_alone = resident_bytes("VmRSS") if on_cpu else torch.cuda.memory_allocated()
    for _ in range(2):
        run(way, scores())
    most = resident_bytes("VmHWM") if on_cpu else torch.cuda.max_memory_allocated()
    return (most - model_alone) / 2**20


@refusals_of("one_pass")
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the cases; a full run writes `benchmarks/results/one_pass.json`."""
    parser = Parser(prog="python -m benchmarks.one_pass")
    parser.add_argument("--quick", action="store_true", help="three cases, and no memory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = parser.parse_args(arguments)
    check_device(given.device)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = []

    def add(result: dict[str, Any]) -> None:
        results.append(result)
        print(json.dumps(result), flush=True)

    for case in [(*CASES[0][:-1], 1), CASES[4]] if given.quick else CASES:
        add(timed(case, given.device))
    if given.quick:
        add(steps(2, 1, 1, given.device))
        return
    for m in (2, 4):
        add(steps(m, 4, 3, given.device))
    memory = {
        f"{way}, m = {m}": round(apart(peak, way, m, given.device, seconds=300))
        for m in (2, 4)
        for way in WAYS
    }
    print(json.dumps(memory))
    about = environment(seed=SEED, packages=("transformers", "trl"))
    if given.device != "cpu":
        about["accelerator"] = torch.cuda.get_device_name()
    everything = {"about": about, "cases": results, "peak over the model, MB": memory}
    write_results("one_pass" if given.device == "cpu" else "one_pass_cuda", everything)


if __name__ == "__main__":
    main()
