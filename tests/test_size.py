"""docs/size.md: its formulas are held to what small models compute, hold and send."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from trl.trainer.utils import add_fused_lm_head

from benchmarks import size
from benchmarks.harness import filled
from benchmarks.size import MODELS, Shapes, Step, Way, memory, operations, shapes_of, wire
from raco_optim import per_loss_gradients
from raco_optim.cli.arguments import check_silenced, parse
from raco_optim.gradients import dense
from raco_optim.gradients.per_example import LayerGradients, one_pass
from raco_optim.integrations.forward import completion_log_probs
from raco_optim.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
from tests import test_trl_trainer as base
from tests.ranks import Ranks
from tests.test_trl_distributed import launched
from tests.test_trl_sharded import FSDP, fsdp_on_cpus
from tests.tiny_language_models import tiny_pairs, tiny_tokenizer

pytestmark = base.pytestmark
offline, settings = base.offline, base.settings

SHAPE: dict[str, Any] = {
    "vocab_size": 97,  # FSDP2 pads it
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "shallow": LlamaConfig(**SHAPE | {"num_hidden_layers": 1}, tie_word_embeddings=False),
}
PAIRS, TOKENS = 3, 24


@cache
def shapes(family: str, lora: int) -> Shapes:
    return shapes_of(TINY[family], lora)


@pytest.fixture(scope="module")
def page() -> tuple[str, dict[str, str]]:
    """The page, and its tables as the program has them now."""
    text = size.PAGE.read_text()
    return text, dict(size.blocks_of_the_page())


def test_page_has_the_tables_of_the_program(page: tuple[str, dict[str, str]]) -> None:
    text, tables = page
    assert filled(text, tables.items()) == text
    assert all(table in text for table in tables.values())


def test_published_numbers_of_parameters() -> None:
    """Of the files on the hub, and of adapters of rank 16 for Llama-3-8B, as peft prints them."""
    llama, qwen = shapes_of(MODELS["Llama-3-8B"], 16), shapes_of(MODELS["Qwen3-4B"])
    assert (llama.n - llama.adapters, llama.adapters) == (8_030_261_248, 41_943_040)
    assert (qwen.n, qwen.n - qwen.head) == (4_022_468_096, 3_633_511_936)


def test_commands_of_the_page(page: tuple[str, dict[str, str]]) -> None:
    """Their options exist, and none silences another."""
    text = page[0].replace("\\\n", " ")
    commands = re.findall(r"(?:raco-optim|-m raco_optim\.cli) align \.\.\. (.*)", text)
    assert len(commands) == 4
    given = "--model m --data d.jsonl --weights a=0.5,b=0.5 --output_dir o --use_cpu true"
    for options in commands:
        parsed = parse([*given.split(), *options.split()], "raco-optim align")
        check_silenced([parsed])
        is_lora = "--use_peft" in options
        assert (parsed.model.use_peft, bool(parsed.config.fsdp)) == (is_lora, "--fsdp" in options)
        assert parsed.model.dtype == ("bfloat16" if is_lora else "float32")


# --- Operations ----------------------------------------------------------------------------------


def tiny(family: str, lora: int, *, checkpointing: bool) -> nn.Module:
    torch.manual_seed(0)
    # Attention by products that are counted.
    model = AutoModelForCausalLM.from_config(TINY[family], attn_implementation="eager").train()
    add_fused_lm_head(model)
    if lora:
        model = get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear"))
        model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def losses(model: nn.Module, m: int, tokens: int = TOKENS) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities, and m losses of preferences that disagree."""
    ids = torch.randint(3, 97, (2 * PAIRS, tokens))
    scored = torch.ones_like(ids)
    scored[:, 0] = 0
    there = torch.ones_like(ids)
    there[0, -1] = 0  # so that there is a mask
    batch = {"input_ids": ids, "attention_mask": there, "completion_mask": scored}
    z = completion_log_probs(model, batch)
    chosen, rejected = z.chunk(2)
    signs = torch.tensor([[1, 1, -1], [1, -1, 1], [-1, 1, 1]])[:m]
    return z, list(nn.functional.softplus(-0.1 * signs * (chosen - rejected)).mean(1))


def counted(run: Callable[[], object]) -> int:
    """Operations of matrix products; torch's counter does not know the ones in place."""

    def in_place(_: Any, left: Any, right: Any, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})
    with counter:
        run()
    return int(counter.get_total_flops())


