"""TRL's DPO trainer with one preference loss per objective, and their conflict resolved.

A training step; what is TRL's is left to TRL:

    batch with signs [B, m]        preference_data.py   columns pref_<objective> -> a tensor
      |  one forward pass          forward.py           log-probabilities of the completions
      |  m losses                  objectives.py        each a mean over the pairs it labels
      |  backward(losses)          raco_optim           gradients, Gram matrix, alpha -> .grad
      v
    Trainer: clipping of the gradient norm, optimizer, scheduler, checkpoints, logs (metrics.py)

The trainer wraps its optimizer into a `MultiObjectiveOptimizer`, and calls ``backward`` of it in
`training_step`: in ``optimizer.step()`` it would come after the clipping.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

if _missing := [name for name in ("trl", "datasets", "transformers") if find_spec(name) is None]:
    raise ImportError(
        f"raco_optim.integrations.trl needs {', '.join(_missing)}. Install it: pip install "
        f'"raco_optim[align]"',
        name=_missing[0],
    )

from trl import DPOTrainer

from raco_optim.alignment import PairLogProbs
from raco_optim.distributed.agreement import raise_together
from raco_optim.integrations import launch, objectives, preference_data
from raco_optim.integrations.forward import completion_log_probs
from raco_optim.integrations.metrics import Log
from raco_optim.integrations.preference_data import MARGINS, SIGNS, count_labels
from raco_optim.integrations.trl_config import GRADIENT_METHODS, MultiObjectiveDPOConfig
from raco_optim.optimizer import MultiObjectiveOptimizer, unwrap

__all__ = ["MultiObjectiveDPOConfig", "MultiObjectiveDPOTrainer"]


class MultiObjectiveDPOTrainer(DPOTrainer):  # type: ignore[misc]  # TRL is not type-checked
    r"""TRL's `DPOTrainer` for several objectives that may disagree about the same pairs.

    Objective i says of every pair whether it prefers ``chosen`` (+1) or ``rejected`` (-1), is
    indifferent (0) or has no label (null), in the column ``pref_<objective>``. One forward pass
    gives the log-ratio :math:`\Delta` of a pair, and every objective its loss, such as

    .. math:: L_i = -\operatorname{mean}_{s_i \ne 0} \log \sigma(\beta s_i \Delta).

    The mean runs over the pairs that the objective labels in the whole accumulated batch, so that
    micro-batches change nothing, nor do several processes (torchrun), each with the whole model.
    With the method ``"raco"`` the optimizer is a `raco_optim.CAGradClip` around the one that TRL
    would use, or the one in ``optimizers``. Each loss has its own gradient, summed over the
    micro-batches and averaged over the processes, and CAGrad-Clip combines them; what follows, from
    the clipping of the norm on, is the Trainer's. ``raco_optim.unwrap(trainer.optimizer)`` is the
    `CAGradClip`: its report says what a step did, and a callback may set its weights and c between
    steps. `MultiObjectiveDPOConfig` has the other methods, docs/alignment.md the keys of what is
    logged.

    Args:
        model: As in TRL: a model or its path.
        ref_model: As in TRL.
        args: A `MultiObjectiveDPOConfig`.
        data_collator: As in TRL; it need not know of the preferences.
        train_dataset: As in TRL, with columns ``pref_<objective>``; a stream is checked on its way.
        eval_dataset: As in TRL, with the same columns.
        processing_class: As in TRL.
        **others: As in TRL (``callbacks``, ``optimizers``, ``peft_config``, ...).

    Raises:
        TypeError: `args` is not a `MultiObjectiveDPOConfig`.
        ValueError: A column is missing or holds no preferences, an objective labels no pair, a
            setting can't be honoured, ``optimizers`` holds a `MultiObjectiveOptimizer`, or, from
            `train`, the output folder holds another run.
        FloatingPointError: From `train`: a loss is NaN or Inf, or a gradient that is combined.

    Warns:
        UserWarning: A run goes on with weights or a radius of its checkpoint that are not those of
            `args`.

    Note:
        It rests on parts of TRL's `DPOTrainer` that are not public, hence ``trl>=1.16,<2``.
        ``"kto_pair"`` estimates its reference point from a micro-batch, whose size matters there.

    Example:
        >>> from datasets import Dataset
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from raco_optim.integrations.trl import *
        >>> bare = Tokenizer(models.WordLevel({"<eos>": 0, "yes": 1, "no": 2}, unk_token="no"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>")
        >>> shape = {"vocab_size": 3, "hidden_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1))
        >>> pair = {"prompt": "no", "chosen": "yes", "rejected": "no", "pref_a": 1, "pref_b": -1}
        >>> config = MultiObjectiveDPOConfig(
        ...     "unused", weights="a=0.7,b=0.3", bf16=False, precompute_ref_log_probs=True
        ... )
        >>> trainer = MultiObjectiveDPOTrainer(
        ...     model, args=config, train_dataset=Dataset.from_list([pair]),
        ...     processing_class=tokenizer,
        ... )
        >>> trainer.data_collator([trainer.train_dataset[0]])["signs"]
        tensor([[ 1, -1]], dtype=torch.int8)

    References:
        Algorithm 1 of arXiv 2602.02495.
    """

    # The losses are means over the accumulated batch; nothing is left to be divided.
    loss_is_scaled_for_ga = True
    data_collator: Any
    optimizer: Any

    def __init__(
        self,
        model: Any,  # noqa: ANN401  # here and below: whatever TRL takes
        ref_model: Any = None,  # noqa: ANN401
        args: MultiObjectiveDPOConfig | None = None,
        data_collator: Any = None,  # noqa: ANN401
        train_dataset: Any = None,  # noqa: ANN401
        eval_dataset: Any = None,  # noqa: ANN401
        processing_class: Any = None,  # noqa: ANN401
        **others: Any,  # noqa: ANN401
    ) -> None:
        if not isinstance(args, MultiObjectiveDPOConfig):
            raise TypeError(
                f"`args` must be a MultiObjectiveDPOConfig, which holds the weights; got "
                f"{type(args).__name__}."
            )
        if others.get("compute_metrics") is not None:
            raise ValueError("`compute_metrics` must be None; predictions are not computed.")
        given = (others.get("optimizers") or (None,))[0]
        if _found(given) is not None:
            raise ValueError(
                f"`optimizers` must hold the inner optimizer, such as AdamW, because the trainer "
                f"wraps it as `method` says; got {type(given).__name__}. Set `weights`, `method` "
                f"and `c` of `args`."
            )
        self._names = tuple(args.objective_weights)
        self._group = launch.current_group()
        self._objective_log = Log(args.objective_weights, self._group, args.device)
        self._columns = preference_data.preference_columns(self._names, args.margin_objectives)
        preference_data.check_dataset(eval_dataset, self._columns, "eval_dataset")
        preference_data.check_dataset(train_dataset, self._columns, "train_dataset")
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            **others,
        )
        launch.check_whole(self)
        if self.aux_loss_enabled:
            raise ValueError(
                f"`router_aux_loss_coef` must be 0.0 for a mixture of experts, because its "
                f"auxiliary loss belongs to no objective; got {self.router_aux_loss_coef}."
            )
        if self.optimizer is not None:  # that of the user
            self.create_optimizer()
        # TRL has dropped prompts longer than `max_length`.
        preference_data.check_dataset(self.train_dataset, self._columns, "train_dataset")
        # Wrapped, not replaced: padding, truncation and a user's own collator stay as they are.
        self.data_collator = preference_data.PreferenceCollator(
            self.data_collator, self._names, args.margin_objectives
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        known = set(self._signature_columns)
        self._signature_columns += [column for column in self._columns if column not in known]

    def train(self, resume_from_checkpoint: str | bool | None = None, **others: Any) -> Any:  # noqa: ANN401
        """As the Trainer's; raises ValueError rather than write over another run's checkpoints."""
        launch.check_start(self, self._group, resume_from_checkpoint)
        self._objective_log.clear()  # as of an earlier call that was stopped
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **others)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:  # noqa: ANN401
        """As the Trainer's, within the optimizer of the method."""
        super().create_optimizer(model)
        if self.args.method in GRADIENT_METHODS and _found(self.optimizer) is None:
            model = self.model if model is None else model
            self.optimizer = objectives.multi_objective(self.args, self.optimizer, model)
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer: Any = _found(self.optimizer)
        if checkpoint is None or optimizer is None:
            return
        configured = {"weights": self.args.objective_weights}
        if self.args.method != "mgda":
            configured["c"] = self.args.c
        for name, value in configured.items():
            loaded = getattr(optimizer, name)
            if loaded != value:
                warnings.warn(
                    f"the run goes on with the `{name}` of its checkpoint, "
                    f"{dict(loaded) if isinstance(loaded, Mapping) else loaded}, not with that of "
                    f"`args`, {value}. To change it, set raco_optim.unwrap(optimizer).{name} in a "
                    f"callback's on_train_begin.",
                    stacklevel=2,
                )

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Tensor]:  # noqa: ANN401
        """As the Trainer's, but counts the labelled pairs per objective, ``[m]``."""
        # What is left of a step that was stopped in the middle is dropped.
        self.model.zero_grad()
        optimizer = _found(self.optimizer)
        if optimizer is not None:
            optimizer.zero_grad()
        self._objective_log.begin(training=True)
        settings: dict[str, Any] = {}
        with raise_together(self._group, settings):
            batches, _ = super().get_batch_samples(*args)
            settings["the number of micro-batches"] = len(batches)
            counts = torch.zeros(len(self._names), dtype=torch.int64, device="cpu")
            for batch in batches:
                counts += count_labels(batch[SIGNS].cpu())
        if self._group is not None:
            [counts] = self._group.sum([counts], self.args.device)
            # The mean over R processes of sums divided by n / R is the mean over n pairs.
            counts = counts / self._group.world_size
        return batches, counts

    def _precompute_ref_logps(self, dataset: Any, *others: Any) -> Any:  # noqa: ANN401
        launch.check_stored(dataset, self._group)
        return super()._precompute_ref_logps(dataset, *others)

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """As TRL's, which would pass the preferences on to the model."""
        inputs = {key: value for key, value in inputs.items() if key not in (SIGNS, MARGINS)}
        return super().compute_ref_log_probs(model, inputs)

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The weighted loss: what is minimised in training, the yardstick in evaluation."""
        with raise_together(self._group):
            policy = completion_log_probs(model, inputs)
            losses = self._of_objectives(policy, inputs, num_items_in_batch, model.training)
            weights = objectives.loss_weights(self.args, training=model.training)
            loss = objectives.weighted(losses, weights)
            if loss is None:  # no pair is labelled: nothing to learn, but a graph to go back
                return 0 * policy.sum()
            if model.training and not loss.isfinite():
                raise FloatingPointError(
                    "the weighted loss is NaN or Inf; torch.autograd.set_detect_anomaly finds the "
                    "cause"
                )
            return loss

    def predict(self, *_: Any, **__: Any) -> Any:  # noqa: ANN401
        """Not supported: raises ValueError."""
        raise ValueError("predictions are not computed. Call `evaluate`.")

    def training_step(
        self,
        model: Any,  # noqa: ANN401
        inputs: Mapping[str, Any],
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Forward and backward passes of one micro-batch; the last one of a step combines."""
        if self.args.method in GRADIENT_METHODS:
            loss = self._combined_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._objective_log.end(training=True)
        return self.accelerator.reduce(loss, "mean")  # type: ignore[no-any-return]

    def _combined_step(
        self, model: nn.Module, inputs: Mapping[str, Any], counts: Tensor | None
    ) -> Tensor:
        optimizer = unwrap(self.optimizer)
        model.train()
        self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        last = self.accelerator.sync_gradients
        # Each loss has a gradient of its own to be averaged over the processes.
        with self.accelerator.no_sync(model):
            with raise_together(self._group):
                with self.compute_loss_context_manager():
                    scores = completion_log_probs(model, inputs)
                    losses = self._of_objectives(scores, inputs, counts, training=True)
                named = dict(zip(self._names, losses, strict=True))
                scalars = scores if objectives.uses_scores(self.args) else None
                if not last and any(loss is not None for loss in losses):
                    optimizer.backward(named, accumulate=True, scalars=scalars)
            # Where no process has a label in any micro-batch, nothing is to be learned.
            if last and (counts is None or counts.any()):
                optimizer.backward(named, scalars=scalars)
                self._objective_log.add_step(optimizer.report)
        assert isinstance(optimizer.weights, Mapping)
        loss = objectives.weighted(losses, optimizer.weights.values())
        return torch.zeros((), device=self.args.device) if loss is None else loss.detach()

    def evaluation_loop(self, *args: Any, **others: Any) -> Any:  # noqa: ANN401
        """As the Trainer's."""
        self._objective_log.begin(training=False)
        output = super().evaluation_loop(*args, **others)
        self._objective_log.end(training=False)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was gathered since the last call."""
        self._objective_log.write(logs, training=self.model.training)
        super().log(logs, start_time)

    def _of_objectives(
        self, policy: Tensor, inputs: Mapping[str, Tensor], counts: Tensor | None, training: bool
    ) -> list[Tensor | None]:
        """One loss per objective, None where it labels no pair."""
        signs = inputs[SIGNS].cpu()  # once: the losses ask which pairs are labelled
        batches = self.accelerator.gradient_state
        if not training and batches.end_of_dataloader and batches.remainder > 0:
            signs = preference_data.without_repeats(
                signs, self.args.process_index, batches.remainder
            )
        reference: tuple[Tensor | None, Tensor | None] = (None, None)
        if objectives.needs_reference(self.args, training=training):
            if self.precompute_ref_logps:
                reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
            else:
                model = self.model if self.ref_model is None else self.ref_model
                reference = self.compute_ref_log_probs(model, inputs)
        chosen, rejected = policy.chunk(2)
        tokens = inputs["completion_mask"].sum(1).chunk(2)
        log_probs = PairLogProbs(chosen, rejected, *reference, *tokens)
        losses = objectives.losses(
            self.args, log_probs, signs, inputs.get(MARGINS), counts, training=training
        )
        self._objective_log.add(
            losses,
            objectives.margins_of_labelled(self.args, log_probs, signs, training=training),
            count_labels(signs) if counts is None else counts,
            training=training,
        )
        return losses


def _found(optimizer: Any) -> MultiObjectiveOptimizer | None:  # noqa: ANN401
    """Returns the `MultiObjectiveOptimizer` inside an optimizer, None if there is none."""
    try:
        return unwrap(optimizer)
    except TypeError:
        return None
