"""Two tasks under DistributedDataParallel; or in one process, without torchrun.

    torchrun --standalone --nproc-per-node 2 docs/examples/ddp.py

What differs from a loop for one loss: the lines with `opt`.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from raco_optim import CAGradClip


class Model(nn.Module):
    """One trunk, two tasks: how long a visit to a shop lasts, and whether it ends in a purchase."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.duration = nn.Linear(32, 1)
        self.purchase = nn.Linear(32, 1)

    def forward(self, visit: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the durations, and the logits of a purchase."""
        z = self.trunk(visit)
        return self.duration(z).squeeze(-1), self.purchase(z).squeeze(-1)


def visits(number: int = 512) -> TensorDataset:
    """Made up: what makes a visit long keeps from buying, in part."""
    visit = torch.randn(number, 16, generator=torch.Generator().manual_seed(0))
    duration = visit[:, :8].mean(1) + visit[:, 8:12].mean(1).tanh()
    purchase = visit[:, 12:].mean(1) > visit[:, :8].mean(1)
    return TensorDataset(visit, duration, purchase.float())


def main(epochs: int = 3, batch_size: int = 64) -> nn.Module:
    """Trains; `batch_size` is that of all processes together."""
    number, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    data = visits()
    sampler = DistributedSampler(data, number, rank)
    loader = DataLoader(data, batch_size // number, sampler=sampler)

    torch.manual_seed(0)
    model = Model().to(device)
    parallel = DistributedDataParallel(model) if number > 1 else model
    opt = CAGradClip(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        weights={"duration": 0.7, "purchase": 0.3},
        shared_parameters=model.trunk.parameters(),
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs * len(loader))

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            visit, duration, purchase = (x.to(device) for x in batch)
            minutes, logits = parallel(visit)
            losses = {
                "duration": mse_loss(minutes, duration),
                "purchase": binary_cross_entropy_with_logits(logits, purchase),
            }
            opt.zero_grad()
            opt.backward(losses)  # averages over the processes
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            scheduler.step()
        if rank == 0:
            print(epoch, dict(zip(losses, opt.report.losses.tolist(), strict=True)))  # noqa: T201
    return model


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group()  # NCCL for what is on GPUs, gloo for the rest
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
