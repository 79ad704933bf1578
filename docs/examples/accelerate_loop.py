"""Two tasks in a loop of Hugging Face Accelerate, with micro-batches; or in one process.

    accelerate launch --cpu --num_processes 2 docs/examples/accelerate_loop.py
    torchrun --standalone --nproc-per-node 2 docs/examples/accelerate_loop.py

What differs from a loop for one loss: the lines with `losses`.
"""

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import raco_optim
from raco_optim import CAGradClip


class Model(nn.Module):
    """One trunk, two tasks: how long a visit to a shop lasts, and whether it ends in a purchase."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.heads = nn.Linear(32, 2)

    def forward(self, visit: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the durations, and the logits of a purchase."""
        duration, purchase = self.heads(self.trunk(visit)).unbind(-1)
        return duration, purchase


def visits(number: int = 512) -> TensorDataset:
    """Made up: what makes a visit long keeps from buying, in part."""
    visit = torch.randn(number, 16, generator=torch.Generator().manual_seed(0))
    duration = visit[:, :8].mean(1) + visit[:, 8:12].mean(1).tanh()
    purchase = visit[:, 12:].mean(1) > visit[:, :8].mean(1)
    return TensorDataset(visit, duration, purchase.float())


def main(epochs: int = 3, batch_size: int = 32, mixed_precision: str = "no") -> nn.Module:
    """Trains; two batches make a step, and `batch_size` is that of all processes together."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
    )
    set_seed(0)
    model = Model()
    optimizer = CAGradClip(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        weights={"duration": 0.7, "purchase": 0.3},
        nonfinite="raise" if accelerator.scaler is None else "propagate",
    )
    loader = DataLoader(visits(), batch_size, shuffle=True)
    steps = epochs * len(loader) // accelerator.gradient_accumulation_steps
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    for epoch in range(epochs):
        for visit, duration, purchase in loader:
            with accelerator.accumulate(model):
                minutes, logits = model(visit)
                losses = {
                    "duration": mse_loss(minutes, duration),
                    "purchase": binary_cross_entropy_with_logits(logits, purchase),
                }
                # In place of accelerator.backward, which divides, scales and unwraps too.
                for name in losses:
                    losses[name] = losses[name] / accelerator.gradient_accumulation_steps
                    if accelerator.scaler is not None:  # mixed_precision="fp16"
                        losses[name] = accelerator.scaler.scale(losses[name])
                raco_optim.backward(optimizer, losses, accumulate=not accelerator.sync_gradients)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        report = raco_optim.unwrap(optimizer).report
        accelerator.print(epoch, dict(zip(report.names, report.losses.tolist(), strict=True)))
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
