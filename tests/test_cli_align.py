"""`raco-optim align` and `raco-optim sweep` with TRL's trainer and a model with random weights."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import gguf
import numpy as np
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from raco_optim.cli import main
from raco_optim.cli.arguments import parse
from raco_optim.cli.grid import read_records
from raco_optim.cli.models import loadable_model
from raco_optim.cli.runs import RUN_FILE
from tests.tiny_language_models import tiny_model, tiny_pairs, tiny_tokenizer

ROOT = Path(__file__).parent.parent
BETA = 0.5
LORA = {"use_peft": "true", "lora_r": 2, "lora_target_modules": "all-linear"}

# Of TRL, transformers and datasets, about themselves and about files that they leave open.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True, scope="module")
def _quiet(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its tokenizer, and pairs."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("qwen3").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    jsonl(folder / "train.jsonl", tiny_pairs(16, seed=0, missing=0.2))
    jsonl(folder / "test.jsonl", tiny_pairs(6, seed=1))
    return folder


def training(folder, **changed):
    """Options that `align` and `sweep` share."""
    options = {
        "model": folder / "model",
        "data": folder / "train.jsonl",
        "eval_data": folder / "test.jsonl",
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "beta": BETA,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "disable_tqdm": "true",
        **changed,
    }
    return [
        argument
        for name, value in options.items()
        if value is not None
        for argument in (f"--{name}", str(value))
    ]


def align(folder, output, **changed):
    options = {"weights": "helpful=0.7,harmless=0.3", "output_dir": output, **changed}
    return main(["align", *training(folder, **options)])


def run_file(output):
    return json.loads((output / RUN_FILE).read_text())


def same_weights(a, b):
    first, second = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (a, b))
    return all(torch.equal(first[name], second[name]) for name in first)


def as_if_killed(output):
    """Takes from a finished run what its end added."""
    run = run_file(output)
    del run["result"]
    (output / RUN_FILE).write_text(json.dumps({**run, "status": "training"}))


def contents(output):
    return {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A finished run of 4 steps, in a folder that was not there, and its output."""
    output = tmp_path_factory.mktemp("finished") / "new" / "out"
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        assert align(folder, output, save_steps=1) == 0
    return SimpleNamespace(output=output, out=printed.getvalue(), err=errors.getvalue())


def log_ratio(model, tokenizer, row):
    """log pi(chosen) - log pi(rejected), from the logits."""
    sums = []
    for answer in ("chosen", "rejected"):
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        ids = tokenizer(row["prompt"] + row[answer])["input_ids"] + [tokenizer.eos_token_id]
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        sums.append(sum(log_probs[t - 1, ids[t]] for t in range(prompt, len(ids))))
    return float(sums[0] - sums[1])


# Align


