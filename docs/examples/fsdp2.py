"""Two tasks on a model that FSDP2 shards; or in one process, without torchrun.

    torchrun --standalone --nproc-per-node 2 docs/examples/fsdp2.py

What differs from a loop for one loss: the lines with `opt`.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from raco_optim import CAGradClip


class Model(nn.Module):
    """A small transformer with two heads: the word that comes next, and the one before."""

    def __init__(self, words: int = 31, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, 0.0, "gelu", batch_first=True, bias=False)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).layers
        self.next = nn.Linear(width, words)
        self.previous = nn.Linear(width, words)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits of both heads, a row for each position of each text."""
        z = self.embedding(text)
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1], device=text.device)
        for layer in self.layers:
            z = layer(z, src_mask=mask, is_causal=True)
        z = z.flatten(0, 1)
        return self.next(z), self.previous(z)


def texts(step: int, number: int = 32, length: int = 12, words: int = 31) -> Tensor:
    """Made up: every word is four times the one before, plus one."""
    text = torch.randint(words, (number, 1), generator=torch.Generator().manual_seed(step))
    for _ in range(length - 1):
        text = torch.cat([text, (4 * text[:, -1:] + 1) % words], dim=1)
    return text


def main(steps: int = 20) -> nn.Module:
    """Trains on batches of 32 texts, of which every process has its part."""
    number, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same weights in all processes, before they are cut
    model = Model().to(device)
    if number > 1:
        mesh = init_device_mesh(device.type, (number,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    # After fully_shard, which puts other parameters into the model.
    opt = CAGradClip(
        torch.optim.AdamW(model.parameters(), lr=3e-3), weights={"next": 0.5, "previous": 0.5}
    )

    for step in range(steps):
        text = texts(step).chunk(number)[rank].to(device)
        following, before = model(text[:, 1:-1])
        losses = {
            "next": cross_entropy(following, text[:, 2:].flatten()),
            "previous": cross_entropy(before, text[:, :-2].flatten()),
        }
        opt.zero_grad()
        opt.backward(losses)  # FSDP2 averages over the processes
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if rank == 0 and step % 5 == 4:
            print(step, dict(zip(losses, opt.report.losses.tolist(), strict=True)))  # noqa: T201
    return model


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group()  # NCCL for what is on GPUs, gloo for the rest
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
