"""The examples of docs/integrations.md: two processes train as one does on the joint batch."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import lightning
import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Trainer, TrainingArguments

import raco_optim
from raco_optim import CAGradClip

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
PAGE = ROOT / "docs" / "integrations.md"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))

# Of Lightning, about what it calls or inherits itself, and about the size of this machine.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def as_launched(rank, number=1):
    """Sets what torchrun would, and takes back what the frameworks leave in the process."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of earlier tests
    variables = {}
    if rank is not None:
        ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(number))
        variables = {"TORCHELASTIC_RUN_ID": "none", **ranks, **sizes}
    deterministic = torch.are_deterministic_algorithms_enabled()
    with mock.patch.dict(os.environ, variables):
        try:
            yield
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.use_deterministic_algorithms(deterministic)


def trained(rank, name, **settings):
    """Runs an example in this process, and returns the parameters it ends with."""
    with as_launched(rank, 2):
        result = example(name).main(**settings)
    model = result if isinstance(result, nn.Module) else result.model
    return [whole(p) for p in model.parameters()]


def whole(parameter):
    found = parameter.detach()
    return found.full_tensor() if isinstance(found, DTensor) else found.clone()


def relative(a, b):
    difference = sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True))
    return (difference / sum(float(y.square().sum()) for y in b)) ** 0.5


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def in_rank(rank, name, settings):
    """The parameters that an example ends with, and the number of steps of AdamW."""
    steps = []
    hook = register_optimizer_step_post_hook(lambda opt, *_: steps.append(type(opt)))
    parameters = trained(rank, name, **settings)
    hook.remove()
    return parameters, steps.count(torch.optim.AdamW)


# The epochs of a run that is interrupted, if they are fewer; a checkpoint of it; the steps after.
RESUMED = {
    "lightning_module": (2, "checkpoints/epoch=1-step=16.ckpt", 8),
    "hf_trainer": (None, "checkpoint-8", 4),
}


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one_on_the_joint_batch(two_ranks, name, tmp_path):
    """And a run that is resumed equals one that was not interrupted in every bit."""

    def settings(folder, **others):
        folders = "folder" in inspect.signature(example(name).main).parameters
        return {"folder": str(tmp_path / folder), **others} if folders else others

    expected = trained(None, name, **settings("one"))
    (first, steps), (second, _) = two_ranks.run(in_rank, name, settings("two"))
    assert relative(first, expected) < 1e-5
    assert equal(first, second)
    if name in RESUMED:
        epochs, checkpoint, left = RESUMED[name]
        folder = "two" if epochs is None else "interrupted"
        if epochs is not None:
            two_ranks.run(in_rank, name, settings(folder, epochs=epochs))
        resumed = settings("resumed", resume=str(tmp_path / folder / checkpoint))
        for found, fewer in two_ranks.run(in_rank, name, resumed):
            assert equal(found, first)
            assert fewer == left < steps


def test_command_of_the_page_runs(capsys):
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert sorted(Path(command.split()[-1]).stem for command in commands) == NAMES
    for command in commands:
        assert f"\n    {command}\n" in (ROOT / command.split()[-1]).read_text()
    torchrun, *arguments = shlex.split(next(line for line in commands if "ddp.py" in line))
    assert torchrun == "torchrun"
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    example("ddp").main()
    printed = (run.stdout, capsys.readouterr().out)
    two, one = ([float(x) for x in re.findall(r"\d+\.[\de-]+", text)] for text in printed)
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-5)


def test_page_shows_lines_of_the_examples():
    named = []
    for section in PAGE.read_text().split("\n## ")[1:]:
        if "```diff" not in section:
            assert "```python" in section  # tests/test_docs.py runs it
            continue
        named.append(re.search(r"\(examples/(\w+)\.py\)", section)[1])
        source = (EXAMPLES / f"{named[-1]}.py").read_text()
        lines = {" ".join(line.split()) for line in source.splitlines()}
        for block in re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            shown = [line[1:] for line in block.splitlines() if line[:1] != "-"]
            assert {" ".join(line.split()) for line in shown if line.strip()} <= lines
    assert sorted(named) == NAMES


