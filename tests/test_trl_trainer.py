"""The trainer: its steps against formulas, its limits, its settings, bad input."""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer

from raco_optim import unwrap
from raco_optim.integrations.trl import MultiObjectiveDPOConfig, MultiObjectiveDPOTrainer
from raco_optim.integrations.trl_config import METHODS
from tests import oracles
from tests.tiny_language_models import FAMILIES, tiny_model, tiny_pairs, tiny_tokenizer

# Of TRL, transformers and their friends, about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

WEIGHTS = {"helpful": 0.7, "harmless": 0.3}
THREE = {"a": 0.5, "b": 0.3, "c": 0.2}
BETA = 0.5
Settings = dict[str, Any]
Rows = list[dict[str, Any]]
SGD: Settings = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0}
STEP: Settings = SGD | {"learning_rate": 1.0, "max_steps": 1}
COPY = "a copy of the model"


@functools.cache
def freeze_imports() -> None:
    """Shortens the garbage collection in each run of a Trainer, which takes longer than a step."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    freeze_imports()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return {
        "output_dir": str(tmp_path / "run"),
        "beta": BETA,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }


class Watch(TrainerCallback):
    """Calls a function at one event."""

    def __init__(self, event: str, call: Callable[..., None]) -> None:
        setattr(self, event, lambda _, state, control, **others: call(state, control, **others))


def stop_at(step: int) -> Watch:
    def stop(state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == step

    return Watch("on_step_end", stop)


def config(settings: Settings, **changed: Any) -> MultiObjectiveDPOConfig:
    return MultiObjectiveDPOConfig(**{"weights": dict(WEIGHTS)} | settings | changed)


def make_trainer(
    settings: Settings,
    rows: Rows | Dataset | IterableDataset,
    *,
    model: PreTrainedModel | str | None = None,
    reference: PreTrainedModel | str | None = COPY,
    eval_rows: Any = None,
    peft_config: LoraConfig | None = None,
    others: Settings | None = None,
    **changed: Any,
) -> MultiObjectiveDPOTrainer:
    """A trainer of a tiny model; `others` are arguments of the trainer, `changed` settings."""
    model = tiny_model() if model is None else model
    args = config(settings, **changed)
    if reference is COPY:
        needed = args.needs_reference(training=False) and not args.precompute_ref_log_probs
        reference = copy.deepcopy(model) if needed and peft_config is None else None
    given = {"processing_class": tiny_tokenizer(), "peft_config": peft_config}
    for name, data in (("train_dataset", rows), ("eval_dataset", eval_rows)):
        given[name] = Dataset.from_list(data) if isinstance(data, list) else data
    return MultiObjectiveDPOTrainer(model, reference, args, **given | (others or {}))


def trained(settings: Settings, rows: Any, **changed: Any) -> dict[str, Tensor]:
    trainer = make_trainer(settings, rows, **changed)
    trainer.train()
    return parameters(trainer)


def parameters(trainer: DPOTrainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def logs(trainer: DPOTrainer) -> list[dict[str, float]]:
    """What was logged in training, without times."""
    return [
        {k: x for k, x in entry.items() if not any(t in k for t in ("runtime", "second", "flos"))}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


# --- Formulas on logits, without the library -----------------------------------------------------


def answer_scores(model: PreTrainedModel, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and numbers of tokens of chosen and rejected, ``[2]`` each."""
    tokenizer = tiny_tokenizer()
    prompt = len(tokenizer(row["prompt"])["input_ids"])
    found = []
    for answer in ("chosen", "rejected"):
        ids = torch.tensor([tokenizer(row["prompt"] + row[answer] + "<eos>")["input_ids"]])
        log_probs = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        found.append(log_probs.gather(1, ids[0, 1:, None])[prompt - 1 :, 0])
    return torch.stack([x.sum() for x in found]), torch.tensor([len(x) for x in found])


def log_ratio(model: PreTrainedModel, row: dict[str, Any]) -> Tensor:
    """log pi(chosen) - log pi(rejected)."""
    chosen, rejected = answer_scores(model, row)[0]
    return chosen - rejected


