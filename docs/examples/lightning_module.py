"""Two tasks in a LightningModule, with manual optimization; or in one process, without torchrun.

    torchrun --standalone --nproc-per-node 2 docs/examples/lightning_module.py

What differs from a module for one loss: `training_step` and the clipping.
"""

import os

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from raco_optim import CAGradClip


def visits(number: int = 512) -> TensorDataset:
    """Made up: what makes a visit to a shop long keeps from buying, in part."""
    visit = torch.randn(number, 16, generator=torch.Generator().manual_seed(0))
    duration = visit[:, :8].mean(1) + visit[:, 8:12].mean(1).tanh()
    purchase = visit[:, 12:].mean(1) > visit[:, :8].mean(1)
    return TensorDataset(visit, duration, purchase.float())


class Module(lightning.LightningModule):
    """One trunk, two tasks: how long a visit lasts, and whether it ends in a purchase."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # it is for one loss
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.heads = nn.Linear(32, 2)

    def training_step(self, batch: list[Tensor]) -> None:
        """Takes a step."""
        visit, duration, purchase = batch
        minutes, logits = self.heads(self.trunk(visit)).unbind(-1)
        losses = {
            "duration": mse_loss(minutes, duration),
            "purchase": binary_cross_entropy_with_logits(logits, purchase),
        }
        opt = self.optimizers().optimizer
        opt.zero_grad()
        opt.backward(losses)
        self.optimizers().step()  # Lightning's own, so that it counts
        self.lr_schedulers().step()
        self.log_dict(losses, on_step=False, on_epoch=True, sync_dist=True)

    def on_before_optimizer_step(self, optimizer: CAGradClip) -> None:
        """Clips here, where gradients are unscaled whatever the precision."""
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")

    def configure_optimizers(self) -> tuple[list, list]:
        """The optimizer, and a schedule around it."""
        adamw = torch.optim.AdamW(self.parameters(), lr=1e-2)
        opt = CAGradClip(adamw, weights={"duration": 0.7, "purchase": 0.3})
        return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, 0.95)]

    def train_dataloader(self) -> DataLoader:
        """This process's part; 64 visits in all of them are a batch."""
        number, data = self.trainer.world_size, visits()
        sampler = DistributedSampler(data, number, self.trainer.global_rank)
        return DataLoader(data, 64 // number, sampler=sampler)


def main(epochs: int = 3, folder: str = "lightning", resume: str | None = None) -> Module:
    """Trains, with a checkpoint after each epoch; `resume` is one to go on from."""
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),  # torchrun sets it
        default_root_dir=folder,
        logger=False,
    )
    module = Module()
    trainer.fit(module, ckpt_path=resume)
    trainer.print({name: float(x) for name, x in trainer.callback_metrics.items()})
    return module


if __name__ == "__main__":
    main()
