"""TRL's DPO trainer with one preference loss per objective.

A training step:

    batch with signs [B, m]        preference_data.py   columns pref_<objective> -> a tensor
      |  one forward pass          forward.py           log-probabilities of the completions
      |  m losses                  methods.py           each a mean over the pairs it labels
      |  backward(losses)          raco_optim           gradients, Gram matrix, alpha -> .grad
      v
    Trainer: clipping of the gradient norm, optimizer, scheduler, checkpoints, logs (metrics.py)

The trainer wraps its optimizer in a `MultiObjectiveOptimizer` and calls its ``backward`` in
`training_step`, before the Trainer clips the gradient norm.
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
        f"raco_optim.integrations.trl needs {', '.join(_missing)}. Run: pip install "
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

    The column ``pref_<objective>`` holds the label :math:`s_i` of each pair: +1 if objective i
    prefers ``chosen``, -1 if it prefers ``rejected``, a number between for a weaker preference, 0
    for a tie, null for no label. The optional column ``weight_<objective>`` holds the weights of
    the pairs. One forward pass gives the log-ratio :math:`\Delta` of each pair, and each objective
    its loss, for example

    .. math:: L_i = -\operatorname{mean}_{s_i \ne 0} \log \sigma(\beta s_i \Delta).

    The mean is over all pairs that the objective labels in the accumulated batch, so micro-batches
    and processes (torchrun, with or without FSDP2) don't change it. With the method ``"raco"``,
    `raco_optim.CAGradClip` wraps TRL's optimizer, or the one in ``optimizers``, and combines the
    gradients of the losses before the Trainer clips the norm and steps. Use
    ``raco_optim.unwrap(trainer.optimizer)`` to read its report, or to set its weights and c between
    steps. `MultiObjectiveDPOConfig` describes the other methods, docs/alignment.md the logs.

    Args:
        model: As in TRL: a model or its path. Or the path of adapters saved by peft, to train them
            further; the reference model then includes them.
        ref_model: As in TRL. Must be None if no loss needs it; then none is loaded (SimPO; AMoPO
            without `eval_dataset`).
        args: A `MultiObjectiveDPOConfig`.
        data_collator: As in TRL; the trainer adds the preferences to its batches.
        train_dataset: As in TRL, with columns ``pref_<objective>``. The values of a stream are
            checked batch by batch.
        eval_dataset: As in TRL, with the same columns.
        processing_class: As in TRL.
        **others: As in TRL (``callbacks``, ``optimizers``, ``peft_config``, ...).

    Attributes:
        pair_counts: By argument, ``"train_dataset"``, ``"eval_dataset"`` or
            ``"eval_dataset[<name>]"``, and by objective: the number of ``pairs``, of ``labels``,
            ``ties`` and ``missing`` labels; and of the labels, how many are on pairs that TRL
            ``dropped`` because the prompt has `max_length` tokens or more, that are ``equal`` after
            truncation, or whose answers are ``identical``. Also printed to stderr. Streams are not
            counted.

    Raises:
        TypeError: `args` is not a `MultiObjectiveDPOConfig`.
        ValueError: A column is missing or holds no preferences, an objective labels no pair that
            fits into `max_length`, a setting is not supported, ``metric_for_best_model`` does not
            exist, ``optimizers`` holds a `MultiObjectiveOptimizer`, or, in `train`, the output
            folder holds another run.
        FloatingPointError: In `train`: a loss or a gradient of an objective is NaN or Inf.

    Warns:
        UserWarning: A run resumes with other weights or another radius than in `args`, or more than
            half of an objective's labels are on pairs that teach nothing.

    Note:
        The trainer uses private parts of TRL's `DPOTrainer`, hence ``trl>=1.16,<2``. The loss
        ``"kto_pair"`` estimates its reference point from a micro-batch, so its size matters.

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

    # The losses are means over the accumulated batch; the Trainer must not divide them again.
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
                f"wraps it; got {type(given).__name__}. Set `weights`, `method` and `c` in `args`."
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
                f"method {args.method}, which need no reference; got {type(ref_model).__name__}."
            )
        options, precompute = args.model_init_kwargs, args.precompute_ref_log_probs
        loads_reference = ref_model is None and self._runs_reference and not precompute
        has_adapters = others.get("peft_config") is not None or hasattr(model, "peft_config")
        origin = getattr(getattr(model, "config", None), "_name_or_path", None)
        if loads_reference and not has_adapters and origin == "":
            raise ValueError(
                "`ref_model` must be a copy of a model that was built in memory, because there is "
                "no folder to load it from again; got None. Pass `copy.deepcopy(model)`, or save "
                "the model with `save_pretrained` and load it with `from_pretrained`."
            )
        if adapters.is_folder_of_adapters(model, (options or {}).get("revision")):
            if others.get("peft_config") is not None:
                raise ValueError(
                    f"`peft_config` must be None if `model` is a folder of adapters, which are "
                    f"trained further; got both, and {model!r}. Leave it out (--use_peft and its "
                    f"options), or merge the adapters into their model first."
                )
            quantization = others.pop("quantization_config", None)
            model, processing_class = adapters.load(model, args, quantization, processing_class)
            args.model_init_kwargs = None
        # TRL then loads no reference model, which nothing would use.
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
        if self.optimizer is not None:  # the user's
            self.create_optimizer()
        # Wrapped, not replaced: keeps padding, truncation and a user's collator.
        self.data_collator = preference_data.PreferenceCollator(
            self.data_collator, self._names, args.margin_objectives
        )
        callbacks.add_to(self, step_log=args.method in GRADIENT_METHODS)
        if args.process_index == 0:
            for argument, counts in self.pair_counts.items():
                sys.stderr.write(preference_data.count_table(counts, argument) + "\n")

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; raises ValueError if the model can't be sharded as requested."""
        super().create_accelerator_and_postprocess()
        sharding.prepare(self)
        if self.args.fp16 and self.accelerator.scaler is None:
            raise ValueError(
                f"`fp16` must be False on {self.args.device.type}, where Accelerate scales no "
                f"gradients and trains in float32; got True. Train with bf16=True."
            )

    @property
    def _forward_group(self) -> Group | None:
        """The processes that may vote around a forward pass; None under FSDP, which talks in it."""
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
        """As the Trainer's; raises ValueError if the output folder holds another run."""
        launch.check_start(self, self._group, resume_from_checkpoint)
        self._objective_log.clear()  # an earlier call may have been interrupted
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **others)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:  # noqa: ANN401
        """As the Trainer's; wraps the optimizer for the method."""
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
        # One pass computes values that a scaler would have to scale and does not.
        return self.args.gradients == "per_example" and self.accelerator.scaler is None

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
                    f"the run resumes with `{name}` from its checkpoint, "
                    f"{dict(loaded) if isinstance(loaded, Mapping) else loaded}, not with "
                    f"{value} from `args`. To change it, set raco_optim.unwrap(optimizer).{name} "
                    f"in a callback's on_train_begin.",
                    stacklevel=2,
                )

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Tensor]:  # noqa: ANN401
        """As the Trainer's, but returns the total weight of the labelled pairs, ``[m]``."""
        # An earlier step may have been interrupted.
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
        """As TRL's, without passing the preferences to the model."""

        def run(**arguments: Any) -> Any:  # noqa: ANN401
            # FSDP2 sets the precision itself; TRL calls this under autocast.
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
        """Returns the weighted loss, to minimise in training and to compare in evaluation."""
        with raise_together(self._forward_group):
            scores, outputs = self._forward(model, inputs)
            losses = self._of_objectives(scores, outputs, inputs, num_items_in_batch)
            weights = methods.loss_weights(self.args, training=model.training)
            loss = methods.weighted(losses, weights)
            if loss is None:  # no pair is labelled, but the Trainer calls backward
                loss = 0 * scores.sum()
            loss = loss + self._auxiliary(outputs)
            with raise_together(self._group if self.is_fsdp_enabled else None):
                if model.training and not loss.isfinite():
                    raise FloatingPointError(
                        "the weighted loss is NaN or Inf. Find the cause with "
                        "torch.autograd.set_detect_anomaly(True)."
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
        """Runs forward and backward passes of a micro-batch; the last of a step combines."""
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
        # Without a label in any micro-batch of any process there is nothing to learn.
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
        """Lets each loss average its gradient over the processes."""
        if self.is_fsdp_enabled:  # FSDP's hooks average, in every micro-batch
            model.set_requires_gradient_sync(True)
            yield
        else:  # the optimizer averages
            with self.accelerator.no_sync(model):
                yield

    def _forward(self, model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Any]:  # noqa: ANN401
        """Returns the log-probabilities of the completions, and the model's output."""
        found: list[Any] = []
        options = {"output_router_logits": True} if self.aux_loss_enabled else {}

        def run(**arguments: Any) -> Any:  # noqa: ANN401
            found.append(model(**arguments, **options))
            return found[0]

        return completion_log_probs(run, for_the_model(inputs)), found[0]

    def _auxiliary(self, outputs: Any) -> Tensor:  # noqa: ANN401
        """Returns the load-balancing loss of a mixture of experts, as TRL weights it, or 0."""
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
        """Adds the metrics since the last call."""
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
        """Returns one loss per objective, None if it labels no pair; records the metrics."""
        args, training = self.args, self.model.training
        preferences = Preferences.of(inputs)
        signs, weights, _ = preferences
        pairs, batches = len(signs), self.accelerator.gradient_state
        if not training and batches.end_of_dataloader and batches.remainder > 0:
            # Accelerate fills the last batch with pairs from the start; they must not count twice.
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
                        f"an evaluation with the loss {', '.join(args.loss_type)} needs a "
                        f"reference model, but the method {args.method} loaded none. Pass "
                        f"`eval_dataset` or `ref_model` to the trainer."
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
