"""Files with preference pairs: reading them, and messages about wrong ones."""

import gzip
import hashlib
import json
from pathlib import Path

import datasets
import pandas as pd
import pytest

from raco_optim.cli.data import content_hash, load_pairs
from raco_optim.cli.errors import UsageError
from raco_optim.cli.sources import open_sources

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


def lines(path: Path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, objectives="x", margins=()):
    return load_pairs(path, "--data", list(objectives), list(margins))


def messages(text, role="assistant"):
    return [{"role": "user" if text == "prompt" else role, "content": text}]


PAIR = {"prompt": messages("prompt"), "chosen": messages("a"), "rejected": messages("b")}
WHOLE = {name: [*PAIR["prompt"], *PAIR[name]] for name in ("chosen", "rejected")}


def refusal(path, objectives="xy", margins=()):
    with pytest.raises(UsageError) as caught:
        load(path, objectives, margins)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_formats(tmp_path, suffix):
    dataset = load(written(tmp_path / f"pairs{suffix}"), "xy")
    assert dataset["chosen"][:] == ["a", "c"]
    assert dataset["pref_x"][:] == [1, 0]
    assert dataset["pref_y"][0] == -1


def test_prompt_is_optional_and_only_what_training_reads_stays(tmp_path):
    rows = [{"chosen": "a", "rejected": "b", "pref_x": 1, "source": "web"}]
    dataset = load(written(tmp_path / "pairs.jsonl", rows))
    assert dataset.column_names == ["chosen", "rejected", "pref_x"]


def test_conversations_are_pairs_too(tmp_path):
    """With the prompt in a column of its own, or inside both answers."""
    assert len(load(lines(tmp_path / "a.jsonl", {**PAIR, "pref_x": 1}))) == 1
    whole = load(lines(tmp_path / "b.jsonl", {**WHOLE, "pref_x": 1}))
    assert whole.column_names == ["chosen", "rejected", "pref_x"]


def test_file_is_checked(tmp_path):
    assert "which does not exist" in refusal(tmp_path / "pairs.jsonl")
    assert ".jsonl, .json, .csv or .parquet" in refusal(tmp_path / "pairs.txt")
    (tmp_path / "empty.jsonl").write_text("")
    assert "at least one record" in refusal(tmp_path / "empty.jsonl")


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
    assert "`--data` " in message
    assert name in message


@pytest.mark.parametrize("value", ["yes", 2, -1.5, True, "1"])
def test_preferences_are_numbers_from_minus_one_to_one(tmp_path, value):
    rows = [{**ROWS[0], "pref_y": value}]
    message = refusal(written(tmp_path / "pairs.parquet", rows))
    assert "pairs.parquet, record 1: column `pref_y` must hold +1" in message
    assert repr(value) in message


@pytest.mark.parametrize("column", ["pref_x", "weight_x", "margin_x"])
def test_a_number_too_large_for_a_float_is_refused_by_name(tmp_path, column):
    path = lines(tmp_path / "pairs.jsonl", {**ROWS[0], column: 10**400})
    message = refusal(path, "x", "x" if column == "margin_x" else "")
    assert f"line 1: column `{column}` must hold" in message
    assert len(message.replace(str(path), "")) < 250


def test_margins_are_read(tmp_path):
    rows = [row | {"margin_y": 0.5} for row in ROWS]
    dataset = load(lines(tmp_path / "good.jsonl", *rows), "x", "y")
    assert dataset["margin_y"][:] == [0.5, 0.5]


# Text that looks like something else


@pytest.mark.parametrize("cell", ["NA", "N/A", "None", "null", "nan", "", "-1", "[1, 2]", "a,\nb"])
def test_every_cell_of_a_csv_file_is_text(tmp_path, cell):
    rows = [{**ROWS[0], "prompt": cell, "chosen": cell}, ROWS[1]]
    dataset = load(written(tmp_path / "pairs.csv", rows))
    assert dataset[0]["prompt"] == dataset[0]["chosen"] == cell
    assert dataset["pref_x"][:] == [1, 0]


def test_labels_of_a_csv_file_are_numbers_or_empty(tmp_path):
    (path := tmp_path / "a.csv").write_text("chosen,rejected,pref_x,weight_x\na,b,,\nc,d,0.5,2\n")
    dataset = load(path)
    assert dataset["pref_x"][:] == [None, 0.5]
    assert dataset["weight_x"][:] == [None, 2.0]
    path.write_text("chosen,rejected,pref_x\na,b,1\nc,d,NA\n")
    assert "a.csv, record 2: column `pref_x` must hold" in (message := refusal(path, ["x"]))
    assert "'NA'" in message