def gradients(model: nn.Module, way: Way, m: int) -> Callable[[], object]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    layers = LayerGradients(model, parameters) if way == "one" else None
    if layers is not None:
        layers._hooked = lambda _: False  # type: ignore[method-assign]  # by torch's counter

    def run() -> None:
        z, found = losses(model, m)
        if layers is not None:
            rows, why = layers.gradients(z, found, ["a", "b", "c"][:m], keep_graph=False)
            assert rows is not None and not why
        elif way == "passes":
            per_loss_gradients(found, parameters)
        else:
            torch.autograd.grad(sum(found), parameters)  # type: ignore[arg-type]

    return run


@pytest.mark.parametrize("way", ["weighted", "passes", "one"])
@pytest.mark.parametrize(
    ("family", "lora", "checkpointing"),
    [("llama", 0, False), ("llama", 0, True), ("qwen3", 0, True), ("llama", 4, True)],
)
def test_operations(
    monkeypatch: pytest.MonkeyPatch, family: str, lora: int, checkpointing: bool, way: Way
) -> None:
    monkeypatch.setattr(one_pass, "_SHARE", 0.0)
    monkeypatch.setattr(size, "CHECKED", 0.0)
    step = Step(1 if way == "weighted" else 3, way, lora, 1, PAIRS, TOKENS, checkpointing)
    run = gradients(tiny(family, lora, checkpointing=checkpointing), way, 3)
    if way == "one":
        counted(run)  # the first one checks all layers
    # Input gradients of the first layer, below which nothing is trained, are left out.
    allowed = 0.04 if lora else 0.002
    assert counted(run) == pytest.approx(operations(shapes(family, lora), step), rel=allowed)


def test_operations_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over so many steps that each parameter has had its turn; the head's is not compared."""
    assert size.CHECKED == one_pass._SHARE
    monkeypatch.setattr(one_pass, "_AGAIN", ())
    step = Step(2, "one", 0, 1, PAIRS, TOKENS, checkpointing=False)
    run = gradients(tiny("shallow", 0, checkpointing=False), "one", 2)
    counted(run)
    steps = round(1 / size.CHECKED)
    mean = sum(counted(run) for _ in range(steps)) / steps
    of_model = shapes("shallow", 0)
    with mock.patch.object(size, "CHECKED", 0.0):
        bare = operations(of_model, step)
    assert mean - bare == pytest.approx(operations(of_model, step) - bare, rel=0.3)


# --- Bytes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A training, and the step that it should be."""

    family: str
    step: Step
    settings: dict[str, Any]


M = {2: "a=0.5,b=0.5", 3: "a=0.5,b=0.3,c=0.2"}
REFERENCE_FREE = {"loss_type": "simpo"}
CASES = {
    "one process, all weights": Case("qwen3", Step(3, "one"), {}),
    "one process, adapters": Case("llama", Step(2, "one", lora=4), {}),
    "DDP, adapters": Case("llama", Step(2, "one", lora=4, ranks=2), {}),
    "FSDP2, m passes": Case(
        "llama", Step(3, "passes", ranks=2, reference=True), {"gradients": "dense"} | FSDP
    ),
    "FSDP2, one pass": Case("qwen3", Step(2, "one", ranks=2), FSDP),
    "FSDP2, weighted": Case("qwen3", Step(1, "weighted", ranks=2), {"method": "linear"} | FSDP),
}


class Sent(TorchDispatchMode):
    """Counts the bytes that this process sends of large messages, in a ring."""

    SHARES = {  # what a process passes on, R - 1 times
        "_allgather_base_": lambda args, _: args[1].nbytes,
        "_reduce_scatter_base_": lambda args, _: args[0].nbytes,
        "reduce_scatter_tensor": lambda _, result: result.nbytes,
        "alltoall_base_": lambda args, number: args[1].nbytes // number,
        "allgather_": lambda args, _: args[1][0].nbytes,
    }

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.bytes = number, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name().split("::")[-1]
        if name in self.SHARES:
            other = result if name == "reduce_scatter_tensor" else self.number
            self.bytes += (self.number - 1) * self.SHARES[name](args, other)
        return result


def local_bytes(tensors: Iterable[Any]) -> int:
    return sum(x.to_local().nbytes if isinstance(x, DTensor) else x.nbytes for x in tensors)


