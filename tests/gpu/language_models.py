"""What language models must do on a device: more bodies for `tests.gpu.checks`.

They need transformers, and most of them TRL; without these they are left out.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raco_optim import gram_matrix
from raco_optim.gradients.per_example import LayerGradients
from tests.gpu.checks import LeftOut, check, kind_of

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", GROUPED | {"attention_bias": True, "tie_word_embeddings": False}),
    "llama3": ("Llama", GROUPED | {"tie_word_embeddings": False}),
    "gemma3": ("Gemma3Text", GROUPED | {"sliding_window": 8, "final_logit_softcapping": 5.0}),
    "phi3": ("Phi3", SHAPE | {"tie_word_embeddings": False}),
    "phi": ("Phi", SHAPE),  # whose head has a bias
    "gpt-neox": ("GPTNeoX", SHAPE),
    "gpt2": ("GPT2", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}),
}
SIGNS = [[1, -1, 1, 1], [1, 1, -1, 1], [-1, 1, 1, -1], [1, 1, 1, -1.0]]
NAMES = ["a", "b", "c", "d"]


def model_of(family: str) -> nn.Module:
    """A small model with random weights, no dropout, and TRL's head."""
    import transformers
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    name, shape = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    add_fused_lm_head(model.train())
    return model


def batch(device: str = "cpu") -> dict[str, Tensor]:
    """Four pairs of texts of many lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (8, 14), generator=generator)
    there = torch.arange(14) < torch.tensor([14, 9, 12, 14, 7, 14, 10, 13])[:, None]
    inputs = {
        "input_ids": ids.where(there, 0),
        "attention_mask": there.long(),
        "completion_mask": (there & (torch.arange(14) >= 4)).long(),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def losses(z: Tensor, kind: str) -> list[Tensor]:
    """Losses that disagree, of pairs or of the texts alone."""
    signs = torch.tensor(SIGNS, device=z.device)
    chosen, rejected = z.chunk(2)
    if kind == "pairs":
        return list(nn.functional.softplus(-0.1 * signs * (chosen - rejected)).mean(1))
    return list((signs * chosen / 9).sigmoid().mean(1) - 0.7 * rejected.tanh().mean())


def needs(device: str, *packages: str) -> None:
    """Leaves a check out where a package is missing, and on the simulated device."""
    if kind_of(device) not in ("cpu", "cuda"):
        raise LeftOut("the simulated device has a tensor class of its own")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise LeftOut(f"{' and '.join(missing)} not installed")


# -- One pass -------------------------------------------------------------------------------------


def _one_pass(device: str, family: str, dtype: torch.dtype) -> None:
    """One pass is as near to the gradients in float64 as one pass for each loss is."""
    needs(device, "transformers", "trl")
    from raco_optim.integrations.forward import completion_log_probs

    model = model_of(family)
    true = _each(copy.deepcopy(model).double(), batch())
    model.to(device)
    parameters = list(model.parameters())
    rounded = dtype != torch.float32
    amp = torch.autocast(kind_of(device), dtype) if rounded else contextlib.nullcontext()
    with amp:
        each = _each(model, batch(device))
        layers = LayerGradients(model, parameters)
        z = completion_log_probs(model, batch(device))
        rows, why = layers.gradients(z, losses(z, "pairs"), NAMES)
    assert rows is not None and (not why or family == "gpt2"), why
    ours, theirs = (_on_a_host(x) for x in (rows, each))
    sizes = [math.sqrt(sum(float(g.square().sum()) for g in row)) for row in true]
    off, off_of_passes = (_distances(x, true, sizes) for x in (ours, theirs))
    bound = 1.3 * off_of_passes + (0.0 if rounded else 1e-5)
    assert off <= bound, (
        f"gradients are off by {off:.1e}, those of each loss by {off_of_passes:.1e}"
    )
    if not rounded:
        scale = torch.tensor(sizes, dtype=torch.float64)
        error = (gram_matrix(ours) - gram_matrix(theirs)) / scale / scale[:, None]
        assert error.abs().max() <= 1e-5, f"the Gram matrix is off by {error.abs().max():.1e}"


def _each(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    from raco_optim.integrations.forward import completion_log_probs

    of_losses = losses(completion_log_probs(model, inputs), "pairs")
    parameters = list(model.parameters())
    return [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in of_losses]


def _on_a_host(rows: Any) -> list[list[Tensor]]:
    return [[g.detach().cpu().double() for g in row] for row in rows]


def _distances(rows: Any, true: Any, sizes: list[float]) -> float:
    """The largest distance of a loss's gradient from the true one, over its norm."""
    return max(
        math.sqrt(sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True))) / size
        for a, b, size in zip(rows, true, sizes, strict=True)
    )


for _family in FAMILIES:
    for _dtype in (torch.float32, torch.bfloat16):
        _name = f"{_family}, {str(_dtype).removeprefix('torch.')}"
        check("families", _name, family=_family, dtype=_dtype)(_one_pass)