def test_conversations_in_a_csv_file_are_parsed_or_refused(tmp_path):
    rows = [
        {name: json.dumps(messages(name)) for name in ("prompt", "chosen", "rejected")}
        | {"pref_x": 1}
    ] * 2
    dataset = load(written(tmp_path / "json.csv", rows))
    assert dataset[0]["chosen"] == messages("chosen")
    rows[1] = {name: x if name == "pref_x" else repr(messages(name)) for name, x in rows[1].items()}
    message = refusal(written(tmp_path / "repr.csv", rows), ["x"])
    assert "record 2: a text looks like messages but is not JSON" in message


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("chosen,rejected,pref_x\na,b\n", "record 1 must have 3 cells"),
        ('chosen,rejected,pref_x\n"a"b,c,1\n', "',' expected"),
        ("chosen,chosen,pref_x\na,b,1\n", "different names"),
        ("chosen,rejected,pref_x\n\xff,b,1\n", "utf-8"),
    ],
)
def test_broken_csv_is_refused(tmp_path, text, cause):
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    assert cause in refusal(tmp_path / "a.csv", ["x"])


def test_long_cells_and_a_byte_order_mark(tmp_path):
    rows = [{**ROWS[0], "chosen": "a" * 200_000}]
    path = written(tmp_path / "pairs.csv", rows)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    dataset = load(path)
    assert dataset[0]["prompt"] == "p "
    assert len(dataset[0]["chosen"]) == 200_000


# Columns and types that come late


def test_columns_may_begin_with_nulls_come_late_and_change_their_type(tmp_path):
    text = "word " * 1000  # more than a block of any reader
    first = {"prompt": "p", "chosen": text, "rejected": text + "x", "pref_x": 1, "pref_y": None}
    late = {**first, "pref_x": None, "pref_y": -0.5, "pref_z": 1, "weight_y": 3, "id": "a"}
    del late["pref_x"]
    rows = [{**first, "id": i} for i in range(2100)] + [late]
    dataset = load(lines(tmp_path / "pairs.jsonl", *rows), "xyz")
    assert dataset[0]["pref_y"] is dataset[0]["pref_z"] is dataset[-1]["pref_x"] is None
    assert (dataset[-1]["pref_y"], dataset[-1]["pref_z"]) == (-0.5, 1)
    assert dataset[-1]["weight_y"] == 3


def test_messages_may_get_further_fields_late(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    plain = {name: messages(name) for name in ("prompt", "chosen", "rejected")} | {"pref_x": 1}
    rows = [*[plain] * 1200, {**plain, "chosen": [call]}]
    dataset = load(lines(tmp_path / "pairs.jsonl", *rows))
    assert dataset[-1]["chosen"][0]["tool_calls"] == call["tool_calls"]
    assert dataset[0]["chosen"][0]["content"] == "chosen"


def test_a_changed_file_is_read_again(tmp_path):
    path = written(tmp_path / "pairs.jsonl")
    load(path)
    path.write_text(path.read_text().replace('"a"', '"new"'))
    assert load(path)[0]["chosen"] == "new"


# Conversations


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({**PAIR, "chosen": []}, ["a list of messages must not be empty"]),
        ({**PAIR, "chosen": "a"}, ["`prompt` is a list of messages here", "`chosen` is a text"]),
        ({**PAIR, "prompt": "p"}, ["`prompt` is a text here", "Convert with `raco-optim data`"]),
        ({**PAIR, "chosen": [{"from": "gpt", "value": "a"}]}, ["`role` and `content`", "gpt"]),
        ({**PAIR, "chosen": [{"role": "assistant", "content": 3}]}, ["`role` and `content`"]),
        ({**PAIR, **WHOLE}, ["`chosen` must not repeat the prompt"]),
        ({k: PAIR[k] for k in ("chosen", "rejected")}, ["must begin with the same message"]),
        ({"prompt": "p", "chosen": "pa", "rejected": "pb"}, ["must not repeat the prompt"]),
        (
            {"prompt": None, "chosen": {"a": 1}, "rejected": "b"},
            ["must be a text or messages", "{'a': 1}"],
        ),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, ["must be a text or messages", "3"]),
        ({"chosen": "a\ud800", "rejected": "b"}, ["must be valid Unicode"]),
        ({**PAIR, "tools": "search"}, ["line 1", "column `tools`", "JSON", "'search'", "null"]),
    ],
)
def test_bad_texts_and_conversations(tmp_path, row, parts):
    message = refusal(lines(tmp_path / "pairs.jsonl", {**row, "pref_x": 1}), "x")
    assert all(part in message for part in parts), message


def without(row, column):
    return {name: x for name, x in row.items() if name != column}


@pytest.mark.parametrize(
    ("rows", "arguments", "parts"),
    [
        *(
            (
                [without(row, column) for row in ROWS],
                "xy",
                [f"must have the column {column!r}", ".jsonl with the columns prompt, ", "pref_y"],
            )
            for column in ("chosen", "rejected")
        ),
        (ROWS, ["x", "fun"], ["`--weights` must name objectives", "got 'fun'", "has x, y"]),
        ([{"chosen": "a", "rejected": "b"}], "x", ["has none"]),
        (
            [row | {"pref_y": sign} for row, sign in zip(ROWS, (0, None), strict=True)],
            "xy",
            ["at least one pair for every objective", "'pref_y' is always 0 or null"],
        ),
        (
            [ROWS[0], ROWS[1] | {"rejected": None}],
            "xy",
            ["line 2: column `rejected` must hold a text or messages; got null"],
        ),
        ([ROWS[0], without(ROWS[1], "prompt")], "xy", ["line 2: either all pairs or none must"]),
        (ROWS, ("x", "y"), ["must have the column 'margin_y'"]),
        ([row | {"margin_y": None} for row in ROWS], ("x", "y"), ["column `margin_y` must hold"]),
        (
            [WHOLE | {"score_chosen": 7.0, "score_rejected": 3.0}],
            "x",
            ["looks like ultrafeedback-binarized: run `raco-optim data` first"],
        ),
    ],
)
def test_bad_records(tmp_path, rows, arguments, parts):
    path = lines(tmp_path / "pairs.jsonl", *rows)
    both = arguments if isinstance(arguments, tuple) else (arguments,)  # also those of margins
    message = refusal(path, *both)
    assert [part for part in parts if part not in message] == [], message


