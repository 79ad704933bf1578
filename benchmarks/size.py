"""What does a training step cost at full size? Memory, bytes on the wire and time, on paper.

    python -m benchmarks.size            # fills the tables of docs/size.md

Nothing of that size is run. Shapes come from the model classes of transformers and peft, without
values (on the meta device); `operations`, `memory` and `wire` are formulas, which tests/test_size.py
compares with what small models really compute, hold and send.

The step is that of `MultiObjectiveDPOTrainer` with AdamW and bf16=True. All weights are trained from
float32 values: in one process under autocast, in several by FSDP2, which shards them and computes in
bfloat16. Adapters are of float32 on a model of bfloat16; every process holds all of it (DDP).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.initialization import no_init_weights

from benchmarks.harness import filled, markdown_table, write_whole

# The config.json of meta-llama/Meta-Llama-3-8B and of Qwen/Qwen3-4B.
MODELS: dict[str, Any] = {
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
    "Qwen3-4B": Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
}
PAGE = Path(__file__).parents[1] / "docs/size.md"
GPU = 80e9  # bytes; a card of "80 GB" has 85e9, the rest is for CUDA, NCCL and fragmentation
RANK = 16  # of the adapters: the default of --lora_r
# As docs/distributed.md: reached in products; a GPU's link within a node of 8, and between nodes.
FLOPS, LINK, NETWORK = 400e12, 450e9, 50e9
TILE = 4096 * 32768  # logits that TRL's fused head computes at a time
BLOCK = 2**26  # numbers of the per-example products that one pass computes at a time
CHECKED = 0.02  # share of the weights that one pass compares with autograd's, each step

Way = Literal["weighted", "passes", "one"]


@dataclass(frozen=True)
class Step:
    """A training step of one process.

    Args:
        objectives: m; 1 for weighted DPO.
        way: One backward pass of the weighted loss, m passes, or one pass for all m gradients.
        lora: Rank of adapters of all linear layers; 0 where all weights are trained.
        ranks: Processes, each with a GPU; with all weights trained they share the model by FSDP2.
        pairs: Pairs in the batch of one process.
        tokens: Tokens of a text, of which a pair has two.
        checkpointing: Whether layers are computed again in the backward pass.
        reference: Whether a reference model is held and run, rather than computed beforehand.
    """

    objectives: int = 1
    way: Way = "weighted"
    lora: int = 0
    ranks: int = 1
    pairs: int = 8
    tokens: int = 1024
    checkpointing: bool = True
    reference: bool = False

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the model."""
        return self.ranks > 1 and not self.lora

    @property
    def rows(self) -> int:
        """Tokens in the batch."""
        return 2 * self.pairs * self.tokens

    @property
    def scored(self) -> int:
        """Tokens whose log-probability counts: at most all but the first of a text."""
        return self.rows - 2 * self.pairs

    @property
    def passes(self) -> int:
        """Backward passes."""
        return self.objectives if self.way == "passes" else 1


@dataclass(frozen=True)
class Shapes:
    """Numbers of parameters; see `shapes_of`."""

    all: list[tuple[int, ...]]
    trained: list[tuple[int, ...]]
    tail: list[tuple[int, ...]]
    """What FSDP2 keeps gathered from the forward pass on: final norm, head, tied embedding."""
    layers: int
    layer: int
    """Weights of the linear layers of one layer."""
    last: int
    """The last of these, `down_proj`."""
    head: int
    attention: int
    """Heads times their width."""
    width: int
    saved: tuple[float, int]
    """Bytes a token that a layer saves, and bytes of a number of its input; see `memory`."""
    saved_sharded: tuple[float, int]

    @property
    def n(self) -> int:
        """All parameters."""
        return count(self.all)

    @property
    def adapters(self) -> int:
        """Trained parameters where these are adapters, else 0."""
        return count(self.trained) if len(self.trained) < len(self.all) else 0