class TestAccelerate:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        with as_launched(None):
            yield

    @pytest.mark.parametrize("heads", [False, True])
    def test_fsdp2_trains_as_one_process(self, two_ranks, heads):
        expected, gram = prepared_for_fsdp2(None, heads)
        for found, found_gram in two_ranks.run(prepared_for_fsdp2, heads):
            assert relative(found, expected) < 1e-5
            assert torch.allclose(found_gram, gram, rtol=1e-4)

    def test_bfloat16_trains_nearly_as_float32(self):
        settings = {"name": "accelerate_loop", "epochs": 1}
        found, expected = (trained(None, **settings, mixed_precision=x) for x in ("bf16", "no"))
        assert relative(found, expected) < 1e-2

    def test_state_comes_back(self, tmp_path):
        accelerator = Accelerator(cpu=True)
        model = nn.Linear(3, 2)
        opt = CAGradClip(torch.optim.AdamW(model.parameters()), {"a": 0.7, "b": 0.3}, c=0.4)
        opt.weights, opt.c = {"a": 0.6, "b": 0.4}, 0.2
        model, optimizer = accelerator.prepare(model, opt)
        assert optimizer.optimizer is opt

        def step():
            optimizer.zero_grad()
            a, b = model(torch.ones(3)).square()
            raco_optim.backward(optimizer, {"a": a, "b": b})
            optimizer.step()
            return [p.detach().clone() for p in model.parameters()]

        step()
        accelerator.save_state(str(tmp_path))
        expected = step()
        opt.weights, opt.c = {"a": 0.1, "b": 0.9}, 0.9
        step()
        accelerator.load_state(str(tmp_path))
        assert (opt.weights, opt.c) == ({"a": 0.6, "b": 0.4}, 0.2)
        assert equal(step(), expected)

    def test_float16_is_unscaled_before_clipping_and_skipped_after_an_overflow(self):
        runs = {}
        for precision in ("no", "fp16"):
            accelerator = Accelerator(cpu=True)
            if precision == "fp16":  # which Accelerate refuses to do itself on a CPU
                AcceleratorState._shared_state["_mixed_precision"] = "fp16"
                accelerator.native_amp = True
                accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            torch.manual_seed(0)
            model = nn.Linear(4, 2)
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            opt = CAGradClip(sgd, [0.5, 0.5], nonfinite="propagate")
            schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
            model, optimizer, schedule = accelerator.prepare(model, opt, schedule)
            steps = []
            for factor in (1.0, torch.inf, 1.0):
                losses = (factor * (model(torch.ones(4)) - 9).square()).unbind()
                if accelerator.scaler is not None:
                    losses = [accelerator.scaler.scale(loss) for loss in losses]
                elif factor > 1:
                    continue
                raco_optim.backward(optimizer, losses)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                if not optimizer.step_was_skipped:
                    steps.append([p.detach().clone() for p in model.parameters()])
            runs[precision] = steps, opt.param_groups[0]["lr"]
            AcceleratorState._reset_state(reset_partial_state=True)
        (expected, rate), (found, found_rate) = runs.values()
        assert found_rate == rate == 0.025
        assert len(found) == len(expected) == 2
        assert relative(sum(found, []), sum(expected, [])) < 1e-3


def prepared_for_fsdp2(rank, heads):
    """Three steps of a model that Accelerate shards."""
    with as_launched(rank, 2):
        accelerator = Accelerator(cpu=True)
        if rank is not None:  # which Accelerate does on accelerators only
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
            )
            state = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
            AcceleratorState._shared_state.update(state)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        adamw = torch.optim.AdamW(model.parameters(), lr=0.1)
        shared = model[0].parameters() if heads else None
        opt = CAGradClip(adamw, {"a": 0.5, "b": 0.5}, c=0.9, shared_parameters=shared)
        model, optimizer = accelerator.prepare(model, opt)
        batch = torch.randn(8, 4)
        for _ in range(3):
            outputs = model(batch if rank is None else batch.chunk(2)[rank])
            a, b = (outputs - outputs.flip(1) - 1).square().mean(0)
            raco_optim.backward(optimizer, {"a": a, "b": b})
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return [whole(p) for p in model.parameters()], opt.report.gram


