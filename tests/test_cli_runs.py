"""The folder of a run: claimed once, recognised again, and never somebody else's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raco_optim.cli.errors import UsageError
from raco_optim.cli.files import held, make_folder, write_atomically
from raco_optim.cli.runs import RUN_FILE, last_checkpoint, open_run, save_run

RESULT = {"evaluation": {}, "training": {"steps": 4}}
SETTINGS = {"seed": 0, "weights": {"a": 0.5, "b": 0.5}}


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(folder, settings=SETTINGS):
    before = contents(folder)
    with pytest.raises(UsageError) as caught:
        open_run(folder, settings, {})
    assert contents(folder) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_run_is_recognised_at_every_stage(tmp_path):
    run = open_run(tmp_path, SETTINGS, {"data": "pairs.jsonl"})
    assert run == {"status": "prepared", "data": "pairs.jsonl", "settings": SETTINGS}
    run = save_run(tmp_path, run, status="training")
    assert open_run(tmp_path, SETTINGS, {"data": "elsewhere"}) == run
    run = save_run(tmp_path, run, status="finished", result=RESULT)
    assert open_run(tmp_path, SETTINGS, {})["result"] == RESULT
    assert json.loads((tmp_path / RUN_FILE).read_text()) == run


def test_another_run_is_refused_and_the_difference_named(tmp_path):
    save_run(tmp_path, open_run(tmp_path, SETTINGS, {}), status="training")
    message = refusal(tmp_path, {**SETTINGS, "seed": 1, "beta": 0.1})
    assert "holds another run: seed was 0 and is now 1, beta was None and is" in message
    assert "`--output_dir`" in message


def test_run_that_never_trained_gives_way(tmp_path):
    # What was wrong with its settings, such as the name of the model, is corrected by now.
    open_run(tmp_path, {**SETTINGS, "model": "typo"}, {})
    assert open_run(tmp_path, SETTINGS, {})["settings"] == SETTINGS


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint-5/model.safetensors", ".git/HEAD"])
def test_folder_of_something_else_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert f"holds other files ({name.split('/')[0]})" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "3", '{"settings": {}}', '{"status": "training", "settings": 3}'),
        '{"status": "finished", "settings": {}}',
        '{"status": "over", "settings": {}}',
        '{"status": "finished", "settings": {}, "result": {"evaluation": 3, "training": {}}}',
        "[" * 5000,
    ],
    ids=range(10),
)
def test_description_that_is_none_is_refused(tmp_path, text):
    (tmp_path / RUN_FILE).write_text(text)
    assert RUN_FILE in refusal(tmp_path)


def test_kill_while_the_first_description_is_written(tmp_path):
    (tmp_path / f".{RUN_FILE}.part").write_text('{"sett')
    assert open_run(tmp_path, SETTINGS, {})["status"] == "prepared"


def test_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UsageError, match="file can't be written .No space left"):
        write_atomically(path, "new")
    assert contents(tmp_path) == {path.relative_to(tmp_path): b"old"}


def test_folder_is_held_by_one(tmp_path):
    with (
        held(tmp_path / "out", "--output_dir"),
        pytest.raises(UsageError, match="one process at a time"),
        held(tmp_path / "out", "--output_dir"),
    ):
        pass
    with held(tmp_path / "out", "--output_dir"):
        pass


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="`--output_dir` must be a folder to write to"):
            make_folder(folder, "--output_dir")


# Checkpoints


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    save_file({"weight": torch.zeros(100)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.zeros(100)}, path / name)
    (path / "trainer_state.json").write_text('{"global_step": 1}')
    return path


def test_last_checkpoint_is_the_one_with_the_highest_step(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 2):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert (tmp_path / "checkpoint-11").read_text() == "a file"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


DAMAGE = [
    *((name, how) for name in ("model.safetensors", "optimizer.pt") for how in (cut, Path.unlink)),
    *((name, cut) for name in ("scheduler.pt", "rng_state.pth", "trainer_state.json")),
    ("trainer_state.json", Path.unlink),
    ("trainer_state.json", lambda path: path.write_text("[]")),
    ("optimizer.pt", flip),
    ("model.safetensors.index.json", lambda path: path.write_text('{"weight_map": {"a": "b"}}')),
]


@pytest.mark.parametrize(("name", "how"), DAMAGE, ids=range(len(DAMAGE)))
def test_checkpoint_that_is_not_whole_is_kept_aside_and_that_is_said(tmp_path, capsys, name, how):
    whole = checkpoint(tmp_path, 2)
    for i in (1, 2):  # at the second time, the first one's name is taken
        how(checkpoint(tmp_path, 4) / name)
        assert last_checkpoint(tmp_path) == whole
        assert "checkpoint-4 is incomplete; renamed to" in capsys.readouterr().err
        assert last_checkpoint(tmp_path) == whole, "and not said again"
        assert capsys.readouterr().err == ""
        assert (tmp_path / f"incomplete-{i}-checkpoint-4").is_dir()
