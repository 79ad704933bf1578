"""TRL's DPO trainer with one preference loss per objective, and their conflict resolved.

A training step; what is TRL's is left to TRL:

    batch with signs [B, m]        preference_data.py   columns pref_<objective> -> a tensor
      |  one forward pass          forward.py           log-probabilities of the completions
      |  m losses                  methods.py           each a mean over the pairs it labels
      |  backward(losses)          raco_optim           gradients, Gram matrix, alpha -> .grad
      v
    Trainer: clipping of the gradient norm, optimizer, scheduler, checkpoints, logs (metrics.py)

The trainer wraps its optimizer into a `MultiObjectiveOptimizer`, and calls ``backward`` of it in
`training_step`: in ``optimizer.step()`` it would come after the clipping.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

if _missing := [name for name in ("trl", "datasets", "transformers") if find_spec(name) is None]:
    raise ImportError(
        f"raco_optim.integrations.trl needs {', '.join(_missing)}. Install it: pip install "
        f'"raco_optim[align]"',
        name=_missing[0],
    )

from datasets import Dataset
from trl import DPOTrainer

from raco_optim.alignment import PairLogProbs
from raco_optim.distributed.agreement import raise_together
from raco_optim.distributed.group import Group
from raco_optim.integrations import (
    adapters,
    callbacks,
    launch,
    methods,
    model_card,
    preference_data,
    sharding,
)
from raco_optim.integrations.forward import completion_log_probs
from raco_optim.integrations.metrics import Log, common_sums, evaluation_metrics, objective_sums
from raco_optim.integrations.preference_data import Preferences, for_the_model
from raco_optim.integrations.trl_config import GRADIENT_METHODS, MultiObjectiveDPOConfig
from raco_optim.optimizer import MultiObjectiveOptimizer, unwrap

__all__ = ["MultiObjectiveDPOConfig", "MultiObjectiveDPOTrainer"]


class MultiObjectiveDPOTrainer(DPOTrainer):  # type: ignore[misc]  # TRL is not type-checked
    r"""TRL's `DPOTrainer` for several objectives that may disagree about the same pairs.

    Objective i says of every pair whether it prefers ``chosen`` (+1) or ``rejected`` (-1), by how
    much (a number between), is indifferent (0) or has no label (null), in the column
    ``pref_<objective>``; the column ``weight_<objective>``, if there is one, has the weights of the
    pairs. One forward pass gives the log-ratio :math:`\Delta` of a pair, and every objective its
    loss, such as

    .. math:: L_i = -\operatorname{mean}_{s_i \ne 0} \log \sigma(\beta s_i \Delta).

    The mean runs over the pairs that the objective labels in the whole accumulated batch, so that
    micro-batches change nothing, nor do several processes (torchrun), with FSDP2 or without.
    With the method ``"raco"`` the optimizer is a `raco_optim.CAGradClip` around the one that TRL
    would use, or the one in ``optimizers``. Each loss has its own gradient, summed over the
    micro-batches and averaged over the processes, and CAGrad-Clip combines them; what follows, from
    the clipping of the norm on, is the Trainer's. ``raco_optim.unwrap(trainer.optimizer)`` is the
    `CAGradClip`: its report says what a step did, and a callback may set its weights and c between
    steps. `MultiObjectiveDPOConfig` has the other methods, docs/alignment.md the keys of what is
    logged.

    Args:
        model: As in TRL: a model or its path; or the path of adapters that peft saved, which are
            trained further: the reference is the model with them.
        ref_model: As in TRL. None is loaded where the losses need none (SimPO; AMoPO without
            `eval_dataset`).
        args: A `MultiObjectiveDPOConfig`.
        data_collator: As in TRL; it need not know of the preferences.
        train_dataset: As in TRL, with columns ``pref_<objective>``; a stream is checked on its way.
        eval_dataset: As in TRL, with the same columns.
        processing_class: As in TRL.
        **others: As in TRL (``callbacks``, ``optimizers``, ``peft_config``, ...).

    Attributes:
        pair_counts: For ``"train_dataset"`` and ``"eval_dataset"`` (``"eval_dataset[<name>]"`` of
            several), by objective, how many ``pairs`` there are, of them ``labels``, ``ties`` and
            ``missing``, and labels on pairs that are ``dropped`` since the prompt has `max_length`
            tokens or more, that are ``equal`` once truncated, or whose answers are ``identical``.
            They are printed to stderr too. A stream is not counted.

    Raises:
        TypeError: `args` is not a `MultiObjectiveDPOConfig`.
        ValueError: A column is missing or holds no preferences, an objective labels no pair that
            fits into `max_length`, a setting can't be honoured, ``metric_for_best_model`` does not
            exist, ``optimizers`` holds a `MultiObjectiveOptimizer`, or, from `train`, the output
            folder holds another run.
        FloatingPointError: From `train`: a loss is NaN or Inf, or a gradient that is combined.

    Warns:
        UserWarning: A run goes on with weights or a radius of its checkpoint that are not those of
            `args`, or more than half of an objective's labels are on pairs that teach nothing.

    Note:
        It rests on parts of TRL's `DPOTrainer` that are not public, hence ``trl>=1.16,<2``.
        ``"kto_pair"`` estimates its reference point from a micro-batch, whose size matters there.

    Example:
        >>> from datasets import Dataset
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from raco_optim.integrations.trl import *
        >>> bare = Tokenizer(models.WordLevel({"<eos>": 0, "yes": 1, "no": 2}, unk_token="no"))
        >>> bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<eos>")
        >>> shape = {"vocab_size": 3, "hidden_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1))
        >>> pair = {"prompt": "no ", "chosen": "yes", "rejected": "no", "pref_a": 1, "pref_b": -1}
        >>> config = MultiObjectiveDPOConfig(
        ...     "unused", weights="a=0.7,b=0.3", bf16=False, precompute_ref_log_probs=True
        ... )
        >>> trainer = MultiObjectiveDPOTrainer(
        ...     model, args=config, train_dataset=Dataset.from_list([pair]),
        ...     processing_class=tokenizer,
        ... )
        >>> trainer.data_collator([trainer.train_dataset[0]])["signs"]
        tensor([[ 1., -1.]])

    References:
        Algorithm 1 of arXiv 2602.02495.
    """

    # The losses are means over the accumulated batch; nothing is left to be divided.
    loss_is_scaled_for_ga = True
    data_collator: Any
    optimizer: Any

    @callbacks.quiet()
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
        self.pair_counts: dict[str, dict[str, dict[str, int]]] = {}
        preference_data.check_dataset(eval_dataset, self._columns, "eval_dataset")
        preference_data.check_dataset(train_dataset, self._columns, "train_dataset")
        needed = [args.needs_reference(training=training) for training in (True, False)]
        self._runs_reference = needed[0] or (needed[1] and eval_dataset is not None)
        if ref_model is not None and not any(needed):
            raise ValueError(
                f"`ref_model` must be None with the loss {', '.join(args.loss_type)} and the "
                f"method {args.method}, which need none; got {type(ref_model).__name__}."
            )
        options, precompute = args.model_init_kwargs, args.precompute_ref_log_probs
        if adapters.is_folder_of_adapters(model, (options or {}).get("revision")):
            if others.get("peft_config") is not None:
                raise ValueError(
                    f"`peft_config` must be None where `model` is a folder of adapters, which are "
                    f"trained further; got both, and {model!r}. Leave it out (--use_peft and its "
                    f"options), or merge the adapters into their model first."
                )
            quantization = others.pop("quantization_config", None)
            model, processing_class = adapters.load(model, args, quantization, processing_class)
            args.model_init_kwargs = None
        # So TRL loads no reference model where none is run: one that comes before training.
        args.precompute_ref_log_probs = precompute or not self._runs_reference
        paper = model_card.PAPERS.get(args.method)
        if paper is not None:
            self._name, self._paper = paper.name, paper.entry()
        self._tag_names = [*DPOTrainer._tag_names, "raco-optim", args.method]
        try:
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
        finally:
            args.model_init_kwargs, args.precompute_ref_log_probs = options, precompute
        self.precompute_ref_logps = precompute
        launch.check_whole(self)
        self._check_metric()
        if self.optimizer is not None:  # that of the user
            self.create_optimizer()
        # Wrapped, not replaced: padding, truncation and a user's own collator stay as they are.
        self.data_collator = preference_data.PreferenceCollator(
            self.data_collator, self._names, args.margin_objectives
        )
        callbacks.add_to(self, step_log=args.method in GRADIENT_METHODS)
        if args.process_index == 0:
            for argument, counts in self.pair_counts.items():
                sys.stderr.write(preference_data.count_table(counts, argument) + "\n")

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; raises ValueError if the model can't be sharded as is asked for."""
        super().create_accelerator_and_postprocess()
        sharding.prepare(self)
        if self.args.fp16 and self.accelerator.scaler is None:
            raise ValueError(
                f"`fp16` must be False on {self.args.device.type}, where Accelerate scales no "
                f"gradients and trains in float32; got True. Train with bf16=True."
            )

    @property
    def _forward_group(self) -> Group | None:
        """The processes that may vote around a forward pass; none if it sends messages itself."""
        return None if self.is_fsdp_enabled else self._group

    def _check_metric(self) -> None:
        metric = self.args.metric_for_best_model
        if metric is None:
            return
        sets = list(self.eval_dataset) if isinstance(self.eval_dataset, Mapping) else []
        known = evaluation_metrics(self._names, sets, auxiliary=self.aux_loss_enabled)
        if metric.removeprefix("eval_") not in known:
            raise ValueError(
                f"`metric_for_best_model` must be one of {', '.join(known)}, with or without eval_ "
                f"before it; got {metric!r}."
            )

    def _prepare_dataset(self, dataset: Any, tokenizer: Any, args: Any, name: str) -> Any:  # noqa: ANN401
        prepared = super()._prepare_dataset(dataset, tokenizer, args, name)
        argument = f"{name}_dataset" if name in ("train", "eval") else f"eval_dataset[{name!r}]"
        if isinstance(dataset, Dataset):
            counts = preference_data.count_pairs(dataset, prepared, self._names, args)
            preference_data.check_counts(counts, argument, args)
            self.pair_counts[argument] = counts
        return prepared

    def create_model_card(self, *args: Any, **others: Any) -> None:  # noqa: ANN401
        """As TRL's, with the method, the objectives and their weights."""
        super().create_model_card(*args, **others)
        card = Path(self.args.output_dir, "README.md")
        if self.is_world_process_zero():
            text = card.read_text(encoding="utf-8")
            start, heading, rest = text.partition("### Framework versions")
            about = model_card.section(self.args, self.state.log_history)
            card.write_text(f"{start}{about}{heading}{rest}", encoding="utf-8")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        ours = [*self._columns, *map(preference_data.weight_column, self._names)]
        self._signature_columns += [c for c in ours if c not in self._signature_columns]

    @callbacks.quiet()
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
            self.optimizer = methods.multi_objective(
                self.args,
                self.optimizer,
                model,
                one_pass=self._one_pass,
                scaled=self.accelerator.scaler is not None,
            )
        return self.optimizer

    @property
    def _one_pass(self) -> bool:
        # A scaler must scale all that the backward pass computes, which is not so of one pass.
        alone = not self.is_fsdp_enabled and self.accelerator.scaler is None
        return self.args.gradients == "per_example" and alone

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        optimizer = _found(self.optimizer)
        if self.is_fsdp_enabled and optimizer is not None and self.args.should_save:
            sharding.save_own_state(optimizer, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer: Any = _found(self.optimizer)
        if checkpoint is None or optimizer is None:
            return
        if self.is_fsdp_enabled:
            sharding.load_own_state(optimizer, checkpoint)
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
        """As the Trainer's, but with the sums of the weights of labelled pairs, ``[m]``."""
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
            counts = torch.zeros(len(self._names), dtype=torch.float64, device="cpu")
            for batch in batches:
                counts += Preferences.of(batch).sums()
        if self._group is not None:
            [counts] = self._group.sum([counts], self.args.device)
            # The mean over R processes of sums divided by n / R is the mean over n pairs.
            counts = counts / self._group.world_size
        return batches, counts

    def _precompute_ref_logps(self, dataset: Any, name: str, *others: Any) -> Any:  # noqa: ANN401
        if not self.args.needs_reference(training=name == "train") or not self._runs_reference:
            return dataset
        launch.check_stored(dataset, self._group)
        return super()._precompute_ref_logps(dataset, name, *others)

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """As TRL's, which would pass the preferences on to the model."""

        def run(**arguments: Any) -> Any:  # noqa: ANN401
            # FSDP2 has a precision of its own, without the autocast in which TRL calls this.
            with torch.autocast(self.args.device.type, enabled=False):
                return model(**arguments)

        return super().compute_ref_log_probs(
            run if self.is_fsdp_enabled else model, for_the_model(inputs)
        )

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The weighted loss: what is minimised in training, the yardstick in evaluation."""
        with raise_together(self._forward_group):
            scores, outputs = self._forward(model, inputs)
            losses = self._of_objectives(scores, outputs, inputs, num_items_in_batch)
            weights = methods.loss_weights(self.args, training=model.training)
            loss = methods.weighted(losses, weights)
            if loss is None:  # no pair is labelled: nothing to learn, but a graph to go back
                loss = 0 * scores.sum()
            loss = loss + self._auxiliary(outputs)
            with raise_together(self._group if self.is_fsdp_enabled else None):
                if model.training and not loss.isfinite():
                    raise FloatingPointError(
                        "the weighted loss is NaN or Inf; torch.autograd.set_detect_anomaly finds "
                        "the cause"
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
        # Where no process has a label in any micro-batch, nothing is to be learned.
        learns = counts is None or bool(counts.any())
        with self._backward_passes(model):
            with raise_together(self._forward_group):
                with self.compute_loss_context_manager():
                    scores, outputs = self._forward(model, inputs)
                    losses = self._of_objectives(scores, outputs, inputs, counts)
                everywhere = losses
                if self.is_fsdp_enabled:
                    everywhere = sharding.present_in_all(losses, scores, counts)
                scaler = self.accelerator.scaler
                if scaler is not None:
                    everywhere = [x if x is None else scaler.scale(x) for x in everywhere]
                named = dict(zip(self._names, everywhere, strict=True))
                scalars = scores if self._one_pass else None
                auxiliary = self._auxiliary(outputs)
                if self.aux_loss_enabled and learns:
                    # FSDP2 gathers a layer when the gradient of its output comes.
                    through = 0 * scores.sum() if self.is_fsdp_enabled else 0
                    self._add_unmixed(auxiliary + through)
                if not last and any(loss is not None for loss in everywhere):
                    optimizer.backward(named, accumulate=True, scalars=scalars)
            if last and learns:
                if self.aux_loss_enabled and self._forward_group is not None:
                    launch.average_gradients(model, self._forward_group)
                optimizer.backward(named, scalars=scalars)
                if scaler is not None:
                    methods.unscale_report(optimizer, scaler.get_scale(), self.args.nonfinite)
                self._objective_log.add_step(optimizer.report)
        assert isinstance(optimizer.weights, Mapping)
        loss = methods.weighted(losses, optimizer.weights.values())
        zero = torch.zeros((), device=self.args.device)
        return (zero if loss is None else loss.detach()) + auxiliary.detach()

    @contextlib.contextmanager
    def _backward_passes(self, model: Any) -> Iterator[None]:  # noqa: ANN401
        """Sees to it that each loss has a gradient of its own, averaged over the processes."""
        if self.is_fsdp_enabled:  # by its hooks, in every micro-batch
            model.set_requires_gradient_sync(True)
            yield
        else:  # by the optimizer
            with self.accelerator.no_sync(model):
                yield

    def _forward(self, model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Any]:  # noqa: ANN401
        """Returns the log-probabilities of the completions, and all that the model returned."""
        found: list[Any] = []
        options = {"output_router_logits": True} if self.aux_loss_enabled else {}

        def run(**arguments: Any) -> Any:  # noqa: ANN401
            found.append(model(**arguments, **options))
            return found[0]

        return completion_log_probs(run, for_the_model(inputs)), found[0]

    def _auxiliary(self, outputs: Any) -> Tensor:  # noqa: ANN401
        """A mixture of experts' loss of its own, as TRL weighs it; 0 without one."""
        if not self.aux_loss_enabled:
            return torch.zeros((), device=self.args.device)
        batches = self.current_gradient_accumulation_steps if self.model.training else 1
        loss: Tensor = self.router_aux_loss_coef * outputs.aux_loss / batches
        return loss

    def _add_unmixed(self, auxiliary: Tensor) -> None:
        """Adds the gradient of a loss that belongs to no objective to ``.grad``."""
        if not auxiliary.isfinite():
            raise FloatingPointError(f"the auxiliary loss is NaN or Inf; got {auxiliary.item()}")
        scaler = self.accelerator.scaler
        scaled = auxiliary if scaler is None else scaler.scale(auxiliary)
        scaled.backward(retain_graph=True)

    @callbacks.quiet()
    def evaluation_loop(self, *args: Any, **others: Any) -> Any:  # noqa: ANN401
        """As the Trainer's."""
        self._objective_log.begin(training=False)
        output = super().evaluation_loop(*args, **others)
        self._objective_log.end(training=False)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was gathered since the last call."""
        coefficient = self.router_aux_loss_coef if self.aux_loss_enabled else 0.0
        self._objective_log.write(
            logs,
            self.state.log_history,
            training=self.model.training,
            auxiliary=coefficient,
        )
        super().log(logs, start_time)

    def _of_objectives(
        self,
        scores: Tensor,
        outputs: Any,  # noqa: ANN401
        inputs: Mapping[str, Tensor],
        counts: Tensor | None,
    ) -> list[Tensor | None]:
        """One loss per objective, None where it labels no pair."""
        args, training = self.args, self.model.training
        preferences = Preferences.of(inputs)  # once: the losses ask which pairs are labelled
        signs, weights, _ = preferences
        pairs, batches = len(signs), self.accelerator.gradient_state
        if not training and batches.end_of_dataloader and batches.remainder > 0:
            # Accelerate fills the last batch up from the beginning, so that all processes get as
            # many pairs.
            pairs = min(pairs, max(0, batches.remainder - args.process_index * pairs))
            signs[pairs:] = 0
        reference: tuple[Tensor | None, Tensor | None] = (None, None)
        if args.needs_reference(training=training):
            if self.precompute_ref_logps:
                reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
            else:
                model = self.ref_model
                if model is None and (model := self.model) and not self._runs_reference:
                    raise ValueError(
                        f"an evaluation by the loss {', '.join(args.loss_type)} needs a reference "
                        f"model, which the method {args.method} does not. Pass `eval_dataset` "
                        f"when the trainer is made, or a `ref_model`."
                    )
                reference = self.compute_ref_log_probs(model, inputs)
        chosen, rejected = scores.chunk(2)
        tokens = inputs["completion_mask"].sum(1).chunk(2)
        log_probs = PairLogProbs(chosen, rejected, *reference, *tokens)
        losses = methods.losses(args, log_probs, preferences, counts, training=training)
        sums = objective_sums(
            losses,
            methods.margins_of_labelled(args, log_probs, signs, training=training),
            [weight[sign != 0] for sign, weight in zip(signs.T, weights.T, strict=True)],
            preferences.sums() if counts is None else counts,
        )
        common = common_sums(outputs, inputs, log_probs, beta=args.beta, pairs=pairs)
        self._objective_log.add(sums, common, training=training)
        return losses


def _found(optimizer: Any) -> MultiObjectiveOptimizer | None:  # noqa: ANN401
    """Returns the `MultiObjectiveOptimizer` inside an optimizer, None if there is none."""
    try:
        return unwrap(optimizer)
    except TypeError:
        return None