def dpo_by_hand(
    model: PreTrainedModel, reference: PreTrainedModel, rows: Rows, name: str
) -> tuple[Tensor, Tensor]:
    """The DPO loss of an objective, and its reward margins."""
    margins = [
        BETA * row[f"pref_{name}"] * (log_ratio(model, row) - log_ratio(reference, row).detach())
        for row in rows
        if row[f"pref_{name}"]
    ]
    return -logsigmoid(torch.stack(margins)).mean(), torch.stack(margins).detach()


def flat(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double()


def gradient_of(loss: Tensor, model: PreTrainedModel) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in gradients]).double()


def algorithm_1(g: Tensor, weights: list[float], c: float) -> SimpleNamespace:
    """Algorithm 1 on gradients ``[m, n]``, with weights that may sum to less than 1."""
    w = torch.tensor(weights, dtype=torch.float64)
    shares = w / w.sum()
    p = torch.as_tensor(oracles.exact_minimum((g @ g.T).numpy(), shares.numpy(), c).p)
    clipped = torch.minimum(p, shares)
    g0, direction = w @ g, clipped @ g
    correction = c * g0.norm() * direction / direction.norm()
    return SimpleNamespace(step=g0 + correction, p=p, clipped=clipped, correction=correction)


# Below: r are the log-ratios of winners and losers, [2, n], and n their lengths.


def dpo(r: Tensor, _: Tensor, n: Tensor) -> Tensor:
    return -logsigmoid(BETA * (r[0] - r[1])).mean()


def smoothed(r: Tensor, _: Tensor, n: Tensor) -> Tensor:
    x = BETA * (r[0] - r[1])
    return (-0.9 * logsigmoid(x) - 0.1 * logsigmoid(-x)).mean()


def per_token(r: Tensor, _: Tensor, n: Tensor) -> Tensor:
    return -logsigmoid(BETA * (r[0] / n[0] - r[1] / n[1])).mean()


def ipo(r: Tensor, _: Tensor, n: Tensor) -> Tensor:
    return (r[0] / n[0] - r[1] / n[1] - 1 / (2 * BETA)).square().mean()


def simpo(_: Tensor, policy: Tensor, n: Tensor) -> Tensor:
    return -logsigmoid(BETA * (policy[0] / n[0] - policy[1] / n[1]) - 0.2).mean()


def kto(r: Tensor, _: Tensor, n: Tensor) -> Tensor:
    z = r.detach().mean(1).clamp(min=0)
    return (
        1 - (torch.sigmoid(BETA * (r[0] - z[1])) + torch.sigmoid(BETA * (z[0] - r[1]))).mean() / 2
    )