def fit(module, folder, **settings):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"default_root_dir": folder, "max_epochs": 1, **quiet, **settings}
    with as_launched(None):
        lightning.Trainer(**settings).fit(module)


class TestLightning:
    def test_bfloat16_trains_nearly_as_float32(self, tmp_path):
        runs = []
        for precision in ("bf16-mixed", "32-true"):
            torch.manual_seed(0)
            module = example("lightning_module").Module()
            fit(module, tmp_path / precision, precision=precision)
            runs.append([p.detach() for p in module.parameters()])
        assert 0 < relative(*runs) < 1e-2

    def test_float16_is_unscaled_before_clipping_and_skipped_after_an_overflow(self, tmp_path):
        source = example("lightning_module")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1)
        norms, scales, values = [], [], []

        class Scaling(CAGradClip):
            def backward(self, losses):
                super().backward({name: scaler.scale(loss) for name, loss in losses.items()})

        class Module(source.Module):
            def configure_optimizers(self):
                [opt], _ = super().configure_optimizers()
                opt = Scaling(opt.optimizer, opt.weights, nonfinite="propagate")
                return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, 0.95)]

            def on_before_optimizer_step(self, optimizer):
                super().on_before_optimizer_step(optimizer)
                gradients = [p.grad for p in self.parameters()]
                norms.append(float(torch.nn.utils.get_total_norm(gradients)))

            def on_train_batch_end(self, *_):
                scales.append(scaler.get_scale())
                values.append([p.detach().clone() for p in self.parameters()])

        precision = MixedPrecision("16-mixed", "cpu", scaler)
        fit(Module(), tmp_path, plugins=[precision], max_epochs=2)
        finite = [math.isfinite(norm) for norm in norms]
        assert 0 < finite.count(False) < len(finite)
        assert all(0 < norm < 1.001 for norm in norms if math.isfinite(norm))
        for i in range(1, len(norms)):
            assert scales[i] == scales[i - 1] * (2 if finite[i] else 0.5)
            assert equal(values[i], values[i - 1]) == (not finite[i])


def trainer_log(rank, folder, *, stock=False):
    """Trains with the Trainer on batches that leave some over; c = 0 is the weighted sum."""
    source = example("hf_trainer")
    with as_launched(rank, 2):
        args = TrainingArguments(
            folder,
            use_cpu=True,
            num_train_epochs=2,
            per_device_train_batch_size=36 if rank is None else 18,
            dataloader_drop_last=True,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            logging_steps=1,
            eval_strategy="epoch",
            disable_tqdm=True,
        )
        torch.manual_seed(0)
        model = source.Model()
        adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
        opt = adamw if stock else CAGradClip(adamw, source.WEIGHTS, c=0.0)
        data = {"train_dataset": source.texts(), "eval_dataset": source.texts(64, seed=1)}
        chosen = Trainer if stock else source.MultiTaskTrainer
        trainer = chosen(model, args, **data, optimizers=(opt, None))
        trainer.train()
    keys = "loss", "grad_norm", "learning_rate", "eval_loss", "train_loss"
    log = [entry[key] for entry in trainer.state.log_history for key in keys if key in entry]
    return [whole(p) for p in model.parameters()], log


def test_trainer_without_a_radius_is_the_stock_one_on_the_weighted_loss(two_ranks, tmp_path):
    expected, expected_log = trainer_log(None, str(tmp_path / "stock"), stock=True)
    outcomes = two_ranks.run(trainer_log, str(tmp_path / "two"))
    for found, log in [trainer_log(None, str(tmp_path / "one")), *outcomes]:
        assert log == pytest.approx(expected_log, rel=1e-4)
        assert relative(found, expected) < 1e-4
    assert len(log) == 2 * 4 * 3 + 2 + 1
