"""The folder of a run: claimed once, recognised again, and never somebody else's."""

import json

import pytest

from raco_optim.cli.errors import UsageError
from raco_optim.cli.files import held, make_folder, write_atomically
from raco_optim.cli.runs import RUN_FILE, last_checkpoint, open_run, save_run

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
    run = save_run(tmp_path, run, status="finished", result={"loss": 0.5})
    assert open_run(tmp_path, SETTINGS, {})["result"] == {"loss": 0.5}
    assert json.loads((tmp_path / RUN_FILE).read_text()) == run


def test_another_run_is_refused_and_the_difference_named(tmp_path):
    save_run(tmp_path, open_run(tmp_path, SETTINGS, {}), status="training")
    message = refusal(tmp_path, {**SETTINGS, "seed": 1, "beta": 0.1})
    assert "holds another run: seed is 0 there and 1 here, beta is None there" in message
    assert "`--output_dir`" in message


def test_run_that_never_trained_gives_way(tmp_path):
    # What was wrong with its settings, such as the name of the model, is corrected by now.
    open_run(tmp_path, {**SETTINGS, "model": "typo"}, {})
    assert open_run(tmp_path, SETTINGS, {})["settings"] == SETTINGS


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint-5/model.safetensors", ".git/HEAD"])
def test_folder_of_something_else_is_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert f"holds files of something else ({name.split('/')[0]})" in refusal(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"settings": {}}', '{"status": "training", "settings": 3}']
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
    with pytest.raises(UsageError, match="file cannot be written .No space left"):
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


def checkpoint(folder, step, state='{"global_step": 1}'):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_text("weights")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_last_checkpoint_is_the_one_with_the_highest_step(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 2):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert (tmp_path / "checkpoint-11").read_text() == "a file"


@pytest.mark.parametrize("state", [None, "", '{"global_step": 1', "[]", "3"])
def test_checkpoint_that_was_cut_short_is_kept_aside_and_that_is_said(tmp_path, capsys, state):
    for _ in range(2):  # at the second time, the first one's name is taken
        whole = checkpoint(tmp_path, 2)
        checkpoint(tmp_path, 4, state)
        assert last_checkpoint(tmp_path) == whole
        assert "checkpoint-4 was cut short: passed over" in capsys.readouterr().err
        assert last_checkpoint(tmp_path) == whole, "and not said again"
        assert capsys.readouterr().err == ""
        (whole / "trainer_state.json").unlink()
        (whole / "model.safetensors").unlink()
        whole.rmdir()
    for i in (1, 2):
        aside = tmp_path / f"incomplete-{i}-checkpoint-4"
        assert (aside / "model.safetensors").read_text() == "weights"
