"""Two tasks in the Trainer of Hugging Face transformers; or in one process, without torchrun.

    torchrun --standalone --nproc-per-node 2 docs/examples/hf_trainer.py

What differs from a Trainer for one loss: `training_step`, and the optimizer passed to it.
"""

import os

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, StackDataset
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

import raco_optim
from raco_optim import CAGradClip

WEIGHTS = {"topic": 0.7, "tone": 0.3}


class Model(nn.Module):
    """An encoder with two heads: what a text is about, and whether it is friendly."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        config = BertConfig(vocab_size=64, num_hidden_layers=2, hidden_dropout_prob=0.0, **sizes)
        config.attention_probs_dropout_prob = 0.0  # so that any number of processes does the same
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict({"topic": nn.Linear(32, 4), "tone": nn.Linear(32, 2)})

    def forward(self, input_ids: Tensor, topic_labels: Tensor, tone_labels: Tensor) -> dict:
        """Returns the losses, and the weighted one for `evaluate`."""
        z = self.encoder(input_ids).last_hidden_state.mean(1)
        labels = {"topic": topic_labels, "tone": tone_labels}
        losses = {name: cross_entropy(head(z), labels[name]) for name, head in self.heads.items()}
        return {"loss": sum(WEIGHTS[name] * loss for name, loss in losses.items()), **losses}


def texts(number: int = 256, seed: int = 0) -> Dataset:
    """Made up: one range of words for each topic, and friendly words in all of them."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randint(4, (number,), generator=generator)
    text = 16 * topic[:, None] + torch.randint(16, (number, 10), generator=generator)
    tone = (text % 16 < 8).sum(1) > 5
    return StackDataset(input_ids=text, topic_labels=topic, tone_labels=tone.long())


class MultiTaskTrainer(Trainer):
    """Combines the gradients of the losses that the model returns."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        """A micro-batch; the Trainer then clips, steps, and zeroes the gradients."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            outputs = model(**inputs)
        share = 1 / self.current_gradient_accumulation_steps
        losses = {name: share * outputs[name] for name in WEIGHTS}
        last = self.accelerator.sync_gradients
        raco_optim.backward(self.optimizer, losses, accumulate=not last)
        return share * outputs["loss"].detach()  # what the Trainer logs


def main(folder: str = "trainer", resume: str | None = None) -> Trainer:
    """Trains; two batches make a step, and 32 texts a batch, in all processes together."""
    args = TrainingArguments(
        folder,
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=3,
        per_device_train_batch_size=32 // int(os.environ.get("WORLD_SIZE", 1)),
        gradient_accumulation_steps=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=2,
    )
    torch.manual_seed(0)
    model = Model()
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)  # instead of args.learning_rate
    data = {"train_dataset": texts(), "eval_dataset": texts(64, seed=1)}
    trainer = MultiTaskTrainer(model, args, **data, optimizers=(CAGradClip(adamw, WEIGHTS), None))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    main()
