"""The diffs of README.md and docs/migrating.md: both sides run, and agree where pages say so."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn

from raco_optim.cli import main
from raco_optim.cli.arguments import parse
from raco_optim.cli.runs import RUN_FILE
from tests.test_cli_align import jsonl, run_file
from tests.tiny_language_models import tiny_model, tiny_pairs, tiny_tokenizer

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "migrating.md"


class Diff(NamedTuple):
    """A diff of a page: its section, numbered from the second one on, and its two sides."""

    name: str
    before: str
    after: str


def diffs(page):
    heading, count = "", 0
    parts = r"^## ([^\n]*)$|^```diff\n(.*?)^```$"
    for found in re.finditer(parts, page.read_text(), re.MULTILINE | re.DOTALL):
        if found[1]:
            heading, count = found[1], 0
            continue
        count += 1
        lines = found[2].splitlines()
        sides = ("\n".join(line[1:] for line in lines if line[:1] != sign) for sign in "+-")
        yield Diff(heading if count == 1 else f"{heading} {count}", *sides)


DIFFS = {diff.name: diff for diff in diffs(PAGE)}


def test_every_diff_of_the_page_is_tested_below():
    loops = {"TorchJD", "TorchJD 2", "TorchJD 3", "PCGrad", "PCGrad 2"}
    assert DIFFS.keys() == loops | {"LibMTL", "The paper's code"}


# Training loops


def run(source, steps, **names):
    """Runs one side of a diff on a small network; returns its variables, and the parameters."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6))
    heads = nn.ModuleList([nn.Linear(6, 1), nn.Linear(6, 1)])
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    data = [(torch.randn(16, 4), torch.randn(16, 2)) for _ in range(steps)]
    script = {"torch": torch, "trunk": trunk, "heads": heads, "model": model, "data": data} | names
    vector, modules = nn.utils.parameters_to_vector, ("trunk", "heads", "model")
    before = {name: vector(script[name].parameters()).detach() for name in modules}
    exec(compile(source, str(PAGE), "exec"), script)
    after = {name: vector(script[name].parameters()).detach() for name in modules}
    return script | {f"moved {name}": after[name] - before[name] for name in modules}


@pytest.mark.parametrize(
    ("name", "tolerance"), [("TorchJD", 1e-3), ("TorchJD 3", 1e-5), ("PCGrad 2", 1e-5)]
)
def test_both_sides_of_a_loop_move_the_parameters_alike(name, tolerance):
    before, after = (run(side, steps=10)["moved model"] for side in DIFFS[name][1:])
    assert before.norm() > 0.1
    assert (after - before).norm() < tolerance * before.norm()


def test_with_heads_the_trunks_agree_and_a_head_moves_by_its_weight():
    before, after = (run(side, steps=1) for side in DIFFS["TorchJD 2"][1:])
    trunk, heads = before["moved trunk"], before["moved heads"]
    assert trunk.norm() > 0.001
    assert (after["moved trunk"] - trunk).norm() < 1e-3 * trunk.norm()
    torch.testing.assert_close(after["moved heads"], 0.5 * heads)


def test_in_place_of_pcgrad_another_method_trains():
    before, after = (run(side, steps=10) for side in DIFFS["PCGrad"][1:])
    assert before["moved model"].norm() > 0.1
    assert after["moved model"].norm() > 0.1
    assert after["optimizer"].report.p is not None


def test_our_side_of_libmtl_trains_and_theirs_is_python():
    diff = DIFFS["LibMTL"]
    compile(diff.before, str(PAGE), "exec")
    torch.manual_seed(1)
    tasks = {
        "Encoder": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh()),
        "decoders": nn.ModuleDict({"A": nn.Linear(6, 1), "B": nn.Linear(6, 1)}),
        "loader": [
            (torch.randn(8, 4), {"A": torch.randn(8, 1), "B": torch.randn(8, 1)}) for _ in range(3)
        ],
        "loss_fn": nn.functional.mse_loss,
    }
    optimizer = run(diff.after, steps=1, **tasks)["optimizer"]
    assert optimizer.c == 0.5
    assert optimizer.weights == {"A": 0.5, "B": 0.5}
    assert all(state["step"] == 6 for state in optimizer.state.values())


# Language models


def trl_sides():
    [diff] = [diff for diff in diffs(README) if "DPOTrainer" in diff.before]
    return {"TRL": diff.before, "RACO": diff.after}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of TRL: dispatch, names of adapters
@pytest.mark.parametrize("side", ["TRL", "RACO"])
def test_script_trains(side, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    model = tiny_model()
    script = {
        "model": model,
        "tokenizer": tiny_tokenizer(),
        "lora": LoraConfig(r=2, target_modules="all-linear"),
        "pairs": Dataset.from_list(tiny_pairs(8)),
    }
    # The default is bfloat16, which TRL takes on a CPU only when told that it is one.
    source = trl_sides()[side].replace("num_train_epochs=1", "max_steps=2, use_cpu=True")
    exec(compile(source, str(README), "exec"), script)
    adapters = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert adapters and all(torch.any(p != 0) for p in adapters)


def test_diff_changes_the_import_and_one_line():
    trl, raco = (side.splitlines() for side in trl_sides().values())
    imports = [line for line in raco if line.startswith("from raco_optim.integrations.trl import")]
    assert [line for line in trl if line not in raco] == ["from trl import DPOConfig, DPOTrainer"]
    added = [line for line in raco if line not in trl and line not in imports]
    assert added == ['    weights={"helpful": 0.7, "harmless": 0.3},']


def command():
    name, *arguments = shlex.split(DIFFS["The paper's code"].after.replace("\\\n", " "))
    assert name == "raco-optim"
    return arguments


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_command_in_place_of_the_papers_script_aligns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_model().save_pretrained("base-model")
    tiny_tokenizer().save_pretrained("base-model")
    jsonl(tmp_path / "pairs.jsonl", tiny_pairs(16, ("quality", "verbosity")))
    assert main([*command(), "--use_cpu", "True", "--disable_tqdm", "true"]) == 0
    settings = (tmp_path / "aligned" / RUN_FILE).read_text()
    assert run_file(tmp_path / "aligned")["settings"]["weights"] == {
        "quality": 0.8,
        "verbosity": 0.2,
    }
    assert '"gradient_accumulation_steps": 4' in settings


def in_place_of(option):
    """The right column of the table of options."""
    [row] = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{option}`")]
    return re.search(r"`([^`]*)`", row.split("|")[2])[1]


@pytest.mark.parametrize(
    ("option", "field", "value"),
    [
        ("--raco_clip_lambda True", "method", "raco"),
        ("--raco_clip_lambda False", "method", "cagrad"),
        ("--raco_use_cagrad False", "method", "linear"),
        ("--mode amopo --raco False", "method", "amopo"),
        ("--raco_length_normalized True", "loss_type", ["sigmoid_norm"]),
    ],
)
def test_options_of_the_papers_script_have_a_counterpart(option, field, value):
    arguments = [*command()[1:], "--use_cpu", "True", *in_place_of(option).split()]
    assert getattr(parse(arguments, "raco-optim align").config, field) == value
