"""Files with preference pairs: what is read, and what is refused by name."""

from pathlib import Path

import datasets
import pandas as pd
import pytest

from raco_optim.cli.data import load_pairs
from raco_optim.cli.errors import UsageError

ROWS = [
    {"prompt": "p ", "chosen": "a", "rejected": "b", "pref_x": 1, "pref_y": -1},
    {"prompt": "q ", "chosen": "c", "rejected": "d", "pref_x": 0, "pref_y": None},
]

# datasets opens files that it leaves for the garbage collector to close.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def written(path: Path, rows=ROWS):
    frame = pd.DataFrame(rows)
    write = {
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        ".json": lambda: frame.to_json(path, orient="records"),
        ".csv": lambda: frame.to_csv(path, index=False),
        ".parquet": lambda: frame.to_parquet(path),
    }
    write[path.suffix]()
    return path


def refusal(path, objectives=("x", "y"), margins=()):
    with pytest.raises(UsageError) as caught:
        load_pairs(path, "--data", objectives, margins)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_formats(tmp_path, suffix):
    dataset = load_pairs(written(tmp_path / f"pairs{suffix}"), "--data", ["x", "y"], [])
    assert dataset["chosen"][:] == ["a", "c"]
    assert dataset["pref_x"][:] == [1, 0]
    assert dataset["pref_y"][0] == -1


def test_prompt_is_optional_and_other_columns_stay(tmp_path):
    rows = [{"chosen": "a", "rejected": "b", "pref_x": 1, "source": "web"}]
    dataset = load_pairs(written(tmp_path / "pairs.jsonl", rows), "--data", ["x"], [])
    assert dataset.column_names == ["chosen", "rejected", "pref_x", "source"]


def test_conversations_are_pairs_too(tmp_path):
    (path := tmp_path / "pairs.jsonl").write_text(
        '{"prompt": [{"role": "user", "content": "p"}], "pref_x": 1, '
        '"chosen": [{"role": "assistant", "content": "a"}], '
        '"rejected": [{"role": "assistant", "content": "b"}]}\n'
    )
    assert len(load_pairs(path, "--data", ["x"], [])) == 1


def test_file_is_checked(tmp_path):
    assert "no such file" in refusal(tmp_path / "pairs.jsonl")
    (tmp_path / "folder.csv").mkdir()
    assert "which is a folder" in refusal(tmp_path / "folder.csv")
    assert ".jsonl, .json, .csv or .parquet" in refusal(tmp_path / "pairs.txt")
    (tmp_path / "empty.jsonl").write_text("")
    assert "at least one pair" in refusal(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "{chosen\n"),
        ("b.json", "3"),
        ("c.parquet", "chosen,rejected"),
        ("d.csv", "chosen,rejected,pref_x,pref_y\n"),
    ],
)
def test_content_that_cannot_be_read_is_named_with_the_cause(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    message = refusal(tmp_path / name)
    assert "`--data` must be a" in message
    assert name in message


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_missing_text_column_is_named_with_what_is_there(tmp_path, column):
    rows = [{k: v for k, v in row.items() if k != column} for row in ROWS]
    message = refusal(written(tmp_path / "pairs.jsonl", rows))
    assert f"must have the column {column!r}" in message
    assert "pairs.jsonl with the columns prompt, " in message
    assert "pref_x, pref_y" in message


def test_unknown_objective_is_named_with_those_that_are_there(tmp_path):
    message = refusal(written(tmp_path / "pairs.jsonl"), ["x", "humour"])
    assert "`--weights` must name objectives of the data; got 'humour'" in message
    assert "has x, y" in message
    rows = [{"chosen": "a", "rejected": "b"}]
    assert "has none" in refusal(written(tmp_path / "bare.jsonl", rows))


@pytest.mark.parametrize("value", ["yes", 2, 0.5, True, "1"])
def test_preferences_are_signs(tmp_path, value):
    rows = [{**ROWS[0], "pref_y": value}]
    message = refusal(written(tmp_path / "pairs.parquet", rows))
    assert "pairs.parquet: column `pref_y` must hold +1" in message
    assert repr(value) in message


def test_objective_that_labels_no_pair_is_named(tmp_path):
    rows = [{**row, "pref_y": sign} for row, sign in zip(ROWS, (0, None), strict=True)]
    message = refusal(written(tmp_path / "pairs.jsonl", rows))
    assert "at least one pair for every objective" in message
    assert "'pref_y' is 0 or null" in message


def test_missing_text_is_named_by_its_row(tmp_path):
    rows = [ROWS[0], {**ROWS[1], "rejected": None}]
    message = refusal(written(tmp_path / "pairs.jsonl", rows))
    assert "column 'rejected'" in message
    assert "None in row 1" in message


def test_margins_are_needed_and_finite(tmp_path):
    message = refusal(written(tmp_path / "pairs.jsonl"), margins=["y"])
    assert "must have the column 'margin_y'" in message
    rows = [{**row, "margin_y": margin} for row, margin in zip(ROWS, (0.5, None), strict=True)]
    message = refusal(written(tmp_path / "margins.jsonl", rows), margins=["y"])
    assert "column `margin_y`" in message
    rows = [{**row, "margin_y": 0.5} for row in ROWS]
    assert len(load_pairs(written(tmp_path / "good.jsonl", rows), "--data", ["x"], ["y"])) == 2