def count(shapes: list[tuple[int, ...]], ranks: int = 1) -> int:
    """Numbers of these parameters that one process holds: FSDP2 cuts the first dimension."""
    return sum(-(-shape[0] // ranks) * prod(shape[1:]) for shape in shapes)


def model_of(config: Any, lora: int, **options: Any) -> tuple[nn.Module, nn.Module]:  # noqa: ANN401
    """A model without values, and what its adapters are in, if there are any."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, **options)
        if not lora:
            return model, model
        adapters = LoraConfig(r=lora, target_modules="all-linear", init_lora_weights=False)
        return model, get_peft_model(model, adapters)


def shapes_of(config: Any, lora: int = 0) -> Shapes:  # noqa: ANN401
    """Reads the shapes from the model's class."""
    bare, whole = model_of(config, lora)
    decoder, head = bare.get_decoder(), bare.get_output_embeddings().weight
    linear = [
        p for name, p in decoder.layers[0].named_parameters() if p.dim() > 1 and "lora" not in name
    ]
    attention = config.head_dim * config.num_attention_heads
    dtype = torch.bfloat16 if lora else torch.float32
    return Shapes(
        all=[tuple(p.shape) for p in whole.parameters()],
        trained=[tuple(p.shape) for p in whole.parameters() if p.requires_grad],
        tail=[tuple(p.shape) for p in (decoder.norm.weight, head)],
        layers=len(decoder.layers),
        layer=sum(w.numel() for w in linear),
        last=linear[-1].numel(),
        head=head.numel(),
        attention=attention,
        width=config.hidden_size,
        saved=(saved_by_layer(config, lora, dtype, autocast=True), dtype.itemsize),
        saved_sharded=(saved_by_layer(config, lora, torch.bfloat16, autocast=False), 2),
    )


def operations(s: Shapes, step: Step) -> float:
    """Floating-point operations of matrix products in one step of one process.

    A product of T rows with a matrix of k numbers takes 2 T k, and so do the gradient of its input
    and that of the matrix. Attention over texts of S tokens takes 4 T S times the width of all
    heads, twice that in the backward pass (causal kernels leave out half, and compute the scores
    once more). The head computes its logits again in the backward pass.
    """
    linear, adapters = 2 * step.rows * s.layers * s.layer, 2 * step.rows * s.adapters
    attention = 4 * step.rows * step.tokens * s.attention * s.layers
    head = 2 * step.scored * s.head
    forward = linear + adapters + attention + head
    # Gradients of inputs, of the trained weights, and the logits once more.
    backward = linear + 2 * attention + 2 * head + 2 * adapters
    if not s.adapters:
        backward += linear + head
    if step.checkpointing:
        # The last product of a layer is left out where nothing behind it needs its result: neither
        # the adapter beside it nor, in one pass, the mark that finds the layer in the graph.
        kept = step.way == "one" or s.adapters
        backward += (
            linear + adapters + attention - (0 if kept else 2 * step.rows * s.layers * s.last)
        )
    total = forward + step.passes * backward
    if step.way == "one":  # the gradients of pairs become those of m losses; and the check
        trained = s.adapters or s.layers * s.layer + s.head
        total += 2 * step.objectives * step.pairs * trained
        total += 2 * CHECKED * 2 * step.rows * trained
    if step.reference:
        total += forward - adapters
    return float(total)


def wire(s: Shapes, step: Step) -> int:
    """Bytes that a process sends in one step, in rings: R - 1 times its share of every message.

    FSDP2 gathers the parameters in bfloat16, for the forward pass and for every backward pass, but
    the tail not for the first; and reduces and scatters each gradient in float32. One pass for all
    gathers as often as one loss does. Without FSDP2, every gradient is reduced and scattered, and
    the combined one gathered: m + 1 times the parameters, where an all-reduce is 2 times.
    """
    share, others = count(s.trained, step.ranks), step.ranks - 1
    if not step.sharded:
        share = -(-count(s.trained) // step.ranks)
        return others * 4 * share * (2 if step.way == "weighted" else step.objectives + 1)
    gathered = (1 + step.passes + step.reference) * share - count(s.tail, step.ranks)
    return others * (2 * gathered + 4 * step.objectives * share)


def memory(s: Shapes, step: Step) -> dict[str, float]:
    """Bytes by part; their sum bounds the peak, which is in the backward pass.

    - weights: float32, or bfloat16 below adapters of float32; with FSDP2, this process's shards.
    - optimizer: AdamW's two moments in float32, and a number of steps for each parameter.
    - gradients: m of float32, as shards or whole; under DDP its buckets, and one part on its way.
    - reference: a model of the same precision, which TRL makes one unit of FSDP2: gathered, it is
      whole, in bfloat16.
    - gathered: with FSDP2, in bfloat16, the tail and two layers, of which one comes ahead of time;
      and the largest parameter's gradients, in bfloat16 and in float32 for the reduction (in one
      pass, those of m losses in float32, and a copy of them). Under autocast the weights of the
      layers in bfloat16, which live until the backward pass begins, or, without checkpointing, ends.
    - activations: the input of each layer, and what one layer saves, twice, as the gradients of
      these take no more; without checkpointing, what all layers save.
    - head: a tile of logits, the gradients of the hidden states in float32 and, where it is
      trained, of the weight; in one pass, a block of products and its logits.
    """
    trained, ranks = s.trained, step.ranks if step.sharded else 1
    share, m = count(trained, ranks), step.objectives
    parts = {"weights": 4.0 * share, "optimizer": 8.0 * share + 4 * len(trained)}
    parts["gradients"] = 4.0 * m * share
    if s.adapters:
        parts["weights"] += 2 * (s.n - s.adapters)
        if step.ranks > 1:
            parts["gradients"] += 4 * share * (1 if step.way == "weighted" else 3)
    parts["reference"] = 0.0
    if step.reference and not s.adapters:
        parts["reference"] = 4 * count(s.all, ranks) + (2 * s.n if step.sharded else 0)
    parts["gathered"] = 0.0
    if step.sharded:
        reduced = 8 * m if step.way == "one" else 6
        largest = max(s.layer, s.head)
        parts["gathered"] = 2 * (count(s.tail) + 2 * s.layer) + reduced * largest
    elif not s.adapters and not step.checkpointing:
        parts["gathered"] = 2 * s.layers * s.layer
    saved, of_input = s.saved_sharded if step.sharded else s.saved
    layers = 1 if step.checkpointing else s.layers
    parts["activations"] = step.rows * (saved * (layers + 1) + of_input * s.width * s.layers)
    hidden = 4 * step.scored * s.width
    if step.way == "one" and not s.adapters:
        logits = step.scored * max(BLOCK // (2 * step.pairs * s.width), 16)
        parts["head"] = 6 * BLOCK + 12 * logits + hidden
    else:
        parts["head"] = 2 * TILE + hidden + (0 if s.adapters else 6 * s.head)
    return parts


def saved_by_layer(config: Any, lora: int, dtype: torch.dtype, *, autocast: bool) -> float:  # noqa: ANN401
    """Bytes a token that autograd saves for one layer, beside its weights.

    Counted in the forward pass of a layer of full width, on tensors without values.
    """
    shape = copy.deepcopy(config)
    shape.num_hidden_layers, shape.vocab_size = 1, 64
    model, whole = model_of(shape, lora, dtype=dtype)
    found: dict[int, Tensor] = {}
    sizes = []

    def pack(saved: Tensor) -> Tensor:
        found[saved.untyped_storage()._cdata] = saved
        return saved

    with FakeTensorMode():
        for module in whole.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = _without_values(p)
        rotary = type(model.model.rotary_emb)(shape)
        for tokens in (64, 128):  # the difference leaves the weights out
            x = torch.empty(1, tokens, shape.hidden_size, dtype=dtype, requires_grad=True)
            mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bool)
            position = rotary(x, torch.arange(tokens)[None])
            with (
                saved_tensors_hooks(pack, lambda saved: saved),
                torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            ):
                y = model.model.layers[0](x * 1, position_embeddings=position, attention_mask=mask)
            sizes.append(sum(saved.untyped_storage().nbytes() for saved in found.values()))
            found.clear()
            del y
    return (sizes[1] - sizes[0]) / 64


def _without_values(p: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)


def rows(name: str) -> Iterator[list[str]]:
    """Yields the rows of a model's table."""
    for lora in (0, RANK):
        shapes = shapes_of(MODELS[name], lora)
        for ranks in (1, 8, 64):
            base = Step(lora=lora, ranks=ranks)
            ways: tuple[Way, ...] = ("passes", "one") if base.sharded else ("one",)
            steps = [base, *(replace(base, way=w, objectives=m) for m in (2, 3) for w in ways)]
            for step in steps:
                yield cells(shapes, step, base)


NAMES = {"weighted": "weighted DPO", "passes": "m passes", "one": "one pass"}


def cells(s: Shapes, step: Step, base: Step) -> list[str]:
    """A row: what is trained and how, memory, bytes sent, and times."""
    parts = memory(s, step)
    total, sent, done = sum(parts.values()), wire(s, step), operations(s, step)
    state = parts["weights"] + parts["optimizer"]
    rest = total - state - parts["gradients"]
    link = LINK if step.ranks <= 8 else NETWORK
    return [
        "adapters" if step.lora else "all weights",
        f"{step.ranks}",
        NAMES[step.way] + (f", m = {step.objectives}" if step.objectives > 1 else ""),
        *(f"{x / 1e9:.1f}" for x in (state, parts["gradients"], rest)),
        f"{total / 1e9:.0f}" + ("" if total < GPU else " ✗"),
        f"{sent / 1e9:.1f}",
        f"{sent / link:.2f}",
        f"{done / FLOPS:.1f}",
        f"{done / operations(s, base):.2f}",
    ]


HEAD = [
    "trained",
    "GPUs",
    "step",
    "state",
    "gradients",
    "rest",
    "GB a GPU",
    "GB sent",
    "sending, s",
    "computing, s",
    "time",
]


def blocks_of_the_page() -> Iterator[tuple[str, str]]:
    """Yields the name of each table of the page, and the table."""
    for name in MODELS:
        yield name, markdown_table(HEAD, rows(name), text=3)


def main() -> None:
    """Fills the tables of the page."""
    write_whole(PAGE, filled(PAGE.read_text(), blocks_of_the_page()))


if __name__ == "__main__":
    main()
