"""Around the training: counts of pairs, the best model, adapters, logs, the model card."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, trainer_callback
from trl import DPOConfig, DPOTrainer

from raco_optim import read_steps
from raco_optim.integrations.gguf import name_base
from raco_optim.integrations.metrics import evaluation_metrics
from raco_optim.plot import overview
from tests import test_trl_trainer as base
from tests.test_trl_settings import lora, moved_adapters, stream
from tests.test_trl_trainer import (
    SGD,
    WEIGHTS,
    Settings,
    assert_close,
    config,
    make_trainer,
    parameters,
)
from tests.tiny_language_models import tiny_model, tiny_pairs, tiny_tokenizer

pytestmark = base.pytestmark
offline, settings = base.offline, base.settings


SAVED: Settings = {"save_strategy": "steps", "save_steps": 1}


class TestCounts:
    def test_of_every_kind(self, settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
        row = {"prompt": "we show ", "chosen": "the data", "rejected": "a paper"}
        row |= {"pref_helpful": 1, "pref_harmless": -1, "weight_harmless": 1.0}
        rows = [
            *[row] * 4,
            row | {"pref_helpful": 0},
            row | {"pref_helpful": None},
            row | {"weight_harmless": 0.0},
            row | {"prompt": "the " * 20, "pref_harmless": None},
            row | {"prompt": "the " * 9, "chosen": "a paper a", "rejected": "a new"},
            row | {"rejected": "the data"},
        ]
        trainer = make_trainer(settings, rows, eval_rows=rows[:5], max_length=10)
        expected = {
            "helpful": {"labels": 8, "ties": 1, "missing": 1, "dropped": 1, "equal": 1},
            "harmless": {"labels": 8, "ties": 0, "missing": 2, "dropped": 0, "equal": 1},
        }
        both = {"pairs": 10, "identical": 1}
        counts = trainer.pair_counts["train_dataset"]
        assert counts == {name: count | both for name, count in expected.items()}
        assert trainer.pair_counts["eval_dataset"]["helpful"]["ties"] == 1
        printed = capsys.readouterr().err
        assert "train_dataset: 10 pairs\n  objective  labels  ties  missing  dropped" in printed
        assert printed.count("eval_dataset: 5 pairs") == 1

    def test_few_labels_are_left(self, settings: Settings) -> None:
        """One objective's labels are on long dialogues."""
        rows = [row | {"pref_harmless": None} for row in tiny_pairs(6)]
        rows[0]["pref_harmless"] = 1
        rows += [row | {"prompt": "the " * 40, "pref_helpful": None} for row in tiny_pairs(5)]
        with pytest.warns(UserWarning, match="`harmless` learns from 1 of 6 labels") as caught:
            make_trainer(settings, rows, max_length=30)
        assert not any("`helpful` learns" in str(w.message) for w in caught)

    def test_emptied_evaluation_set(self, settings: Settings) -> None:
        rows = [row | {"prompt": "the " * 40} for row in tiny_pairs(3)]
        trainer = make_trainer(settings, tiny_pairs(4), max_length=30)
        with pytest.raises(ValueError, match="`eval_dataset` must label at least one pair .* 30"):
            trainer.evaluate(Dataset.from_list(rows))

    def test_stream_is_not_counted(self, settings: Settings) -> None:
        assert make_trainer(settings, stream(tiny_pairs(4))).pair_counts == {}


