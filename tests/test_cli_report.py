"""`raco-optim report`: what it prints and writes, and which files it refuses."""

import base64
import html.parser
import io
import itertools
import json
import random
import re
import struct
import sys
from pathlib import Path

import pytest

from raco_optim.cli import figures, main
from raco_optim.cli.grid import grid_points, read_records, run_grid
from raco_optim.cli.tables import Table, spread

NASTY = "<script>alert('$x_1$')</script>"


METHODS = ("linear", "raco", "mgda")


def write(path, names, *, seeds=(0, 1, 2), methods=METHODS, settings=None, bad=()):
    """Writes the results of a grid with random scores; the losses of bad seeds are missing."""
    m = len(names)
    corners = [[0.6 if i == j else 0.4 / (m - 1) for i in range(m)] for j in range(m)]
    weights = [dict(zip(names, w, strict=True)) for w in (corners if m > 1 else [[1.0]])]

    def scores(point, generator):
        return {
            "loss": None if point.seed in bad else generator.uniform(0.5, 0.8),
            "margin": generator.uniform(-1, 1),
            "accuracy": generator.uniform(0.4, 0.9),
            "labelled": 20,
        }

    def run(point):
        generator = random.Random(point.label)
        training = {"hurting_steps": 0.25, "conflicting_steps": 0.5, "seconds": 2.0}
        evaluation = {name: scores(point, generator) for name in names}
        return {"evaluation": evaluation, "training": training}

    run_grid(path, grid_points(methods, weights, seeds), settings or {"model": NASTY}, run)
    return path


@pytest.fixture
def results(tmp_path):
    return write(tmp_path / "results.jsonl", ["helpful", NASTY])