def test_saved_model_has_the_scores_that_were_printed(folder, finished):
    output, printed = finished.output, finished.out
    result = run_file(output)["result"]
    with torch.no_grad():
        tokenizer = AutoTokenizer.from_pretrained(output)
        policy = AutoModelForCausalLM.from_pretrained(output)
        reference = AutoModelForCausalLM.from_pretrained(folder / "model")
        rows = tiny_pairs(6, seed=1)
        deltas = [
            log_ratio(policy, tokenizer, row) - log_ratio(reference, tokenizer, row) for row in rows
        ]
    assert max(map(abs, deltas)) > 1e-3, "it has learned something"
    for name in ("helpful", "harmless"):
        margins = [BETA * row[f"pref_{name}"] * d for row, d in zip(rows, deltas, strict=True)]
        scores = result["evaluation"][name]
        loss = sum(math.log1p(math.exp(-margin)) for margin in margins) / 6
        assert scores["loss"] == pytest.approx(loss, abs=1e-5)
        assert scores["margin"] == pytest.approx(sum(margins) / 6, abs=1e-5)
        assert scores["accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 6)
        assert scores["labelled"] == 6
        line = next(line for line in printed.splitlines() if line.strip().startswith(name))
        first = f"{math.log(2):.3f} -> {scores['loss']:.3f}  0.000 -> {scores['margin']:.3f}"
        assert first in line
        assert line.endswith(f"0.500 -> {scores['accuracy']:.3f}         6")
    assert result["training"]["steps"] == 4
    assert 0 <= result["training"]["hurting_steps"] <= 1
    assert result["training"]["seconds"] > 0
    assert str(output) in printed


def test_adapters_without_evaluation(folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert align(folder, output, eval_data=None, max_steps=1, **LORA) == 0
    assert (output / "adapter_model.safetensors").exists()
    assert (output / "tokenizer.json").exists()
    assert not (output / "model.safetensors").exists()
    assert run_file(output)["result"]["evaluation"] == {}
    printed = capsys.readouterr().out
    assert "adapters and tokenizer" in printed
    assert "Held-out" not in printed


def test_yaml_file_says_the_same_and_the_command_line_overrides_it(folder, tmp_path):
    settings = {
        "model": str(folder / "model"),
        "data": str(folder / "train.jsonl"),
        "weights": {"helpful": 0.7, "harmless": 0.3},
        "method": "cagrad",
        "c": 0.2,
        "learning_rate": "1e-2",
        "use_peft": True,
        "bf16": True,
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
    }
    (path := tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    parsed = parse(["--config", str(path), "--c", "0.3"], "raco-optim align")
    assert parsed.config.objective_weights == {"helpful": 0.7, "harmless": 0.3}
    assert (parsed.config.method, parsed.config.c) == ("cagrad", 0.3)
    assert parsed.config.learning_rate == 0.01
    assert parsed.model.use_peft
    assert parsed.config.bf16, "asked for"


@pytest.mark.skipif(torch.cuda.is_available(), reason="these are the defaults of a CPU")
def test_defaults_suit_the_cpu(folder):
    parsed = parse([*training(folder), "--weights", "helpful=1"], "raco-optim align")
    assert not parsed.config.bf16
    assert not parsed.config.gradient_checkpointing


def test_nothing_but_results_is_left_and_few_checkpoints(finished):
    output = finished.output
    names = {path.name for path in output.parents[1].rglob("*")}
    assert {n for n in names if n.startswith(".") or n.endswith((".lock", ".part"))} == set()
    assert {n for n in names if n.startswith("checkpoint")} == {"checkpoint-3", "checkpoint-4"}
    model = (output / "model.safetensors").stat().st_size / 1e6
    checkpoint = (output / "checkpoint-4" / "optimizer.pt").stat().st_size / 1e6 + model
    (line,) = (line for line in finished.err.splitlines() if "The result needs" in line)
    said = [float(x) for x in re.findall(r"([\d.]+) MB", line)[:2]]
    assert said == pytest.approx([model, checkpoint], abs=0.1)
    assert "Checkpoints to keep: 2" in line
    assert "Warning" not in finished.err


def test_the_same_command_again_does_nothing_and_another_one_is_refused(
    folder, finished, tmp_path, capsys
):
    output = finished.output
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*")}
    assert align(folder, output, save_steps=1) == 0
    again = capsys.readouterr()
    assert "this run is already finished" in again.err
    assert again.out in finished.out, "the scores are printed again"
    assert align(folder, output, save_steps=1, beta=0.1) == 2
    assert "holds another run: beta was 0.5 and is now 0.1" in capsys.readouterr().err
    jsonl(tmp_path / "train.jsonl", tiny_pairs(16, seed=2))
    assert align(folder, output, save_steps=1, data=tmp_path / "train.jsonl") == 2
    assert "data_sha256 was" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*")} == before


def test_a_file_that_changed_under_its_name_is_refused_on_resumption(folder, tmp_path, capsys):
    rows = tiny_pairs(16, seed=3)
    files = {name: jsonl(tmp_path / f"{name}.jsonl", rows) for name in ("data", "eval_data")}
    output = tmp_path / "out"
    assert align(folder, output, max_steps=1, **files) == 0
    as_if_killed(output)
    before = contents(output)
    rows[0]["pref_helpful"] *= -1
    for option, file in files.items():
        kept = file.read_bytes()
        jsonl(file, rows)
        old, new = (hashlib.sha256(x).hexdigest() for x in (kept, file.read_bytes()))
        capsys.readouterr()
        assert align(folder, output, max_steps=1, **files) == 2
        error = capsys.readouterr().err
        assert f"{option}_sha256 was '{old}' and is now '{new}'" in error
        assert contents(output) == before
        file.write_bytes(kept)


def test_resumes_from_the_last_complete_checkpoint(folder, finished, tmp_path, capsys):
    cut = shutil.copytree(finished.output, tmp_path / "cut")
    as_if_killed(cut)
    (cut / "model.safetensors").unlink()
    (cut / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 1.0, "glo')
    assert align(folder, cut, save_steps=1) == 0
    errors = capsys.readouterr().err
    assert "checkpoint-4 is incomplete; renamed to incomplete-1-" in errors
    assert "resuming from checkpoint-3" in errors
    assert (cut / "incomplete-1-checkpoint-4" / "model.safetensors").exists()
    assert same_weights(finished.output, cut)
    results = [run_file(output)["result"] for output in (finished.output, cut)]
    for result in results:
        del result["training"]["seconds"]
    assert results[0] == results[1]


BAD = {
    "weights that don't sum to 1": ({"weights": "helpful=0.7,harmless=0.4"}, ["sum to 1", "1.1"]),
    "weights that can't be read": ({"weights": "helpful:1"}, ["helpful=0.7", "helpful:1"]),
    "unknown objective": ({"weights": "helpful=0.5,fun=0.5"}, ["'fun'", "helpful, harmless"]),
    "unknown method": ({"method": "magic"}, ["method", "'magic'", "raco"]),
    "radius": ({"c": 1.5}, ["`c` must be in [0, 1)", "1.5"]),
    "no number": ({"max_steps": "few"}, ["max_steps", "few"]),
    "unknown option": ({"speed": "high"}, ["no --speed", "raco-optim align --help"]),
    "missing data": ({"data": "nowhere.jsonl"}, ["nowhere.jsonl", "which does not exist"]),
    "missing held-out data": ({"eval_data": "nowhere.csv"}, ["`--eval_data`", "nowhere.csv"]),
    "no data": ({"data": None}, ["required: --data"]),
    "missing model": ({"model": "/nowhere/model"}, ["`--model`", "/nowhere/model"]),
    "missing gguf": ({"model": "weights.gguf"}, ["`--model`", "weights.gguf"]),
    "no model": ({"model": "tests"}, ["tests"]),
    "missing YAML": ({"config": "nowhere.yaml"}, ["`--config`", "nowhere.yaml"]),
    "another way to resume": (
        {"resume_from_checkpoint": "true"},
        ["`--resume_from_checkpoint`", "Run the same command again"],
    ),
    "abbreviation": ({"bet": 0.1}, ["no --bet"]),
    "TRL's name": ({"model_name_or_path": "x"}, ["`--model`"]),
    "margins": ({"method": "modpo"}, ["margin_harmless", "pref_helpful"]),
    "NaN": ({"learning_rate": "nan"}, ["`--learning_rate` must be a finite number; got nan"]),
    "negative": ({"learning_rate": "-1"}, ["`--learning_rate` must be at least 0; got -1"]),
    "empty batches": ({"per_device_train_batch_size": 0}, ["`--per_device_train_batch_size`"]),
    "no steps": ({"max_steps": 0}, ["`--max_steps` must be at least 1; got 0"]),
    "no seed": ({"seed": -1}, ["`--seed` must be at least 0; got -1"]),
    "wandb": ({"report_to": "wandb"}, ["setting up the training", "wandb"]),
    "8 bit": ({"optim": "adamw_8bit"}, ["the training stopped", "bitsandbytes"]),
    "DeepSpeed": ({"deepspeed": "ds.json"}, ["eepspeed"]),
    "no metric": (
        {
            "load_best_model_at_end": "true",
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_steps": 1,
            "metric_for_best_model": "fun",
        },
        ["fun"],
    ),
    "half an option": ({"config": "--beta"}, ["--config"]),
    "LoRA": (
        {"use_peft": "true", "lora_target_modules": "nothing"},
        ["setting up the training of", "nothing"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_said_in_one_line(case, folder, tmp_path, capsys):
    changed, fragments = BAD[case]
    assert align(folder, tmp_path / "out", **changed) == 2
    printed = capsys.readouterr()
    *_, last = printed.err.splitlines()
    assert last.startswith("raco-optim: ")
    assert [f for f in fragments if f not in last] == []
    assert "Traceback" not in printed.err
    assert printed.out == ""
    # And what was wrong can be corrected without another folder.
    if case != "8 bit":  # transformers looks for it when the training starts
        assert not (tmp_path / "out").exists() or run_file(tmp_path / "out")["status"] == "prepared"


def test_loss_that_becomes_nan_stops_with_one_line(folder, tmp_path, capsys):
    assert align(folder, tmp_path / "out", learning_rate=1e30, max_grad_norm=1e30) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("raco-optim: the training stopped: ")


def write_gguf(path, size=32, vocabulary=40):
    """A llama with one layer and random weights."""
    words = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "th", "he", "<|endoftext|>"]
    end = len(words) - 1
    file = gguf.GGUFWriter(str(path), "llama")
    file.add_context_length(64)
    file.add_embedding_length(size)
    file.add_block_count(1)
    file.add_feed_forward_length(2 * size)
    file.add_head_count(2)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_dimension_count(size // 2)
    file.add_vocab_size(vocabulary)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("default")
    file.add_token_list([*words, *(f"<{i}>" for i in range(len(words), vocabulary))])
    file.add_token_types([1] * vocabulary)
    file.add_token_merges(["t h", "h e"])
    for add in (file.add_eos_token_id, file.add_bos_token_id, file.add_pad_token_id):
        add(end)
    generator = np.random.default_rng(0)
    square, wide = (size, size), (2 * size, size)
    shapes = {
        "token_embd": (vocabulary, size),
        "output": (vocabulary, size),
        "output_norm": (size,),
    }
    shapes |= {f"blk.0.{name}_norm": (size,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": square for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": wide, "blk.0.ffn_up": wide, "blk.0.ffn_down": wide[::-1]}
    for name, shape in shapes.items():
        file.add_tensor(f"{name}.weight", generator.normal(0, 0.05, shape).astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def test_gguf_is_unpacked_once(tmp_path, monkeypatch):
    unpacked = []

    def unpack(file, folder):
        unpacked.append(file)
        folder.mkdir()

    monkeypatch.setattr("raco_optim.cli.models.unpack_gguf", unpack)
    (file := tmp_path / "a.gguf").write_text("weights")
    first = loadable_model(str(file), tmp_path)
    assert loadable_model(str(file), tmp_path) == first
    assert unpacked == [file]
    file.write_text("other weights")
    assert loadable_model(str(file), tmp_path) != first


def test_missing_extra_is_named(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    assert align(folder, tmp_path / "out") == 2
    error = 'raco-optim: trl is not installed. Run `pip install "raco_optim[align]"`.\n'
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(("option", "lines"), [("--help", 60), ("--help-all", 2000)])
def test_help_comes_in_layers(option, lines, capsys):
    with pytest.raises(SystemExit) as end:
        main(["align", option])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for name in ("--model", "--data", "--weights", "--beta", "--lora_r", "--method", "--config"):
        assert name in printed
    assert ("--adam_beta2" in printed) == (option == "--help-all")
    assert printed.count("\n") < lines


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"lora_r": 8}, "`--use_peft`"),
        ({"use_dora": "true"}, "`--use_peft`"),
        ({"method": "linear", "c": 0.2}, "`--method` raco or cagrad"),
        ({"eval_data": None, "eval_strategy": "steps"}, "`--eval_data`"),
        ({"eval_steps": 1}, "`--eval_strategy` steps"),
        ({"method": "linear", "gradients": "dense"}, "`--method` raco, cagrad or mgda"),
        ({"loss_type": "simpo", "precompute_ref_log_probs": "true"}, "`--loss_type` with a ref"),
        ({"num_train_epochs": 2}, "`--max_steps` to be left out"),
        ({"hub_model_id": "me/model"}, "`--push_to_hub`"),
        ({"greater_is_better": "true"}, "`--load_best_model_at_end`"),
        ({"config": {"lora_alpha": 8}}, "`--use_peft`"),
    ],
    ids=str,
)
def test_an_option_that_another_one_silences_is_refused(given, needed, folder, tmp_path, capsys):
    if isinstance(given.get("config"), dict):
        (path := tmp_path / "run.yaml").write_text(yaml.safe_dump(given["config"]))
        given = {"config": path}
    assert align(folder, tmp_path / "out", **given) == 2
    error = capsys.readouterr().err
    assert "has no effect here: it needs " + needed in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def full(path, *_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("saved", ["checkpoint", "model"])
def test_a_full_disk_is_said_and_the_run_goes_on_with_more_room(
    saved, folder, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "out"
    if saved == "checkpoint":
        monkeypatch.setattr("torch.save", full)
    else:
        monkeypatch.setattr("raco_optim.integrations.trl.MultiObjectiveDPOTrainer.save_model", full)
    strategy = {"save_steps": 1}
    if saved == "model":
        strategy = {"save_strategy": "no", "save_steps": None}
    assert align(folder, output, max_steps=1, **strategy) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("raco-optim: ") and last.endswith("No space left on device")
    monkeypatch.undo()
    assert align(folder, output, max_steps=1, **strategy) == 0
    assert (output / "model.safetensors").exists()


# Models in .gguf files


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def test_adapters_of_a_gguf_file_can_be_moved(gguf_file, folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "runs" / "out"
    monkeypatch.chdir(gguf_file.parent)
    steps = {"max_steps": 2, "save_steps": 1}
    assert align(folder, output, model="tiny.gguf", **LORA, **steps) == 0
    monkeypatch.chdir(output)
    before = AutoPeftModelForCausalLM.from_pretrained(".").state_dict()
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.move(output, tmp_path / "elsewhere" / "moved"))
    for place in (moved, moved / "checkpoint-2"):
        monkeypatch.chdir(place)
        after = AutoPeftModelForCausalLM.from_pretrained(".").state_dict()
        monkeypatch.chdir(tmp_path)
        base = place / PeftConfig.from_pretrained(place).base_model_name_or_path
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place)
        for found in (after, model.state_dict()):
            assert all(torch.equal(found[name], before[name]) for name in before)
    assert any(x.abs().max() > 0 for name, x in before.items() if "lora_B" in name)


def test_a_gguf_file_that_was_cut_short_is_refused(gguf_file, folder, tmp_path, capsys):
    data = gguf_file.read_bytes()
    for share in (0, 0.01, 0.02, 0.3, 0.99):
        (cut := tmp_path / "cut.gguf").write_bytes(data[: int(share * len(data))])
        output = tmp_path / str(share)
        assert align(folder, output, model=cut) == 2
        *_, last = capsys.readouterr().err.splitlines()
        expected = f"raco-optim: `--model` {cut} can't be used: `file` must be a complete .gguf"
        assert last.startswith(expected), share
        assert [path.name for path in output.iterdir()] == [RUN_FILE]


# Sweep


def sweep_arguments(folder, output, **changed):
    weights = ["helpful=0.7,harmless=0.3", "harmless=0.5,helpful=0.5"]
    return [
        *("sweep", "--weights", *weights, "--methods", "linear", "mgda", "--seeds", "0"),
        *("--output", str(output), *training(folder, **changed)),
    ]


KILLED = """
import os, signal, sys
from raco_optim.cli import main
from raco_optim.integrations.trl import MultiObjectiveDPOTrainer

step = MultiObjectiveDPOTrainer.training_step

def until_killed(self, *arguments):
    # In the second run, after its first checkpoint.
    if self.args.method == "mgda" and self.state.global_step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)

MultiObjectiveDPOTrainer.training_step = until_killed
main(sys.argv[1:])
"""


def test_killed_sweep_goes_on_as_if_nothing_had_happened(folder, tmp_path, capsys):
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    steps = {"max_steps": 2, "save_steps": 1}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *sweep_arguments(folder, killed, **steps)],
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (first,) = read_records(killed)
    assert first["point"]["method"] == "linear"
    (tmp_path / "killed.jsonl.runs" / "notes.txt").write_text("mine")
    assert main(sweep_arguments(folder, killed, **steps)) == 0
    assert "resuming from checkpoint-1" in capsys.readouterr().err
    assert main(sweep_arguments(folder, whole, **steps)) == 0
    records = read_records(killed)
    assert records[0] == first, "what was there has stayed"
    for record, expected in zip(records, read_records(whole), strict=True):
        for r in (record, expected):
            del r["training"]["seconds"], r["environment"]
        assert record == expected
    assert [r["point"] for r in records] == [
        {"method": "linear", "weights": {"helpful": 0.7, "harmless": 0.3}, "seed": 0, "c": None},
        {"method": "mgda", "weights": {"helpful": 0.5, "harmless": 0.5}, "seed": 0, "c": None},
        {"method": "linear", "weights": {"helpful": 0.5, "harmless": 0.5}, "seed": 0, "c": None},
    ]
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*.runs/**/*")]
    assert left == ["killed.jsonl.runs/notes.txt"], "the runs' folders are gone, and no other file"
    assert main(["report", str(killed), "--output", str(tmp_path / "report.html")]) == 0


def test_a_sweep_refuses_a_held_out_file_that_changed(folder, tmp_path, capsys):
    held_out = jsonl(tmp_path / "test.jsonl", tiny_pairs(6, seed=1))
    arguments = sweep_arguments(folder, tmp_path / "r.jsonl", eval_data=held_out, max_steps=1)
    assert main([*arguments, "--methods", "mgda"]) == 0
    before = (tmp_path / "r.jsonl").read_bytes()
    jsonl(held_out, tiny_pairs(6, seed=2))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "holds runs with other settings (eval_data_sha256 = " in error
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_a_sweep_keeps_models_or_the_commands_that_train_them(
    folder, tmp_path, monkeypatch, capsys
):
    arguments = sweep_arguments(folder, tmp_path / "r.jsonl", max_steps=2, save_steps=None)
    one = [*arguments[:2], "helpful=0.7,harmless=0.3", *arguments[4:], "--methods", "raco"]
    one += ["--c", "0.2", "--warmup_steps", "1"]
    assert main([*one, "--keep_models"]) == 0
    (record,) = read_records(tmp_path / "r.jsonl")
    assert record["settings"]["warmup_steps"] == 1
    assert not {"weights", "method", "c", "seed", "output_dir"} & set(record["settings"])
    kept = Path(record["extra"]["model"])
    assert kept == tmp_path / "r.jsonl.models" / "raco_c=0.2_helpful=0.7,harmless=0.3_seed=0"
    monkeypatch.chdir(tmp_path)
    program, *again = shlex.split(record["extra"]["command"])
    assert program == "raco-optim"
    assert main(again) == 0
    assert same_weights(kept, kept.name)
    assert run_file(Path(kept.name))["result"]["evaluation"] == record["evaluation"]
    assert not list(kept.glob("checkpoint-*"))
    assert main([*one, "--seeds", "0", "1"]) == 0
    capsys.readouterr()
    assert main([*one, "--seeds", "0", "1", "--keep_models"]) == 0
    assert "1 of 2 runs finished before `--keep_models` was given" in capsys.readouterr().err
    assert main(["report", "r.jsonl", "--output", "r.html"]) == 0
    page = Path("r.html").read_text()
    assert str(kept) in page
    assert "raco-optim align --model" in page


@pytest.mark.parametrize(
    ("changed", "extra", "fragments"),
    [
        ({"eval_data": None}, [], ["`--eval_data` must be given"]),
        ({}, ["--method", "raco"], ["Use `--methods`"]),
        ({}, ["--output-dir=x"], ["Use `--output`"]),
        ({}, ["--seeds", "one"], ["--seeds", "'one'"]),
        ({}, ["--methods", "magic"], ["`--methods` must be of raco", "'magic'"]),
        ({}, ["--weights", "helpful=1", "harmless=1"], ["same objectives", "helpful"]),
        ({}, ["--weights", "helpful=0.5,harmless=0.6"], ["sum to 1"]),
        ({}, ["--methods", "modpo"], ["margin_harmless"]),
        ({}, ["--output", "/dev/null/r.jsonl"], ["`--output`"]),
    ],
)
def test_sweep_that_cannot_be_done_is_refused_before_any_run(
    changed, extra, fragments, folder, tmp_path, capsys
):
    assert main([*sweep_arguments(folder, tmp_path / "r.jsonl", **changed), *extra]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert [f for f in ["raco-optim: ", *fragments] if f not in last] == []
    assert list(tmp_path.iterdir()) == []
