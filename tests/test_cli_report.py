"""`raco-optim report`: what it prints and writes, and which files it refuses."""

import base64
import html.parser
import json
import random
import re
import struct
import sys
from pathlib import Path

import pytest

from raco_optim.cli import figures, main
from raco_optim.cli.grid import grid_points, run_grid
from raco_optim.cli.tables import Table, spread

NASTY = "<script>alert('$x_1$')</script>"


def write(
    path, names, *, seeds=(0, 1, 2), methods=("linear", "raco", "mgda"), settings=None, bad=()
):
    m = len(names)
    corners = [[0.6 if i == j else 0.4 / (m - 1) for i in range(m)] for j in range(m)]
    weights = [dict(zip(names, w, strict=True)) for w in (corners if m > 1 else [[1.0]])]

    def run(point):
        generator = random.Random(point.label)
        return {
            "evaluation": {
                name: {
                    "loss": None if point.seed in bad else generator.uniform(0.5, 0.8),
                    "margin": generator.uniform(-1, 1),
                    "accuracy": generator.uniform(0.4, 0.9),
                    "labelled": 20,
                }
                for name in names
            },
            "training": {"hurting_steps": 0.25, "conflicting_steps": 0.5, "seconds": 2.0},
        }

    run_grid(path, grid_points(methods, weights, seeds), settings or {"model": NASTY}, run)
    return path


@pytest.fixture
def results(tmp_path):
    return write(tmp_path / "results.jsonl", ["helpful", NASTY])


class Page(html.parser.HTMLParser):
    """Collects the tags, with their attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def report(*files, output):
    return main(["report", *map(str, files), "--output", str(output)])


def test_page_needs_nothing_and_escapes_everything(results, tmp_path, capsys):
    output = tmp_path / "new folder" / "report.html"
    assert report(results, output=output) == 0
    page = Page(output)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object"}
    sources = [a["src"] for tag, a in page.tags if tag == "img"]
    assert len(sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "http" not in re.sub(r"base64,[^\"]+", "", output.read_text())
    assert NASTY in page.text
    assert str(output) in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]], ids=len)
def test_pictures_for_any_number_of_objectives(names, tmp_path):
    output = tmp_path / "report.html"
    assert report(write(tmp_path / "r.jsonl", names, seeds=[0]), output=output) == 0
    pictures = [
        base64.b64decode(attributes["src"].partition(",")[2])
        for tag, attributes in Page(output).tags
        if tag == "img"
    ]
    assert len(pictures) == (1 if len(names) == 1 else 2)  # one objective has no trade-off
    for picture in pictures:
        assert picture.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", picture[16:24])
        assert width > 1000
        assert height > 250


def test_pairs_that_are_not_drawn_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "PAIRS", 1)
    output = tmp_path / "report.html"
    assert report(write(tmp_path / "r.jsonl", ["a", "b", "c"], seeds=[0]), output=output) == 0
    assert "the first 1 of 3 pairs of objectives" in output.read_text()


def test_tables_hold_the_means_over_seeds(results, tmp_path, capsys):
    report(results, output=tmp_path / "report.html")
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in results.read_text().splitlines()]
    losses = [r["evaluation"]["helpful"]["loss"] for r in records if r["point"]["method"] == "mgda"]
    assert spread(losses) in next(line for line in printed.splitlines() if "mgda" in line)
    page = Page(tmp_path / "report.html").text
    for text in (
        "Held-out loss (lower is better)",
        "Held-out accuracy (higher is better)",
        "Hypervolume (higher is better)",
        "Held-out loss minus that of linear (below 0 is better)",
        "Training steps",
        "25.0 %",
        "50.0 %",
    ):
        assert text in printed
        assert text in page
    assert "Settings" in page
    assert "Environment" in page


def test_values_that_are_missing_are_left_out_and_named(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", ["a", "b"], methods=["raco"], bad=[1])
    assert report(path, output=tmp_path / "report.html") == 0
    printed = capsys.readouterr().out
    assert "4 runs of 1 method with 2 seeds" in printed
    assert "Left out, for want of a finite value: raco c=0.4 a=0.6,b=0.4 seed=1;" in printed
    assert "minus that of linear" not in printed, "there is no baseline"


def test_files_are_put_together(tmp_path, capsys):
    first = write(tmp_path / "1.jsonl", ["a", "b"], seeds=[0, 1])
    second = write(tmp_path / "2.jsonl", ["b", "a"], seeds=[2])
    assert report(first, second, output=tmp_path / "report.html") == 0
    printed = capsys.readouterr().out
    assert "15 runs of 3 methods with 3 seeds" in printed
    assert "Weights in the order a, b." in printed


def test_a_run_in_progress_can_be_reported(results, tmp_path):
    with results.open("a") as file:
        file.write('{"point": {"meth')
    assert report(results, output=tmp_path / "report.html") == 0


# Refusals


def refusal(capsys, *files, output):
    before = output.read_bytes() if output.is_file() else None
    capsys.readouterr()
    assert report(*files, output=output) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert (output.read_bytes() if output.is_file() else None) == before
    return printed.err


def test_files_that_do_not_belong_together_are_refused(results, tmp_path, capsys):
    output = tmp_path / "report.html"
    other = write(tmp_path / "other.jsonl", ["helpful", NASTY], seeds=[9], settings={"model": "B"})
    message = refusal(capsys, results, other, output=output)
    assert "other.jsonl holds a run with other settings" in message
    assert "they differ in model" in message

    other = write(tmp_path / "objectives.jsonl", ["helpful", "humour"], seeds=[9])
    message = refusal(capsys, results, other, output=output)
    assert "objectives.jsonl holds a run with the objectives helpful, humour" in message

    message = refusal(capsys, results, results, output=output)
    assert "repeats a run of" in message


def test_files_without_results_are_refused(results, tmp_path, capsys):
    output = tmp_path / "report.html"
    output.write_text("older report")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl holds no record" in refusal(capsys, empty, output=output)
    assert "cannot be read" in refusal(capsys, tmp_path / "missing", output=output)
    assert "line 1, is not JSON" in refusal(capsys, Path(__file__), output=output)
    bare = {"point": {"method": "linear", "weights": {"a": 1.0}, "seed": 0, "c": None}}
    bare |= {"settings": {}, "evaluation": {"a": {"loss": 1.0}}, "training": {}}
    empty.write_text(json.dumps(bare) + "\n")
    message = refusal(capsys, empty, output=output)
    assert "the run linear a=1 seed=0 has no accuracy, margin, labelled for 'a'" in message
    nothing = write(tmp_path / "nan.jsonl", ["a"], bad=[0, 1, 2])
    assert "no run has a finite loss" in refusal(capsys, nothing, output=output)


def test_output_is_checked_before_the_work(results, tmp_path, capsys):
    assert "`--output` must be a file" in refusal(capsys, results, output=tmp_path)
    below = results / "report.html"
    assert "`--output` must be a file" in refusal(capsys, results, output=below)
    assert "must not be one of the files" in refusal(capsys, results, output=results)


def test_missing_package_is_named_with_its_extra(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = refusal(capsys, results, output=tmp_path / "report.html")
    assert 'matplotlib is not installed. Run `pip install "raco_optim[plot]"`.' in message
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "moocore", None)
    three = write(tmp_path / "three.jsonl", ["a", "b", "c"])
    message = refusal(capsys, three, output=tmp_path / "report.html")
    assert 'pip install "raco_optim[pareto]"' in message


def test_table_is_aligned():
    table = Table("T", ["method", "x"], [["linear", "1"], ["a", "10"]])
    assert table.text() == "T\n  method   x\n  linear   1\n  a       10"