# Several sources


def test_compressed_files_and_folders(tmp_path):
    for name in ("a.jsonl.gz", "b.json.gz", "c.csv.gz"):
        path = written(tmp_path / name.removesuffix(".gz"))
        (tmp_path / "in" / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "deep" / name).write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "in" / "README.md").write_text("not data")
    (tmp_path / "in" / ".hidden.jsonl").write_text("not data")
    dataset = load(tmp_path / "in", "xy")
    assert dataset["chosen"][:] == ["a", "c"] * 3
    (tmp_path / "in" / "deep" / "test-0.jsonl").write_text("{}")
    message = refusal(tmp_path / "in")
    assert "must not mix training data with held-out data" in message
    assert "test-0.jsonl" in message
    (tmp_path / "none").mkdir()
    assert "without a .jsonl, .json, .csv or .parquet file" in refusal(tmp_path / "none")
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    assert "a.jsonl.gz: " in refusal(tmp_path / "a.jsonl.gz")


def test_a_folder_that_datasets_saved(tmp_path):
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    assert load(tmp_path / "one")["chosen"][:] == ["a", "c"]
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "several")
    assert "must be one split" in refusal(tmp_path / "several")


def test_files_with_one_objective_each_are_joined(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", f"pref_{name}": 1} for name in "xy"]
    paths = [str(written(tmp_path / f"{i}.jsonl", [row])) for i, row in enumerate(rows)]
    dataset = load(paths, "xy")
    assert dataset["pref_x"][:] == [1, None]
    assert dataset["pref_y"][:] == [None, 1]
    assert len({content_hash(x, "--data") for x in (paths, paths[:1], paths[::-1])}) == 3
    plain = hashlib.sha256((tmp_path / "0.jsonl").read_bytes()).hexdigest()
    assert content_hash(paths[0], "--data") == plain


def test_shares_make_the_largest_mixture_without_repeats(tmp_path, capsys):
    paths = []
    for name, many in (("x", 100), ("y", 10)):
        rows = [{**ROWS[0], "chosen": f"{name}{i}"} for i in range(many)]
        paths.append(str(written(tmp_path / f"{name}.jsonl", rows)))
    mixture = [f"{paths[0]}=0.75", f"{paths[1]}=0.25"]
    dataset = load(mixture)
    chosen = dataset["chosen"][:]
    assert [sum(x[0] == name for x in chosen) for name in "xy"] == [30, 10]
    assert len(set(chosen)) == 40
    assert "30 of 100 pairs of" in capsys.readouterr().err
    assert load(mixture)["chosen"][:] == chosen
    equal = load([f"{paths[0]}=0.5", f"{paths[1]}=0.5"])
    assert len(equal) == 20
    for wrong in ([mixture[0], paths[1]], [mixture[0], mixture[0]], [f"{paths[0]}=2"]):
        with pytest.raises(UsageError, match="sum to 1"):
            load(wrong)


def test_text_and_conversations_of_two_files_are_not_mixed(tmp_path):
    path = lines(tmp_path / "chat.jsonl", {**PAIR, "pref_x": 1})
    message = refusal([str(written(tmp_path / "text.jsonl")), str(path)], ["x"])
    assert "chat.jsonl, line 1: texts and messages must not be mixed" in message
    assert f"{tmp_path / 'text.jsonl'}, line 1" in message


def test_names_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load("owner/pairs")
    load("owner/pairs/part/of:test")
    assert asked[0] == ("owner/pairs", {"data_dir": None, "split": "train"})
    assert asked[-1] == ("owner/pairs", {"data_dir": "part/of", "split": "test"})


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = refusal("owner/pairs")
    assert "must be a file, a folder or a data set on the hub; got owner/pairs" in message
    assert "the hub failed" in message


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"a": 1}\n{"b"\n', "line 2 is not JSON"),
        ("[1]\n", "a record must have names and values; got [1]"),
        ("[" * 100_000, "nested too deeply"),
        ("\xff\n", "line 1 is not JSON"),
    ],
)
def test_broken_lines_are_named(tmp_path, text, cause):
    (tmp_path / "a.jsonl").write_bytes(text.encode("latin-1"))
    sources = open_sources([str(tmp_path / "a.jsonl")], "--data")
    with pytest.raises(UsageError, match=r"a\.jsonl") as caught:
        list(sources[0].records())
    assert cause in str(caught.value)