class TestByHand:
    @pytest.mark.parametrize(
        ("loss", "parts", "changed"),
        [
            (dpo, 1, {}),
            (smoothed, 3, {"label_smoothing": 0.1}),
            (per_token, 2, {"loss_type": "sigmoid_norm"}),
            (ipo, 2, {"loss_type": "ipo"}),
            (simpo, 6, {"loss_type": "simpo", "simpo_gamma": 0.2}),
            (kto, 1, {"loss_type": "kto_pair"}),
        ],
        ids=lambda value: value.__name__ if callable(value) else "",
    )
    def test_step_is_that_of_algorithm_1(
        self, settings: Settings, loss: Callable[..., Tensor], parts: int, changed: Settings
    ) -> None:
        """From logits to the update of SGD and the log; the columns are in another order."""
        rows = tiny_pairs(6, ("c", "a", "b"), missing=0.3, seed=1)
        model, reference, c = tiny_model(seed=1), tiny_model(seed=2), 0.7
        policy = [answer_scores(model, row) for row in rows]
        old = [answer_scores(reference, row)[0].detach() for row in rows]
        losses = []
        for name in THREE:
            order = [
                (i, [0, 1][:: row[f"pref_{name}"]])
                for i, row in enumerate(rows)
                if row[f"pref_{name}"]
            ]
            score = torch.stack([policy[i][0][js] for i, js in order], 1)
            before = torch.stack([old[i][js] for i, js in order], 1)
            tokens = torch.stack([policy[i][1][js] for i, js in order], 1)
            losses.append(loss(score - before, score, tokens))
        g = torch.stack([gradient_of(x, model) for x in losses])
        truth = algorithm_1(g, list(THREE.values()), c)
        start = flat(model)
        batches = {"per_device_train_batch_size": 6 // parts, "gradient_accumulation_steps": parts}
        options = settings | STEP | batches | changed | {"weights": THREE, "c": c}
        given = None if loss is simpo else reference
        trainer = make_trainer(options, rows, model=model, reference=given)
        trainer.train()
        torch.testing.assert_close(start - flat(model), truth.step, rtol=1e-4, atol=1e-6)
        [logged] = logs(trainer)
        total = sum(w * x.item() for w, x in zip(THREE.values(), losses, strict=True))
        assert logged["loss"] == pytest.approx(total, rel=1e-4)
        for i, name in enumerate(THREE):
            assert logged[f"loss/{name}"] == pytest.approx(losses[i].item(), rel=1e-5)
            assert logged[f"p/{name}"] == pytest.approx(truth.p[i].item(), abs=1e-5)
            assert logged[f"p_clipped/{name}"] == pytest.approx(truth.clipped[i].item(), abs=1e-5)
            assert logged[f"grad_norm/{name}"] == pytest.approx(g[i].norm().item(), rel=1e-4)
        cosine = torch.cosine_similarity(g[0], g[1], dim=0).item()
        assert logged["cosine/a/b"] == pytest.approx(cosine, abs=1e-5)

    def test_step_of_modpo(self, settings: Settings) -> None:
        rows = [
            row | {"margin_harmless": 0.7 * (i - 2)}
            for i, row in enumerate(tiny_pairs(4, missing=0.3))
        ]
        model, reference = tiny_model(seed=1), tiny_model(seed=2)
        terms = []
        for row in rows:
            ratio = log_ratio(model, row) - log_ratio(reference, row).detach()
            x = BETA * ratio - WEIGHTS["harmless"] * row["margin_harmless"]
            if row["pref_helpful"]:
                terms.append(-logsigmoid(row["pref_helpful"] * x / WEIGHTS["helpful"]))
        expected = gradient_of(torch.stack(terms).mean(), model)
        start = flat(model)
        options = settings | STEP | {"method": "modpo", "gradient_accumulation_steps": 2}
        options |= {"per_device_train_batch_size": 2}
        trained(options, rows, model=model, reference=reference)
        torch.testing.assert_close(start - flat(model), expected, rtol=1e-4, atol=1e-6)

    def test_evaluation_is_over_all_labelled_pairs(self, settings: Settings) -> None:
        rows = tiny_pairs(8, missing=0.4, seed=5)
        model, reference = tiny_model(seed=1), tiny_model(seed=2)
        trainer = make_trainer(settings, rows, model=model, reference=reference, eval_rows=rows)
        metrics, total = trainer.evaluate(), 0.0
        for name, weight in WEIGHTS.items():
            loss, margins = dpo_by_hand(model, reference, rows, name)
            total += weight * loss.item()
            assert metrics[f"eval_labelled/{name}"] == len(margins)
            assert metrics[f"eval_loss/{name}"] == pytest.approx(loss.item(), rel=1e-4)
            mean = margins.mean().item()
            assert metrics[f"eval_margin/{name}"] == pytest.approx(mean, rel=1e-3, abs=1e-6)
            right = (margins > 0).double().mean().item()
            assert metrics[f"eval_accuracy/{name}"] == pytest.approx(right)
        assert metrics["eval_loss"] == pytest.approx(total, rel=1e-4)

    def test_clipping_sees_the_combined_gradient(self, settings: Settings) -> None:
        trainer = make_trainer(settings | STEP | {"max_grad_norm": 0.05}, tiny_pairs(8))
        start = flat(trainer.model)
        trainer.train()
        assert (flat(trainer.model) - start).norm().item() == pytest.approx(0.05, rel=1e-3)
        assert logs(trainer)[0]["grad_norm"] > 0.05


class TestLimits:
    def test_zero_radius_is_the_weighted_sum(self, settings: Settings) -> None:
        rows = tiny_pairs(8, missing=0.3)
        linear = trained(settings, rows, method="linear")
        for method in ("raco", "cagrad"):
            assert_close(trained(settings, rows, method=method, c=0.0), linear, 1e-5)

    def test_one_objective_is_dpo(self, settings: Settings) -> None:
        """m = 1: p = w = 1, so the gradient is 1 + c times as long."""
        rows, one = tiny_pairs(8), SGD | {"weights": {"helpful": 1.0}}
        raco = trained(settings, rows, c=0.25, **one | {"learning_rate": 0.1})
        dpo = trained(settings, rows, method="linear", **one | {"learning_rate": 0.125})
        assert_close(raco, dpo, 1e-6)

    @pytest.mark.parametrize("method", ["linear", "amopo"])
    def test_micro_batches_change_nothing(self, settings: Settings, method: str) -> None:
        rows = tiny_pairs(16, missing=0.5, seed=7)
        whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
        a = trained(settings, rows, method=method, **whole)
        assert_close(a, trained(settings, rows, method=method, **parts), 1e-4)

    @pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
    def test_one_backward_pass_and_checkpointing_change_nothing(
        self, settings: Settings, adapters: bool
    ) -> None:
        lora = LoraConfig(r=2, target_modules="all-linear") if adapters else None
        seen: list[str] = []
        record = Watch(
            "on_pre_optimizer_step",
            lambda *_, optimizer, **__: seen.append(unwrap(optimizer).report.gradients),
        )
        ends = []
        for mode in ("dense", "per_example"):
            for checkpointing in (False, True):
                trainer = make_trainer(
                    settings,
                    tiny_pairs(16, missing=0.3),
                    peft_config=lora,
                    gradient_accumulation_steps=2,
                    gradient_checkpointing=checkpointing,
                    **({"gradients": "dense"} if mode == "dense" else {}),
                )
                trainer.add_callback(record)
                trainer.train()
                ends.append(parameters(trainer))
        assert seen == ["dense"] * 4 + ["per_example"] * 4
        assert_close(ends[1], ends[0], 1e-6)
        assert_close(ends[2], ends[0], 1e-5)
        assert_close(ends[3], ends[2], 1e-6)

    def test_precomputed_reference_changes_nothing(self, settings: Settings) -> None:
        rows = tiny_pairs(8)
        plain, early = (
            make_trainer(settings, rows, eval_rows=rows, precompute_ref_log_probs=early)
            for early in (False, True)
        )
        plain.train()
        early.train()
        assert_close(parameters(plain), parameters(early), 1e-5)
        a, b = (trainer.evaluate()["eval_loss"] for trainer in (plain, early))
        assert a == pytest.approx(b, rel=1e-5)

    @pytest.mark.parametrize("method", METHODS)
    def test_batch_without_labels_moves_nothing(self, settings: Settings, method: str) -> None:
        rows = [row | {"pref_helpful": 0, "pref_harmless": None} for row in tiny_pairs(4)]
        rows += tiny_pairs(1)  # for a later step, which is not taken
        rows = [row | {"margin_harmless": 0.5} for row in rows]
        settings |= {"max_steps": 1, "weight_decay": 0.0}
        start = {n: p.detach() for n, p in tiny_model().named_parameters()}
        assert_close(trained(settings, rows, method=method), start, 0.0)


class TestSettings:
    @pytest.mark.parametrize(
        ("family", "lora"),
        [*((family, True) for family in FAMILIES), ("qwen3", False), ("gemma3", False)],
    )
    def test_families_of_models(self, settings: Settings, family: str, lora: bool) -> None:
        """bf16 autocast, checkpointing, accumulation, three objectives, a scheduler."""
        settings |= {"weights": THREE, "bf16": True, "gradient_checkpointing": True}
        settings |= {"gradient_accumulation_steps": 2}
        settings |= {"lr_scheduler_type": "cosine", "warmup_steps": 1}
        trainer = make_trainer(
            settings,
            tiny_pairs(16, tuple(THREE), missing=0.3),
            model=tiny_model(family),
            eval_rows=tiny_pairs(5, tuple(THREE)),
            peft_config=LoraConfig(r=2, target_modules="all-linear") if lora else None,
        )
        start = parameters(trainer)
        trainer.train()
        end = parameters(trainer)
        assert any(not torch.equal(start[name], end[name]) for name in start)
        assert all("lora" in name for name in start) or not lora
        metrics, logged = trainer.evaluate(), logs(trainer)[0]
        for name, weight in THREE.items():
            assert math.isfinite(metrics[f"eval_loss/{name}"])
            assert 0 <= logged[f"p_clipped/{name}"] <= weight + 1e-12
        assert logged["gap"] <= 1e-9

    def test_new_pairs_arrive_while_training(self, settings: Settings) -> None:
        seen = []

        def stream() -> Iterator[dict[str, Any]]:
            for i in range(100):
                seen.append(i)
                yield tiny_pairs(1, seed=i)[0]

        trainer = make_trainer(settings, IterableDataset.from_generator(stream), max_steps=3)
        start = flat(trainer.model)
        trainer.train()
        assert trainer.state.global_step == 3
        assert not torch.equal(start, flat(trainer.model))
        assert max(seen) < 30, "the stream is read as far as it is needed"

    def test_new_evaluation_set(self, settings: Settings) -> None:
        """With untrained adapters the policy is the reference."""
        settings |= {"precompute_ref_log_probs": True}
        trainer = make_trainer(settings, PAIRS, peft_config=LoraConfig(r=2))
        metrics = trainer.evaluate(Dataset.from_list(tiny_pairs(5, seed=8)))
        for name in WEIGHTS:
            assert metrics[f"eval_labelled/{name}"] == 5
            assert metrics[f"eval_loss/{name}"] == pytest.approx(math.log(2))


# --- Bad input -----------------------------------------------------------------------------------

PAIRS = tiny_pairs(4)
LONG = [row | {"pref_helpful": 0} for row in PAIRS] + [tiny_pairs(1)[0] | {"prompt": "the " * 40}]
CUT = {"max_length": 30}
MODPO = {"method": "modpo"}
REENTRANT = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
}