# -- Memory ---------------------------------------------------------------------------------------


def peaks(device: str, m: int) -> dict[str, float]:
    """Peaks of the gradient stage in MB, by the allocator's count: one pass, and m passes."""
    from benchmarks.one_pass import build, stage
    from benchmarks.step_cost_memory import measure_memory

    case = ("small Llama", 2, 16) if device == "cpu" else ("SmolLM2-135M", 4, 128)
    model, scores = build(*case, checkpointing=False, device=device)
    run = stage(model, m)
    found = {}
    for way in ("passes", "one"):
        measured = measure_memory(lambda w=way: run(w, scores()), lambda: None, device=device)
        found[way] = round(sum(measured) / 2**20)
    return found


def _memory(device: str, m: int) -> None:
    """The peak of one pass for all weights is at most that of m passes, and a tenth."""
    needs(device, "transformers", "trl")
    if device == "cpu" and m != 2:
        raise LeftOut("one m will do on a CPU")
    found = peaks(device, m)
    assert found["one"] <= 1.1 * found["passes"], f"{found} MB"


for _m in (2, 4):
    check("memory", f"one pass, m = {_m}", m=_m)(_memory)


# -- The trainer with FSDP2 -----------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {"full": {}, "LoRA": {"lora": True}, "bfloat16": {"bf16": True}}


def train(
    rank: int | None, number: int, device: str, case: str, sharded: bool, folder: str
) -> list[Tensor]:
    """Trains in one of the processes of a group, or in none; returns parameters and first loss.

    With FSDP2 if `sharded`; else in one process, whose batches are those of all. The model is in
    the folder.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from torch.distributed.tensor import DTensor

    from raco_optim.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
    from tests.tiny_language_models import tiny_pairs, tiny_tokenizer

    settings = dict(CASES[case])
    lora = LoraConfig(r=2, target_modules="all-linear") if settings.pop("lora", False) else None
    if sharded:
        settings |= {"fsdp": True, "fsdp_config": {"version": 2}}
    told = {}
    if rank is not None:  # what torchrun would say
        ranks = dist.get_world_size()
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    with mock.patch.dict(os.environ, {name: str(x) for name, x in told.items()}):
        config = MultiObjectiveDPOConfig(
            **{"bf16": False} | settings,
            output_dir=f"{folder}/{case}-{sharded}",
            weights={"helpful": 0.7, "harmless": 0.3},
            per_device_train_batch_size=2 if sharded else 2 * number,
            max_steps=3,
            learning_rate=1e-2,
            adam_epsilon=1e-3,
            use_cpu=device == "cpu",
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        torch.manual_seed(0)
        trainer = MultiObjectiveDPOTrainer(
            f"{folder}/model",
            args=config,
            train_dataset=Dataset.from_list(tiny_pairs(6 * number, seed=3)),
            processing_class=tiny_tokenizer(),
            peft_config=lora,
        )
        trainer.train()
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    assert any(isinstance(p, DTensor) for p in parameters) == sharded
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return [torch.cat([p.detach().float().cpu().flatten() for p in whole]), torch.tensor(first)]


def assert_trained_alike(results: list[list[Tensor]], alone: list[Tensor], case: str) -> None:
    """The ranks are equal to the bit, train as one process does, and begin with log 2."""
    rounded = case == "bfloat16"
    for parameters, first in results:
        assert torch.equal(parameters, results[0][0])
        assert abs(float(first) - math.log(2)) < 1e-5, f"the first loss is {float(first)}"
    error = float((results[0][0] - alone[0]).norm() / alone[0].norm())
    assert error <= (0.05 if rounded else 1e-4), f"the parameters are off by {error:.1e}"


def _process(rank: int, number: int, *arguments: Any) -> None:
    device, case, sharded, folder = arguments
    ranks = number if sharded else 1
    if device == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store-{sharded}", ranks)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    torch.save(train(rank, number, *arguments), f"{folder}/{sharded}-{rank}")
    dist.barrier()
    dist.destroy_process_group()


def _trainer(device: str, case: str) -> None:
    needs(device, "transformers", "trl", "peft")
    if device == "cpu":
        raise LeftOut("Accelerate shards on accelerators; test_gpu.py shards on the CPU")
    from tests.tiny_language_models import tiny_model

    number = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        tiny_model().save_pretrained(f"{folder}/model")
        for sharded, ranks in ((True, number), (False, 1)):
            arguments = (number, device, case, sharded, folder)
            torch.multiprocessing.spawn(_process, arguments, ranks)
        results = [torch.load(Path(folder, f"True-{rank}")) for rank in range(number)]
        assert_trained_alike(results, torch.load(Path(folder, "False-0")), case)


for _case in CASES:
    check("trainer", f"FSDP2, {_case}", case=_case)(_trainer)