def trained(rank: int | None, case: Case, settings: dict[str, Any], folder: Path) -> dict[str, int]:
    """Makes two steps, and returns the bytes that the second sends, and what is held."""
    step, rows = case.step, [0]
    settings = settings | case.settings | {"weights": M[max(2, step.objectives)], "bf16": True}
    settings |= {"gradient_checkpointing": step.checkpointing, "per_device_train_batch_size": 2}
    if not step.reference:
        settings |= REFERENCE_FREE
    if step.lora:
        settings["model_init_kwargs"] = {"dtype": "bfloat16"}
    combine = dense.DenseGradients.combine

    def watched(self: Any, *args: Any) -> Any:
        rows[0] = local_bytes(g for row in self.rows for g in row if g is not None)
        return combine(self, *args)

    pairs = Dataset.from_list(tiny_pairs(8, ("a", "b", "c")[: max(2, step.objectives)]))
    with (
        launched(rank),
        fsdp_on_cpus(),
        mock.patch.object(dense.DenseGradients, "combine", watched),
    ):
        trainer = MultiObjectiveDPOTrainer(
            str(folder / case.family),
            args=MultiObjectiveDPOConfig(**settings),
            train_dataset=pairs,
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=step.lora, target_modules="all-linear") if step.lora else None,
        )
        one_step, sent = trainer.training_step, Sent(step.ranks)

        def counting(*args: Any, **others: Any) -> Tensor:
            sent.bytes = 0
            with sent:
                return one_step(*args, **others)

        trainer.training_step = counting
        trainer.train()
    state = trainer.optimizer.state.values()
    return {
        "sent": sent.bytes,
        "weights": local_bytes(trainer.model.parameters()),
        "optimizer": local_bytes(x for values in state for x in values.values()),
        "gradients": rows[0],
    }


@pytest.mark.parametrize("name", CASES)
def test_bytes(two_ranks: Ranks, settings: dict[str, Any], tmp_path: Path, name: str) -> None:
    case = CASES[name]
    AutoModelForCausalLM.from_config(TINY[case.family]).save_pretrained(tmp_path / case.family)
    if case.step.ranks > 1:
        found = two_ranks.run(trained, case, settings, tmp_path)[0]
    else:
        found = trained(None, case, settings, tmp_path)
    step, of_model = case.step, shapes(case.family, case.step.lora)
    expected: dict[str, float] = memory(of_model, step) | {"sent": wire(of_model, step)}
    if step.way == "weighted" or (step.lora and step.ranks > 1):
        found.pop("gradients")  # which are in .grad, or cut otherwise and on their way
    assert found == {key: expected[key] for key in found}


def bytes_saved(config: Any, lora: int, dtype: torch.dtype, tokens: int, *, autocast: bool) -> int:
    """What autograd saves in the forward pass of a whole model, with real tensors."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    add_fused_lm_head(model)
    if lora:
        model = get_peft_model(model, LoraConfig(r=lora, target_modules="all-linear"))
        model.enable_input_require_grads()
    kept: dict[int, Tensor] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage()._cdata] = saved
        return saved

    with (
        saved_tensors_hooks(pack, lambda saved: saved),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        scores, _ = losses(model, 2, tokens)
    assert scores.requires_grad
    return sum(saved.untyped_storage().nbytes() for saved in kept.values())


@pytest.mark.parametrize(
    ("family", "lora", "dtype", "autocast"),
    [
        ("llama", 0, torch.float32, True),
        ("qwen3", 0, torch.bfloat16, False),
        ("llama", 4, torch.bfloat16, True),
    ],
)
def test_activations(family: str, lora: int, dtype: torch.dtype, autocast: bool) -> None:
    """What a layer and a token more cost: the weights, too, are among what is saved."""

    def of_token(layers: int) -> float:
        config = type(TINY[family])(**SHAPE | {"num_hidden_layers": layers})
        short, long = (
            bytes_saved(config, lora, dtype, tokens, autocast=autocast)
            for tokens in (TOKENS, 2 * TOKENS)
        )
        return (long - short) / (2 * PAIRS * TOKENS)

    found = shapes(family, lora).saved if autocast else shapes(family, lora).saved_sharded
    mask = 2 * (2 * TOKENS + TOKENS)  # of bfloat16, and quadratic in the tokens
    assert found == (pytest.approx(of_token(3) - of_token(2) - mask, rel=0.02), dtype.itemsize)