@pytest.fixture
def output(tmp_path):
    return tmp_path / "report.html"


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves pictures out, which take most of the time of a report; returns their figures."""
    shown = []
    monkeypatch.setattr(figures, "_png", lambda figure: shown.append(figure) or b"")
    return shown


class Page(html.parser.HTMLParser):
    """Collects the tags, with their attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text())
        self.sources = [a["src"] for tag, a in self.tags if tag == "img"]

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
    assert len(page.sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "http" not in re.sub(r"base64,[^\"]+", "", output.read_text())
    assert NASTY in page.text
    assert str(output) in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize("m", [1, 2, 3])
def test_pictures_for_any_number_of_objectives(m, tmp_path, output):
    assert report(write(tmp_path / "r.jsonl", "abc"[:m], seeds=[0]), output=output) == 0
    pictures = [base64.b64decode(x.partition(",")[2]) for x in Page(output).sources]
    assert len(pictures) == min(m, 2)  # one objective has no trade-off
    for picture in pictures:
        assert picture.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", picture[16:24])
        assert width > 1000
        assert height > 250


@pytest.mark.usefixtures("undrawn")
def test_objectives_that_are_not_drawn_are_counted(tmp_path, output, monkeypatch):
    monkeypatch.setattr(figures, "OBJECTIVES", 2)
    assert report(write(tmp_path / "r.jsonl", "abc", seeds=[0]), output=output) == 0
    assert "of the first 2 of 3 objectives" in output.read_text()


@pytest.mark.parametrize("m", [2, 3])
def test_points_carry_their_weights_in_one_matrix_of_panels(m, tmp_path, undrawn):
    figures.trade_off_figure(read_records(write(tmp_path / "r.jsonl", list("abc"[:m]))))
    panels = [axes for axes in undrawn[0].axes if axes.axison]
    assert len(panels) == m * (m - 1)
    labels = {(axes.get_xlabel(), axes.get_ylabel()) for axes in panels}
    if m == 3:
        assert ("loss on a", "loss on b") in labels and ("accuracy on b", "accuracy on a") in labels
    corner = 0.6, *[0.4 / (m - 1)] * (m - 1)
    weights = {" / ".join(f"{w:g}" for w in x) for x in itertools.permutations(corner)}
    for axes in panels:
        assert {text.get_text() for text in axes.texts if "/" in text.get_text()} == weights


@pytest.mark.usefixtures("undrawn")
def test_methods_that_these_seeds_do_not_tell_apart_are_named(tmp_path, capsys):
    def sentence(seeds, gap):
        path = tmp_path / f"{len(seeds)} {gap}.jsonl"
        write(path, ["a", "b"], seeds=seeds)
        records = read_records(path)
        for record in records:
            if record["point"]["method"] == "linear":
                for scores in record["evaluation"].values():
                    scores["loss"] += gap
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        report(path, output=tmp_path / "report.html")
        summary = capsys.readouterr().out.splitlines()[0]
        assert summary in Page(tmp_path / "report.html").text
        return summary

    few = sentence(range(3), 5.0)
    assert "These seeds distinguish no two methods" in few
    assert "3 methods need at least 7 seeds" in few
    some = sentence(range(8), 5.0)
    assert "These seeds do not distinguish" in some and some.endswith(": raco (c = 0.4) and mgda.")
    assert "linear" not in some.partition("not distinguish")[2]


def test_tables_hold_the_means_over_seeds_and_come_first(results, output, capsys):
    report(results, output=output)
    printed, page = capsys.readouterr().out, Page(output).text
    records = [json.loads(line) for line in results.read_text().splitlines()]
    losses = [r["evaluation"]["helpful"]["loss"] for r in records if r["point"]["method"] == "mgda"]
    assert spread(losses) in next(line for line in printed.splitlines() if "mgda" in line)
    for text in (
        "Held-out loss (lower is better)",
        "Held-out accuracy (higher is better)",
        "Hypervolume (higher is better)",
        "Held-out loss, difference from linear (below 0 is better)",
        "Training steps",
        "25.0 %",
        "50.0 %",
    ):
        assert text in printed
        assert text in page
    order = ["Held-out loss", "Hypervolume (", "Training steps", "<img", "Models", "Settings"]
    assert sorted(order, key=output.read_text().index) == order
    assert "Environment" in page


@pytest.mark.usefixtures("undrawn")
def test_values_that_are_missing_are_left_out_and_named(tmp_path, output, capsys):
    path = write(tmp_path / "r.jsonl", ["a", "b"], methods=["raco"], bad=[1])
    assert report(path, output=output) == 0
    printed = capsys.readouterr().out
    assert "4 runs of 1 method with 2 seeds" in printed
    assert "because of values that are not finite: raco c=0.4 a=0.6,b=0.4 seed=1;" in printed
    assert "difference from linear" not in printed, "there is no baseline"


@pytest.mark.usefixtures("undrawn")
def test_files_are_put_together_also_of_a_run_in_progress(tmp_path, output, capsys):
    first = write(tmp_path / "1.jsonl", ["a", "b"], seeds=[0, 1])
    second = write(tmp_path / "2.jsonl", ["b", "a"], seeds=[2])
    with second.open("a") as file:
        file.write('{"point": {"meth')
    assert report(first, second, output=output) == 0
    printed = capsys.readouterr().out
    assert "15 runs of 3 methods with 3 seeds" in printed
    assert "Weights in the order a, b." in printed


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


@pytest.mark.usefixtures("undrawn")
def test_files_that_do_not_belong_together_are_refused(results, tmp_path, output, capsys):
    other = write(tmp_path / "other.jsonl", ["helpful", NASTY], seeds=[9], settings={"model": "B"})
    message = refusal(capsys, results, other, output=output)
    assert "other.jsonl holds a run with other settings" in message
    assert "they differ in model" in message
    other = write(tmp_path / "objectives.jsonl", ["helpful", "humour"], seeds=[9])
    message = refusal(capsys, results, other, output=output)
    assert "objectives.jsonl holds a run with the objectives helpful, humour" in message
    assert "repeats a run of" in refusal(capsys, results, results, output=output)


@pytest.mark.usefixtures("undrawn")
def test_files_without_results_are_refused(results, tmp_path, output, capsys):
    assert report(results, output=output) == 0  # an older one
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl is empty" in refusal(capsys, empty, output=output)
    assert "can't be read" in refusal(capsys, tmp_path / "missing", output=output)
    assert "line 1, is not JSON" in refusal(capsys, Path(__file__), output=output)
    bare = {"point": {"method": "linear", "weights": {"a": 1.0}, "seed": 0, "c": None}}
    bare |= {"settings": {}, "evaluation": {"a": {"loss": 1.0}}, "training": {}}
    empty.write_text(json.dumps(bare) + "\n")
    message = refusal(capsys, empty, output=output)
    assert "the run linear a=1 seed=0 has no accuracy, margin, labelled for 'a'" in message
    nothing = write(tmp_path / "nan.jsonl", ["a"], bad=[0, 1, 2])
    assert "at least one run must have a finite loss" in refusal(capsys, nothing, output=output)


def test_output_is_checked_before_the_work(results, tmp_path, capsys):
    for wrong in (tmp_path, results / "report.html", Path("/dev/null")):
        assert "`--output` must be a file" in refusal(capsys, results, output=wrong)
    assert "a page that raco-optim wrote" in refusal(capsys, results, output=results)


@pytest.mark.usefixtures("undrawn")
def test_only_a_page_of_its_own_is_replaced(results, tmp_path, output, capsys):
    for text in ("x", "<!DOCTYPE html>\n<html><title>My thesis</title></html>", "\x89PNG"):
        output.write_text(text)
        assert "report.html, another file" in refusal(capsys, results, output=output)
    output.write_text("")
    assert report(results, output=output) == 0
    (tmp_path / "link.html").symlink_to(output)
    output.write_text(output.read_text().replace("Multi-objective", "Older"))
    assert report(results, output=tmp_path / "link.html") == 0
    assert (tmp_path / "link.html").is_symlink() and "Multi-objective" in output.read_text()


def nested(depth):
    return "[" * depth + "]" * depth


WRONG = {
    "no weights": {"point": {"weights": {}}},
    "a weight that is a text": {"point": {"weights": {"a": "much"}}},
    "an infinite weight": {"point": {"weights": {"a": "INF"}}},
    "a method that is a number": {"point": {"method": 3}},
    "a seed that is a text": {"point": {"seed": "0"}},
    "a radius that is a list": {"point": {"c": [0.4]}},
    "scores that are a number": {"evaluation": {"a": 0.5}},
    "a loss that is a text": {"evaluation": {"a": {"loss": "low"}}},
    "a loss that is a list": {"evaluation": {"a": {"loss": [0.5, 0.6]}}},
    "a huge loss": {"evaluation": {"a": {"loss": 10**400}}},
    "no count": {"evaluation": {"a": {"labelled": None}}},
    "a share that is a text": {"training": {"hurting_steps": "many"}},
    "an environment that is a list": {"environment": []},
    "a deep one": {"extra": {"x": "DEEP"}},
    "a deep setting": {"settings": {"x": "FLAT"}},
}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("case", WRONG)
def test_records_with_wrong_types_are_refused(case, tmp_path, output, capsys):
    path = write(tmp_path / "r.jsonl", ["a"], seeds=[0], methods=["raco"])
    (record,) = read_records(path)
    for part, changes in WRONG[case].items():
        if not isinstance(changes, dict):
            record[part] = changes
            continue
        for name, value in changes.items():
            old = record[part].get(name)
            nest = isinstance(old, dict) and isinstance(value, dict) and value
            record[part][name] = old | value if nest else value
    text = json.dumps(record).replace('"INF"', "1e999").replace('"DEEP"', nested(100_000))
    path.write_text(text.replace('"FLAT"', nested(900)) + "\n")
    if case == "a deep setting":  # one that Python's JSON takes
        assert report(path, output=output) in (0, 2)
    else:
        assert "r.jsonl" in refusal(capsys, path, output=output)


@pytest.mark.usefixtures("undrawn")
def test_a_terminal_that_knows_ascii_alone(results, output, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert report(results, output=output) == 0
    terminal.flush()
    assert b"Held-out loss" in terminal.buffer.getvalue()
    assert "±" in output.read_text(encoding="utf-8")


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