class TestBestModel:
    @pytest.fixture
    def best(self, settings: Settings) -> Settings:
        best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
        best |= {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 5e-3}
        return settings | SAVED | best

    @pytest.mark.parametrize("metric", ["loss/helpful", "eval_margin/helpful", "loss"])
    def test_is_that_of_the_best_metric(
        self, best: Settings, monkeypatch: pytest.MonkeyPatch, metric: str
    ) -> None:
        """The metrics are known: 3, 1, 4, 2 in the four evaluations."""
        rows = tiny_pairs(8)
        trainer = make_trainer(best, rows, eval_rows=rows, metric_for_best_model=metric)
        original, levels = trainer._objective_log.write, iter([3.0, 1.0, 4.0, 2.0])

        def known(logs: dict[str, float], *args: Any, **others: Any) -> None:
            original(logs, *args, **others)
            if "eval_loss" in logs:
                logs["eval_" + metric.removeprefix("eval_")] = next(levels)

        monkeypatch.setattr(trainer._objective_log, "write", known)
        trainer.train()
        step = 3 if "margin" in metric else 2
        assert trainer.state.best_metric == (4.0 if "margin" in metric else 1.0)
        assert trainer.state.best_global_step == step
        saved = load_file(Path(best["output_dir"], f"checkpoint-{step}", "model.safetensors"))
        assert_close(parameters(trainer), saved, 0.0)

    def test_early_stopping_and_saving_the_best(self, best: Settings) -> None:
        """The loss falls in every step, so the training goes on to its end."""
        rows = tiny_pairs(8)
        best |= {"metric_for_best_model": "loss/helpful", "save_strategy": "best"}
        trainer = make_trainer(best, rows, eval_rows=rows)
        trainer.add_callback(EarlyStoppingCallback(1))
        trainer.train()
        seen = [x["eval_loss/helpful"] for x in trainer.state.log_history if "eval_loss" in x]
        assert len(seen) == 4 and seen == sorted(seen, reverse=True)
        assert trainer.state.best_global_step == 4
        assert trainer.evaluate()["eval_loss/helpful"] == pytest.approx(seen[-1], rel=1e-6)

    @pytest.mark.parametrize(
        ("metric", "greater"),
        [
            ("loss/helpful", False),
            ("eval_loss/harmless", False),
            ("eval_far_loss/helpful", False),
            ("margin/_loss", True),
            ("accuracy/_loss", True),
            ("eval_loss", False),
            ("rewards/margins", True),
        ],
    )
    def test_directions(self, settings: Settings, metric: str, greater: bool) -> None:
        settings |= {"metric_for_best_model": metric}
        settings |= {"weights": {"helpful": 0.5, "harmless": 0.3, "_loss": 0.2}}
        assert config(settings).greater_is_better is greater
        with warnings.catch_warnings():  # again, as from a file
            warnings.simplefilter("error")
            config(settings, greater_is_better=greater)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            wrong = config(settings, greater_is_better=not greater)
        assert wrong.greater_is_better is not greater
        ours = metric not in ("rewards/margins", "eval_loss")
        assert ours == any("selects the worst model" in str(w.message) for w in caught)

    def test_plateaus_are_of_the_right_side(self, settings: Settings) -> None:
        plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
        for metric, mode in (("accuracy/helpful", "max"), ("loss/helpful", "min")):
            made = config(settings, metric_for_best_model=metric, **plateau)
            assert made.lr_scheduler_kwargs["mode"] == mode

    def test_metric_that_will_not_exist(self, best: Settings) -> None:
        rows = tiny_pairs(4)
        match = "`metric_for_best_model` must be one of loss, loss/helpful, .* got 'harmless'"
        with pytest.raises(ValueError, match=match):
            make_trainer(best, rows, eval_rows=rows, metric_for_best_model="harmless")

    @pytest.mark.parametrize("names", [[], ["near", "far"]], ids=["one set", "two sets"])
    def test_every_metric_that_is_named_exists(self, settings: Settings, names: list[str]) -> None:
        sets = {name: Dataset.from_list(tiny_pairs(3, seed=len(name))) for name in names}
        trainer = make_trainer(settings, tiny_pairs(4), eval_rows=sets or tiny_pairs(3))
        named = evaluation_metrics(list(WEIGHTS), names, auxiliary=False)
        assert {f"eval_{name}" for name in named} <= trainer.evaluate().keys()


