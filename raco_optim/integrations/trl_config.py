"""The settings of `MultiObjectiveDPOTrainer`: TRL's `DPOConfig` plus weights, method and radius."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from trl import DPOConfig

from raco_optim._checks import checked_choice, checked_radius, checked_weights
from raco_optim.alignment._checks import checked_number
from raco_optim.alignment.losses import REFERENCE_FREE, SMOOTHED, LossForm, PreferenceLoss
from raco_optim.integrations.launch import check_processes
from raco_optim.integrations.metrics import lower_is_better
from raco_optim.integrations.sharding import refused
from raco_optim.subproblem.solve import SOLVERS, Solver

# Methods that combine the gradients of the objectives; the others minimise one loss.
GRADIENT_METHODS = ("raco", "cagrad", "mgda")
METHODS = (*GRADIENT_METHODS, "linear", "amopo", "modpo")
Method = Literal["raco", "cagrad", "mgda", "linear", "amopo", "modpo"]

# TRL's name of a loss -> the loss of `raco_optim.alignment`, and whether it divides by the length.
LOSS_TYPES: dict[str, tuple[PreferenceLoss, bool]] = {
    "sigmoid": ("dpo", False),
    "sigmoid_norm": ("dpo", True),
    "ipo": ("ipo", True),
    "simpo": ("simpo", True),
    "kto_pair": ("kto", False),
    "hinge": ("hinge", False),
    "robust": ("robust", False),
    "apo_zero": ("apo_zero", False),
    "apo_down": ("apo_down", False),
    "bco_pair": ("bco", False),
    "sft": ("sft", True),
}

# TRL's settings that the losses per objective don't support, with their defaults.
_NOT_HONOURED = {
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "use_weighting": False,
    "activation_offloading": False,
    "use_liger_kernel": False,
    "torch_empty_cache_steps": None,
    "label_smoothing_factor": 0.0,
    "discopop_tau": 0.05,
    "f_alpha_divergence_coef": 0.5,
}


@dataclass
class MultiObjectiveDPOConfig(DPOConfig):  # type: ignore[misc]  # TRL is not type-checked
    r"""TRL's `DPOConfig` with one weight per objective.

    The fields of `DPOConfig` keep their names, meanings and defaults. These must keep their
    default, because losses per objective don't support them: ``ld_alpha``, ``f_divergence_type``,
    ``use_weighting``, ``activation_offloading``, ``use_liger_kernel``, ``deepspeed``,
    ``torch_empty_cache_steps`` and ``label_smoothing_factor``. A field without effect, such as `c`
    with the method ``"linear"``, gives a warning.

    Args:
        weights: Objective -> weight :math:`w_i \ge 0`; they sum to 1. Also as a string,
            ``"helpful=0.7,harmless=0.3"``. The objective ``helpful`` reads ``pref_helpful``.
        method: How to turn the losses :math:`L_i` into one update.
            ``"raco"``: CAGrad-Clip (`raco_optim.CAGradClip`).
            ``"cagrad"``: weighted CAGrad (`raco_optim.CAGrad`).
            ``"mgda"``: the min-norm point (`raco_optim.MGDA`), which ignores the weights.
            ``"linear"``: the weighted sum :math:`\sum_i w_i L_i`, in one backward pass.
            ``"amopo"``: the static AMoPO loss (`raco_optim.alignment.amopo_losses`).
            ``"modpo"``: the MODPO loss (`raco_optim.alignment.modpo_loss`), with reward margins
            from the columns ``margin_<objective>``.
        c: Radius of the correction relative to the weighted gradient: in [0, 1) for ``"raco"``,
            >= 0 for ``"cagrad"``. The default is the paper's; if preferences keep conflicting,
            0.1 to 0.2 worked better (docs/evidence.md).
        solver: ``"exact"``, ``"pgd"`` or ``"slsqp"``; see `raco_optim.solve_subproblem`.
        nonfinite: What to do if a loss or gradient of an objective is NaN or Inf. ``"raise"``: a
            `FloatingPointError` that names it. ``"skip"``: skip the update and log the number of
            skipped ones (``"raco"``, ``"cagrad"`` and ``"mgda"`` only). With ``fp16`` the scaler
            skips overflows in both cases, and ``"raise"`` checks only the losses.
        gradients: How ``"raco"``, ``"cagrad"`` and ``"mgda"`` compute the gradients of the
            objectives. ``"per_example"``: in one backward pass where the layers allow it (see
            docs/cost.md). ``"dense"``: in one pass per objective, as always under FSDP2 and with
            ``fp16``. Both are exact.
        modpo_objective: The objective whose preferences MODPO learns from; the others contribute
            their margins. Default: the first of `weights`.
        simpo_gamma: Target margin of the loss type ``"simpo"``, >= 0.
        loss_type: TRL's field: the loss of each objective in training (except ``"amopo"`` and
            ``"modpo"``) and in evaluation. ``"sigmoid"`` (DPO), ``"sigmoid_norm"`` (DPO with
            log-probabilities per token), ``"hinge"``, ``"robust"``, ``"ipo"``, ``"apo_zero"``,
            ``"apo_down"``, ``"bco_pair"``, ``"kto_pair"``, or, without a reference model,
            ``"simpo"`` and ``"sft"``. A list such as ``["sigmoid", "sft"]`` (RPO) is summed; the
            first loss defines margins and accuracies.
        loss_weights: TRL's field: one factor per entry of `loss_type`. Default: 1.
        label_smoothing: TRL's field, in [0, 0.5). It smooths ``"robust"``, ``"simpo"`` and, unlike
            in TRL, ``"sigmoid"`` and ``"sigmoid_norm"`` (conservative DPO).
        greater_is_better: The Trainer's field. The default is right for every metric of the
            trainer: low losses, high margins and accuracies.

    Raises:
        ValueError: A field is out of range or not supported; the message names it.

    Example:
        >>> from raco_optim.integrations.trl import MultiObjectiveDPOConfig
        >>> config = MultiObjectiveDPOConfig(
        ...     "out", weights="helpful=0.7,harmless=0.3", bf16=False, report_to="none"
        ... )
        >>> config.weights, config.method, config.c
        ({'helpful': 0.7, 'harmless': 0.3}, 'raco', 0.4)
    """

    weights: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "Objectives and weights, as helpful=0.7,harmless=0.3; they sum to 1."},
    )
    method: Method = field(
        default="raco", metadata={"help": "How to combine the objectives into one update."}
    )
    c: float = field(
        default=0.4,
        metadata={"help": "Radius of the correction: in [0, 1) for raco, >= 0 for cagrad."},
    )
    solver: Solver = field(default="exact", metadata={"help": "Solver of the subproblem."})
    nonfinite: Literal["raise", "skip"] = field(
        default="raise",
        metadata={"help": "Raise an error or skip the update if a loss is NaN or Inf."},
    )
    gradients: Literal["per_example", "dense"] = field(
        default="per_example",
        metadata={"help": "One backward pass for all objectives, or one for each."},
    )
    modpo_objective: str | None = field(
        default=None,
        metadata={"help": "The objective whose preferences MODPO uses (default: the first)."},
    )
    simpo_gamma: float = field(
        default=0.0, metadata={"help": "Target margin of the loss type simpo, >= 0."}
    )

    def __post_init__(self) -> None:
        weights = parsed_weights(self.weights)
        self.weights = dict(zip(weights, checked_weights(weights), strict=True))
        checked_choice("method", self.method, METHODS)
        checked_choice("solver", self.solver, SOLVERS)
        checked_choice("nonfinite", self.nonfinite, ("raise", "skip"))
        checked_choice("gradients", self.gradients, ("per_example", "dense"))
        if self.nonfinite != "raise" and self.method not in GRADIENT_METHODS:
            raise ValueError(
                f"`nonfinite` must be 'raise' with the method {self.method!r}; got "
                f"{self.nonfinite!r}. Leave it out, or choose one of the methods "
                f"{', '.join(GRADIENT_METHODS)}."
            )
        if self.method in ("raco", "cagrad"):
            checked_radius(self.c, below_one=self.method == "raco")
        if self.method == "modpo":
            self.modpo_objective = self.modpo_objective or next(iter(self.weights))
            checked_choice("modpo_objective", self.modpo_objective, tuple(self.weights))
            if self.weights[self.modpo_objective] == 0:
                raise ValueError(
                    f"`weights` must be positive for `modpo_objective`, {self.modpo_objective!r}; "
                    f"got 0. Choose an objective with a positive weight."
                )
        wished = self.greater_is_better
        # TRL sets fields that transformers has renamed; the new names avoid its warning.
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            new = old.replace("gradient", "activation")
            if getattr(self, new, True) is None:
                setattr(self, new, getattr(self, old))
        super().__post_init__()
        self._check_loss()
        self._check_effect()
        self._check_honoured()
        self._direct_metric(wished)

    @property
    def objective_weights(self) -> dict[str, float]:
        """The weights as a mapping, in order."""
        assert isinstance(self.weights, dict)
        return self.weights

    @property
    def margin_objectives(self) -> list[str]:
        """The objectives whose reward margins the method reads: MODPO's other objectives."""
        if self.method != "modpo":
            return []
        return [name for name in self.objective_weights if name != self.modpo_objective]

    @property
    def loss_forms(self) -> list[tuple[float, LossForm]]:
        """The terms of `loss_type`: factors, and arguments for `preference_losses`."""
        forms = []
        factors = self.loss_weights or [1.0] * len(self.loss_type)
        for factor, name in zip(factors, self.loss_type, strict=True):
            loss, per_token = LOSS_TYPES[name]
            form = LossForm(loss=loss, beta=self.beta, length_normalized=per_token)
            if loss in SMOOTHED:
                form["label_smoothing"] = self.label_smoothing
            if loss == "simpo":
                form["gamma"] = self.simpo_gamma
            forms.append((factor, form))
        return forms

    def needs_reference(self, *, training: bool) -> bool:
        """Returns whether the losses need log-probabilities under the reference model."""
        if training and self.method in ("amopo", "modpo"):
            return self.method == "modpo"
        return any(form["loss"] not in REFERENCE_FREE for _, form in self.loss_forms)

    def _check_loss(self) -> None:
        checked_number("beta", self.beta, positive=True)
        checked_number("label_smoothing", self.label_smoothing, below=0.5)
        checked_number("simpo_gamma", self.simpo_gamma)
        if not self.loss_type:
            raise ValueError("`loss_type` must name at least one loss; got none.")
        for name in self.loss_type:
            checked_choice("loss_type", name, tuple(LOSS_TYPES))
        for factor in self.loss_weights or []:
            checked_number("loss_weights", factor)
        if not any(self.loss_weights or [1.0]):
            raise ValueError(f"`loss_weights` must not all be 0; got {self.loss_weights}.")
        smoothed = self.method not in ("amopo", "modpo") and any(
            form["loss"] in SMOOTHED for _, form in self.loss_forms
        )
        if self.label_smoothing and not smoothed:
            one = self.method if self.method in ("amopo", "modpo") else self.loss_type
            raise ValueError(
                f"`label_smoothing` must be 0 with {one!r}; got {self.label_smoothing}."
            )
        if "robust" in self.loss_type and not self.label_smoothing:
            warnings.warn(
                "the loss 'robust' with label_smoothing=0 equals 'sigmoid'. Set `label_smoothing` "
                "to the fraction of labels that may be wrong, such as 0.1.",
                stacklevel=4,
            )
        if self.simpo_gamma and "simpo" not in self.loss_type:
            raise ValueError(
                f"`simpo_gamma` must be 0 with {self.loss_type!r}; got {self.simpo_gamma}."
            )

    def _check_effect(self) -> None:
        """Warns about settings that have no effect."""
        if self.sync_ref_model and not self.needs_reference(training=True):
            raise ValueError(
                f"`sync_ref_model` must be False with the method {self.method!r} and the loss "
                f"{', '.join(self.loss_type)}, which need no reference model; got True."
            )
        defaults = {f.name: f.default for f in fields(self)}
        for name, (setting, value) in self.without_effect().items():
            got = vars(self)[name]
            if got != defaults[name]:
                warnings.warn(
                    f"`{name}` has no effect unless `{setting}` is {value}; got {got!r}. Leave it "
                    f"out.",
                    stacklevel=4,
                )

    def without_effect(self) -> dict[str, tuple[str, str]]:
        """Returns the settings without effect, each with the setting and the value it needs."""
        ever = any(self.needs_reference(training=x) for x in (True, False))
        # Names, the setting and value that they need, and whether it has that value.
        rules = [
            ("c solver", ("method", "raco or cagrad"), self.method in ("raco", "cagrad")),
            (
                "gradients",
                ("method", f"{', '.join(GRADIENT_METHODS[:-1])} or {GRADIENT_METHODS[-1]}"),
                self.method in GRADIENT_METHODS,
            ),
            ("modpo_objective", ("method", "modpo"), self.method == "modpo"),
            ("precompute_ref_log_probs", ("loss_type", "with a reference model"), ever),
            (
                "precompute_ref_batch_size",
                ("precompute_ref_log_probs", "true"),
                self.precompute_ref_log_probs,
            ),
            (
                "ref_model_mixup_alpha ref_model_sync_steps",
                ("sync_ref_model", "true"),
                self.sync_ref_model,
            ),
            ("eval_steps", ("eval_strategy", "steps"), self.eval_strategy == "steps"),
            ("save_steps", ("save_strategy", "steps"), self.save_strategy == "steps"),
            ("num_train_epochs", ("max_steps", "to be left out"), self.max_steps <= 0),
        ]
        return {n: needs for names, needs, there in rules if not there for n in names.split()}

    def _direct_metric(self, wished: bool | None) -> None:
        """Sets `greater_is_better`, and the mode of a scheduler that follows the metric."""
        metric = self.metric_for_best_model
        lower = None if metric is None else lower_is_better(metric, self.objective_weights)
        if lower is not None:
            self.greater_is_better = not lower
        if wished is not None and wished != self.greater_is_better:
            self.greater_is_better = wished
            if lower is not None:
                warnings.warn(
                    f"`greater_is_better`={wished} selects the worst model, because {metric!r} "
                    f"should be {'low' if lower else 'high'}. Leave it out.",
                    stacklevel=4,
                )
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            mode = "max" if self.greater_is_better else "min"
            wanted = self.lr_scheduler_kwargs or {}  # type: ignore[has-type]
            self.lr_scheduler_kwargs = {"mode": mode} | wanted

    def _check_honoured(self) -> None:
        for name, default in _NOT_HONOURED.items():
            value = vars(self)[name]
            if value != default:
                raise ValueError(
                    f"`{name}` must be {default!r}; got {value!r}. MultiObjectiveDPOTrainer does "
                    f"not support it."
                )
        check_processes(self)
        for name in ("deepspeed", "parallelism_config"):
            if vars(self)[name]:
                raise ValueError(refused(f"`{name}`"))
        if self.fsdp and int(self.fsdp_config.get("version", 2)) != 2:
            raise ValueError(refused("FSDP of version 1"))
        combines = self.method in GRADIENT_METHODS
        if combines and re.search("layerwise|lomo", str(self.optim), re.IGNORECASE):
            raise ValueError(
                f"`optim` must step after the backward pass, not in it, because the gradients are "
                f"combined in between; got {self.optim}. Choose another, such as adamw_torch."
            )
        if combines and self.ddp_static_graph:
            raise ValueError(
                f"`ddp_static_graph` must be False with the method {self.method!r}, whose "
                f"gradients do not pass through DistributedDataParallel; got True. Leave it out."
            )
        reentrant = (self.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        if self.gradient_checkpointing and reentrant and combines:
            raise ValueError(
                "`gradient_checkpointing_kwargs` must not ask for reentrant checkpointing, which "
                "gives no gradients per objective; got use_reentrant=True. Leave it out."
            )


def parsed_weights(weights: Mapping[str, float] | str | None) -> dict[str, float]:
    """Returns the weights as a mapping, also from ``name=number,name=number``, or raises."""
    if isinstance(weights, str):
        parsed: dict[str, float] = {}
        for item in weights.split(","):
            name, _, number = (part.strip() for part in item.partition("="))
            try:
                value = float(number)
            except ValueError:
                name = ""
            if not name or name in parsed:
                raise ValueError(
                    f"`weights` must be of the form helpful=0.7,harmless=0.3, each name once; got "
                    f"{weights!r}."
                )
            parsed[name] = value
        return parsed
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(
            f"`weights` must map objectives to weights, such as {{'helpful': 0.7, 'harmless': 0.3}}"
            f" or helpful=0.7,harmless=0.3; got {weights!r}."
        )
    return dict(weights)
