"""What does a training step cost at full size? Memory, bytes on the wire and time, on paper.

    python -m benchmarks.size            # fills the tables of docs/size.md

Nothing of that size is run. Shapes come from the model classes of transformers and peft, without
values (on the meta device). `operations`, `memory` and `wire` are formulas; tests/test_size.py
compares them with what small models compute, hold and send.

The step is that of `MultiObjectiveDPOTrainer` with AdamW and bf16=True. Where all weights are
trained, they are float32: one process computes under autocast; several shard them by FSDP2 and
compute in bfloat16. Adapters are float32 on a bfloat16 model, which every process holds (DDP).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
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

from benchmarks.harness import Parser, filled, markdown_table, refusals_of, write_whole

# The config.json of meta-llama/Meta-Llama-3-8B and of Qwen/Qwen3-4B.
HEADS: Any = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
SIZES: Any = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
LLAMA = dict(zip(SIZES, (128256, 4096, 14336, 32), strict=True)) | HEADS
QWEN = dict(zip(SIZES, (151936, 2560, 9728, 36), strict=True)) | HEADS
MODELS: dict[str, Any] = {
    "Llama-3-8B": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "Qwen3-4B": Qwen3Config(**QWEN, tie_word_embeddings=True),
}
PAGE = Path(__file__).parents[1] / "docs/size.md"
GPU = 80e9  # bytes; a card of "80 GB" has 85e9, the rest is for CUDA, NCCL and fragmentation
TRAINED = ("all weights", "adapters")
MACHINES = ((1, 24), (1, 48), (1, 80), (2, 80), (4, 80), (8, 48), (8, 80), (64, 80))
NAMES = {"weighted": "weighted DPO", "passes": "m passes", "one": "one pass"}
HEAD = ["trained", "GPUs", "step", "state", "gradients", "rest", "GB", "GB sent", "sending", "time"]
RANK = 16  # of the adapters: the default of --lora_r
# As docs/distributed.md: reached in products; a GPU's link within a node of 8, and between nodes.
FLOPS, LINK, NETWORK = 400e12, 450e9, 50e9
TILE = 4096, 32768  # rows and words of the logits that TRL's fused head computes at a time
BLOCK = 2**26  # numbers of the per-example products that one pass computes at a time
CHECKED = 0.02  # share of the weights that one pass compares with autograd's, each step

Way = Literal["weighted", "passes", "one"]


@dataclass(frozen=True)
class Step:
    """A training step of one process."""

    objectives: int = 1
    way: Way = "weighted"  # loss; or m passes; or one pass for all m gradients
    lora: int = 0  # rank of adapters of all linear layers; 0 where all weights are trained
    ranks: int = 1  # processes, each with a GPU
    pairs: int = 8  # in the batch of one process
    tokens: int = 1024  # of a text, of which a pair has two
    checkpointing: bool = True
    reference: bool = False  # a model, held and run; else its values were computed beforehand

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
    """Shapes and numbers of parameters; see `shapes_of`."""

    all: list[tuple[int, ...]]
    trained: list[tuple[int, ...]]
    tail: list[tuple[int, ...]]  # gathered from the forward pass on: final norm, head
    layers: int
    layer: int  # weights of the linear layers of one layer
    last: int  # of these, `down_proj`
    head: int
    attention: int  # heads times their width
    width: int
    saved: tuple[float, int]  # bytes a token of `saved_by_layer`, bytes of a number of its input
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


def shapes_of(config: Any, lora: int = 0) -> Shapes:  # noqa: ANN401
    """Reads the shapes from the model's class, and those of adapters from one layer of it."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    shapes = [tuple(p.shape) for p in model.parameters()]
    linear = [p.numel() for p in decoder.layers[0].parameters() if p.dim() > 1]
    adapters = []
    if lora:
        of_layer = one_layer(config, lora, torch.bfloat16).parameters()
        adapters = [tuple(p.shape) for p in of_layer if p.requires_grad] * len(decoder.layers)
    dtype = torch.bfloat16 if lora else torch.float32
    saved = saved_by_layer(config, lora, dtype, autocast=True), dtype.itemsize
    return Shapes(
        all=shapes + adapters,
        trained=adapters or shapes,
        tail=[tuple(p.shape) for p in (decoder.norm.weight, head)],
        layers=len(decoder.layers),
        layer=sum(linear),
        last=linear[-1],
        head=head.numel(),
        attention=config.num_attention_heads * config.head_dim,
        width=config.hidden_size,
        saved=saved,
        saved_sharded=saved if lora else (saved_by_layer(config, 0, torch.bfloat16), 2),
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
        backward += linear + adapters + attention
        # The last product of a layer is left out where nothing behind it needs its result: neither
        # the adapter beside it nor, in one pass, the mark that finds the layer in the graph.
        if step.way != "one" and not s.adapters:
            backward -= 2 * step.rows * s.layers * s.last
    total: float = forward + step.passes * backward
    if step.way == "one":  # the gradients of pairs become those of m losses; and the check
        trained = s.adapters or s.layers * s.layer + s.head
        total += 2 * step.objectives * step.pairs * trained
        total += 2 * CHECKED * 2 * step.rows * trained
    if step.reference:
        total += forward - adapters
    return total


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
      pass, those of m losses in float32, and a copy of them). Under autocast without
      checkpointing, the bfloat16 weights of the layers, until the backward pass ends.
    - activations: the input of each layer, and what one layer saves, twice, as the gradients of
      these take no more; without checkpointing, what all layers save. Each has a mask of bfloat16.
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
    if step.reference and not s.adapters:
        parts["reference"] = 4 * count(s.all, ranks) + (2 * s.n if step.sharded else 0)
    if step.sharded:
        reduced = 8 * m if step.way == "one" else 6
        largest = max(s.layer, s.head)
        parts["gathered"] = 2 * (count(s.tail) + 2 * s.layer) + reduced * largest
    elif not s.adapters and not step.checkpointing:
        parts["gathered"] = 2 * s.layers * s.layer
    saved, of_input = s.saved_sharded if step.sharded else s.saved
    layers = 1 if step.checkpointing else s.layers
    saved = (saved + 2 * step.tokens) * (layers + 1) + of_input * s.width * s.layers
    parts["activations"] = step.rows * saved
    hidden = 4 * step.scored * s.width
    if step.way == "one" and not s.adapters:
        logits = step.scored * max(BLOCK // (2 * step.pairs * s.width), 16)
        parts["head"] = 6 * BLOCK + 12 * logits + hidden
    else:
        parts["head"] = (
            2 * min(step.scored, TILE[0]) * TILE[1] + hidden + (0 if s.adapters else 6 * s.head)
        )
    return parts


def one_layer(config: Any, lora: int, dtype: torch.dtype) -> nn.Module:  # noqa: ANN401
    """A model of one layer of full width, without values; its layer may have adapters."""
    shape = copy.deepcopy(config)
    shape.num_hidden_layers, shape.vocab_size, shape._attn_implementation = 1, 64, "sdpa"
    with torch.device("meta"), no_init_weights():
        model: nn.Module = AutoModelForCausalLM.from_config(shape, dtype=dtype)
        if lora:
            adapters = LoraConfig(r=lora, target_modules="all-linear", init_lora_weights=False)
            get_peft_model(model, adapters)  # changes the model itself
    return model


def saved_by_layer(config: Any, lora: int, dtype: torch.dtype, *, autocast: bool = False) -> float:  # noqa: ANN401
    """Bytes a token that autograd saves for one layer, beside weights, mask and positions.

    Counted in the forward pass of a layer of full width, on tensors without values.
    """
    model: Any = one_layer(config, lora, dtype)
    found: dict[int, Tensor] = {}
    sizes = []

    def pack(saved: Tensor) -> Tensor:
        found[saved.untyped_storage()._cdata] = saved
        return saved

    with FakeTensorMode():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    empty = torch.empty(p.shape, dtype=p.dtype)
                    module._parameters[name] = nn.Parameter(empty, p.requires_grad)
        rotary = type(model.model.rotary_emb)(model.config)
        for tokens in (64, 128):  # the difference leaves the weights out
            x = torch.empty(1, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
            mask = torch.empty(1, 1, tokens, tokens, dtype=torch.bfloat16 if autocast else dtype)
            position = rotary(x, torch.arange(tokens)[None])
            shared = {y.untyped_storage()._cdata for y in (mask, *position)}
            with (
                saved_tensors_hooks(pack, lambda saved: saved),
                torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            ):
                y = model.model.layers[0](x * 1, position_embeddings=position, attention_mask=mask)
            own = (y.untyped_storage() for key, y in found.items() if key not in shared)
            sizes.append(sum(storage.nbytes() for storage in own))
            found.clear()
            del y
    return (sizes[1] - sizes[0]) / 64


def rows(name: str) -> Iterator[list[str]]:
    """Yields the rows of a model's table: what is trained and how, memory, bytes sent, time."""
    for lora in (0, RANK):
        s = shapes_of(MODELS[name], lora)
        for ranks in (1, 8, 64):
            base = Step(lora=lora, ranks=ranks)
            ways: tuple[Way, ...] = ("passes", "one") if base.sharded else ("one",)
            others = [replace(base, objectives=m, way=w) for m in (2, 3) for w in ways]
            for step in (base, *others):
                parts, done = memory(s, step), operations(s, step)
                total, sent = sum(parts.values()), wire(s, step)
                state = parts["weights"] + parts["optimizer"]
                rest = total - state - parts["gradients"]
                sending = sent / (LINK if ranks <= 8 else NETWORK)
                yield [
                    TRAINED[lora > 0],
                    str(ranks),
                    NAMES[step.way] + (f", m = {step.objectives}" if step.objectives > 1 else ""),
                    *(f"{x / 1e9:.1f}" for x in (state, parts["gradients"], rest)),
                    f"{total / 1e9:.0f}" + ("" if total < GPU else " ✗"),
                    f"{sent / 1e9:.1f}",
                    f"{sending / (done / FLOPS):.0%}",
                    f"{done / operations(s, base):.2f}",
                ]


def machines() -> Iterator[list[str]]:
    """Yields, for each model, the most pairs a GPU, up to 64, that fit on each machine."""
    for name, config in MODELS.items():
        for lora in (RANK, 0):
            s, most = shapes_of(config, lora), []
            for ranks, card in MACHINES:
                steps = (Step(3, "one", lora, ranks, pairs) for pairs in range(64, 0, -1))
                fitting = (x.pairs for x in steps if sum(memory(s, x).values()) < card * 1e9)
                most.append(str(next(fitting, "none")))
            yield [name, TRAINED[lora > 0], *most]


def blocks_of_the_page() -> Iterator[tuple[str, str]]:
    """Yields name and text of the tables of the page."""
    for name in MODELS:
        yield name, markdown_table(HEAD, rows(name), text=3)
    columns = (f"{n} × {card} GB" for n, card in MACHINES)
    yield "machines", markdown_table(["model", "trained", *columns], machines(), text=2)


@refusals_of("size")
def main(arguments: Sequence[str] | None = None) -> None:
    """Fills the tables of the page."""
    Parser(prog="python -m benchmarks.size", description=__doc__).parse_args(arguments)
    write_whole(PAGE, filled(PAGE.read_text(), blocks_of_the_page()))


if __name__ == "__main__":
    main()