def without(column: str) -> Rows:
    return [{k: v for k, v in row.items() if k != column} for row in PAIRS]


def each(**columns: object) -> Rows:
    return [row | columns for row in PAIRS]


def stream_of(*rows: dict[str, Any]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


class TestBadInput:
    @pytest.mark.parametrize(
        ("match", "rows", "changed"),
        [
            (
                "`train_dataset` must have the column `pref_brief`; it has prompt, chosen",
                PAIRS,
                {"weights": {"helpful": 0.5, "brief": 0.5}},
            ),
            ("`eval_.* column `pref_harm", PAIRS, {"eval_rows": without("pref_harmless")}),
            ("`train_.* column `chosen`; it has prompt, .* A pair is", without("chosen"), {}),
            ("`train_.* column `rejected`; it has prompt, .* A pair is", without("rejected"), {}),
            *(
                (r"column `pref_helpful` must hold \+1 .* got", each(pref_helpful=value), {})
                for value in ("yes", 1.5, 2, True)
            ),
            ("must label at least one pair in `pref_helpful`", each(pref_helpful=0), {}),
            ("must label at least one pair in `pref_helpful`", each(weight_helpful=0), {}),
            *(
                ("column `weight_helpful` must hold weights", each(weight_helpful=value), {})
                for value in (-1.0, math.inf, "heavy")
            ),
            ("`train_dataset` must label .* `pref_helpful` .* `max_length` = 30", LONG, CUT),
            ("`eval_dataset` must label .* `pref_help", PAIRS, CUT | {"eval_rows": LONG}),
            ("`train_dataset` must hold at least one pair", stream_of(), {}),
            ("must have the column `margin_harmless`", PAIRS, MODPO),
            ("`margin_harmless` must hold .* got nan", each(margin_harmless=math.nan), MODPO),
            ("`train_dataset` must not have images", each(images=["x.png"]), {}),
            ("`compute_metrics` must be", PAIRS, {"others": {"compute_metrics": lambda _: {}}}),
            ("`ref_model` must be a copy of a model .* got None", PAIRS, {"reference": None}),
        ],
        ids=lambda value: value.strip("`")[:40] if isinstance(value, str) else "",
    )
    def test_arguments(self, settings: Settings, match: str, rows: Any, changed: Settings) -> None:
        with pytest.raises(ValueError, match=match):
            make_trainer(settings, rows, **changed)
        folder = Path(settings["output_dir"])
        assert not folder.exists() or not any(folder.iterdir())

    def test_types(self, settings: Settings) -> None:
        with pytest.raises(TypeError, match="`train_dataset` must be a `Dataset`"):
            make_trainer(settings, DatasetDict(train=Dataset.from_list(PAIRS)))
        with pytest.raises(TypeError, match="`args` must be a MultiObjectiveDPOConfig"):
            MultiObjectiveDPOTrainer(tiny_model(), None, DPOConfig(**settings))

    def test_stream_with_a_bad_value(self, settings: Settings) -> None:
        trainer = make_trainer(settings, stream_of(*PAIRS, PAIRS[0] | {"pref_helpful": 7}))
        with pytest.raises(ValueError, match=r"column `pref_helpful` must hold .* got 7"):
            trainer.train()

    def test_predictions(self, settings: Settings) -> None:
        with pytest.raises(ValueError, match="predictions are not computed"):
            make_trainer(settings, PAIRS).predict(Dataset.from_list(PAIRS))

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"weights": {"helpful": 0.7, "harmless": 0.7}}, "`weights` must sum to 1"),
            ({"weights": "helpful=0.7;harmless"}, "`weights` must be of the form"),
            ({"weights": "helpful=0.7,helpful=0.3"}, "each name once"),
            ({"weights": None}, "`weights` must map objectives to weights"),
            ({"weights": {}}, "`weights` must map objectives to weights"),
            ({"method": "pcgrad"}, "`method` must be one of"),
            (MODPO | {"modpo_objective": "brief"}, "`modpo_objective` must be one of"),
            (
                MODPO | {"weights": {"helpful": 0.0, "harmless": 1.0}},
                "`weights` must be positive for `modpo_objective`",
            ),
            ({"nonfinite": "propagate"}, "`nonfinite` must be one of 'raise', 'skip'"),
            *(
                (
                    {"method": method, "nonfinite": "skip"},
                    f"`nonfinite` must be 'raise' with .*'{method}'",
                )
                for method in ("linear", "amopo", "modpo")
            ),
            ({"c": 1.0}, r"`c` must be in \[0, 1\)"),
            ({"method": "cagrad", "c": -1.0}, "`c` must be finite and non-negative"),
            ({"solver": "newton"}, "`solver` must be one of"),
            ({"beta": 0.0}, "`beta` must be a number above 0"),
            ({"label_smoothing": 0.5}, "`label_smoothing` must be a number 0 or more and below"),
            ({"loss_type": ["simpo"], "simpo_gamma": -1.0}, "`simpo_gamma` must be a number 0 or"),
            ({"optim": "lomo"}, "`optim` must step after the backward pass"),
            ({"loss_type": ["sigmoid", "exo_pair"]}, "`loss_type` must be one of"),
            ({"loss_type": []}, "`loss_type` must name at least one loss"),
            ({"loss_weights": [0.0]}, "`loss_weights` must not all be 0"),
            ({"loss_weights": [-1.0]}, "`loss_weights` must be a number 0 or more"),
            ({"loss_type": ["simpo"], "sync_ref_model": True}, "`sync_ref_model` must be False"),
            ({"loss_type": ["ipo"], "label_smoothing": 0.1}, "`label_smoothing` must be 0"),
            ({"method": "amopo", "label_smoothing": 0.1}, "`label_smoothing` must be 0"),
            ({"simpo_gamma": 0.1}, r"`simpo_gamma` must be 0 with \['sigmoid'\]"),
            ({"ld_alpha": 0.5}, "`ld_alpha` must be None"),
            ({"f_divergence_type": "js_divergence"}, "`f_divergence_type` must be"),
            ({"use_weighting": True}, "`use_weighting` must be False"),
            ({"activation_offloading": True}, "`activation_offloading` must be False"),
            ({"use_liger_kernel": True}, "`use_liger_kernel` must be False"),
            (REENTRANT, "`gradient_checkpointing_kwargs` must not ask for reentrant"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
    )
    def test_setting(self, settings: Settings, changed: Settings, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            config(settings, **changed)

    @pytest.mark.parametrize(
        ("method", "match"),
        [("raco", 'loss .helpful. is NaN .* nonfinite="skip"'), ("linear", "NaN or Inf")],
    )
    def test_nan_changes_nothing(self, settings: Settings, method: str, match: str) -> None:
        trainer = make_trainer(settings, tiny_pairs(8), method=method)
        with torch.no_grad():
            trainer.model.model.norm.weight[0] = math.nan
        before = flat(trainer.model)
        with pytest.raises(FloatingPointError, match=match):
            trainer.train()
        assert torch.equal(before.nan_to_num(), flat(trainer.model).nan_to_num())