class TestSettingsWithoutEffect:
    @pytest.mark.parametrize(
        "changed",
        [
            {"method": "linear", "c": 0.2},
            {"method": "mgda", "solver": "pgd"},
            {"modpo_objective": "helpful"},
            {"precompute_ref_batch_size": 3},
            {"ref_model_sync_steps": 3},
            {"loss_type": "simpo", "precompute_ref_log_probs": True},
            {"eval_steps": 3},
            {"save_steps": 3},
            {"num_train_epochs": 7},
        ],
        ids=lambda changed: list(changed)[-1],
    )
    def test_warn(self, settings: Settings, changed: Settings) -> None:
        with pytest.warns(UserWarning, match=f"`{list(changed)[-1]}` has no effect unless"):
            config(settings, **changed)

    @pytest.mark.filterwarnings("error")
    def test_other_settings_do_not_warn(self, settings: Settings) -> None:
        for changed in (
            {},
            {"method": "linear"},
            {"method": "modpo", "modpo_objective": "helpful"},
            {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
            {"max_steps": -1, "num_train_epochs": 7},
        ):
            config(settings, **changed)

    def test_robust_without_noise(self, settings: Settings) -> None:
        with pytest.warns(UserWarning, match="'robust' with label_smoothing=0 equals"):
            config(settings, loss_type="robust")


class TestGoingOnFromAdapters:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[str, str]:
        """A model, and adapters of it that moved."""
        model, adapters = str(tmp_path / "model"), str(tmp_path / "adapters")
        tiny_model().save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
        moved_adapters(type(tiny_model()).from_pretrained(model)).save_pretrained(adapters)
        name_base(adapters, model)  # a path from the folder of the adapters
        return model, adapters

    def test_is_trl_from_the_same_adapters(
        self, settings: Settings, folders: tuple[str, str]
    ) -> None:
        model, adapters = folders
        rows = [row | {"pref_helpful": 1, "pref_harmless": 1} for row in tiny_pairs(8)]
        settings |= SGD
        stock = DPOTrainer(
            PeftModel.from_pretrained(
                type(tiny_model()).from_pretrained(model), adapters, is_trainable=True
            ),
            args=DPOConfig(**settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )
        stock.train()
        options = settings | {"method": "linear"}
        ours = make_trainer(options, rows, model=adapters, reference=None, eval_rows=rows)
        assert ours.evaluate()["eval_margin/helpful"] == pytest.approx(0, abs=1e-6)
        ours.train()
        assert_close(parameters(ours), parameters(stock), 1e-6)

    def test_again_and_by_pefts_loader(
        self, settings: Settings, folders: tuple[str, str], tmp_path: Path
    ) -> None:
        model, adapters = folders
        tokenizer = {"processing_class": None}  # that of the folder
        for name in ("first", "second"):
            options = settings | SGD | {"output_dir": str(tmp_path / name)}
            trainer = make_trainer(
                options, tiny_pairs(8), model=adapters, reference=None, others=tokenizer
            )
            trainer.train()
            adapters = str(tmp_path / f"{name}-saved")
            trainer.save_model(adapters)
        base_model = type(tiny_model()).from_pretrained(model)
        found = PeftModel.from_pretrained(base_model, adapters)
        saved = {n: p.detach() for n, p in found.named_parameters() if "lora" in n}
        assert_close(saved, parameters(trainer), 0.0)

    def test_resumes(self, settings: Settings, folders: tuple[str, str]) -> None:
        whole, again = (
            make_trainer(settings | SAVED, tiny_pairs(8), model=folders[1], reference=None)
            for _ in range(2)
        )
        whole.train()
        shutil.rmtree(Path(settings["output_dir"], "checkpoint-2"))
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 2
        assert_close(parameters(again), parameters(whole), 0.0)
        frozen = [p for n, p in again.model.named_parameters() if ".ref." in n]
        assert frozen and not any(p.requires_grad for p in frozen)

    def test_other_adapters_on_top(self, settings: Settings, folders: tuple[str, str]) -> None:
        with pytest.raises(ValueError, match="`peft_config` must be None if `model` is a folder"):
            make_trainer(settings, tiny_pairs(4), model=folders[1], peft_config=LoraConfig(r=2))


class TestRecords:
    def test_step_log(self, settings: Settings) -> None:
        path = Path(settings["output_dir"], "steps.jsonl")
        make_trainer(settings | SAVED, tiny_pairs(8)).train()
        log = read_steps(path)
        assert log.steps == (1, 2)
        assert log.reports[0].names == tuple(WEIGHTS)
        overview(path)
        shutil.rmtree(path.with_name("checkpoint-2"))
        make_trainer(settings | SAVED, tiny_pairs(8)).train(resume_from_checkpoint=True)
        assert read_steps(path).steps == (1, 2)
        assert torch.equal(read_steps(path).reports[1].gram, log.reports[1].gram)
        for number in (1, 2):
            shutil.rmtree(path.with_name(f"checkpoint-{number}"))
        make_trainer(settings, tiny_pairs(8), weights={"helpful": 1.0}).train()
        assert read_steps(path).reports[0].names == ("helpful",)
        assert read_steps(path.with_name("steps.old.jsonl")).run == log.run

    def test_one_loss_has_no_step_log(self, settings: Settings) -> None:
        make_trainer(settings, tiny_pairs(8), method="linear").train()
        assert not Path(settings["output_dir"], "steps.jsonl").exists()

    @pytest.mark.parametrize(
        ("method", "words"),
        [
            ("raco", ["RACO", "radius c = 0.4", "2602.02495", "Tianyi", "sigmoid + sft"]),
            ("amopo", ["AMoPO", "2506.07165"]),
            ("linear", ["method `linear`", "rafailov2023direct"]),
        ],
    )
    def test_model_card(self, settings: Settings, method: str, words: list[str]) -> None:
        rows = tiny_pairs(4)
        settings |= {"eval_strategy": "steps", "eval_on_start": True, "method": method}
        trainer = make_trainer(settings, rows, eval_rows=rows, loss_type=["sigmoid", "sft"])
        trainer.train()
        trainer.create_model_card(model_name="x")
        card = Path(settings["output_dir"], "README.md").read_text()
        for word in [*words, "| helpful | 0.7 |", "| harmless | 0.3 |", "step 0", "step 2"]:
            assert word in card

    def test_one_progress_bar(
        self, settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: Any
    ) -> None:
        monkeypatch.delenv("TQDM_DISABLE")
        rows = tiny_pairs(4)
        settings |= {"disable_tqdm": False, "eval_strategy": "steps"}
        trainer = make_trainer(settings, rows, eval_rows=rows)
        opened: list[Any] = []
        original = trainer_callback.tqdm
        monkeypatch.setattr(
            trainer_callback, "tqdm", lambda *a, **k: opened.append(k) or original(*a, **k)
        )
        trainer.train()
        assert len(opened) == 1
        trainer.evaluate()
        assert len(opened) == 2

    @pytest.mark.parametrize("adapters", [None, lora()], ids=["full", "lora"])
    def test_no_future_warnings(self, settings: Settings, adapters: LoraConfig | None) -> None:
        rows = tiny_pairs(4)
        settings |= SAVED | {"eval_strategy": "steps", "bf16": True}
        settings |= {"gradient_checkpointing": True}
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            trainer = make_trainer(settings, rows, eval_rows=rows, peft_config=adapters)
            trainer.train()
            trainer.save_model()
