"""The notebooks of docs/notebooks: their cells run, and print what is stored with them."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def cells(path):
    return json.loads(path.read_text())["cells"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param


def assert_alike(printed, stored):
    """The same words, and numbers that differ by no more than rounding in training does."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", stored).split()
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(stored), strict=True)
    for found, expected in pairs:
        assert float(found) == pytest.approx(float(expected), rel=0.1, abs=0.1)


# Of TRL: dispatch, and what it says about memory that no accelerator is there to pin.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_cells_run_and_print_what_is_stored(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with mpl.rc_context({"backend": "agg"}):
        for number, cell in enumerate(cells(notebook)):
            if cell["cell_type"] != "code":
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
            stored = [x["text"] for x in cell["outputs"] if x["output_type"] == "stream"]
            assert_alike(printed.getvalue(), "".join(sum(stored, [])))
            pictures = [x for x in cell["outputs"] if x["output_type"] == "display_data"]
            assert len(plt.get_fignums()) == len(pictures)
            plt.close("all")


def test_notebooks_are_small_and_their_links_lead_somewhere():
    assert len(NOTEBOOKS) == 2
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 300_000
    for path in NOTEBOOKS:
        text = "".join("".join(x["source"]) for x in cells(path) if x["cell_type"] == "markdown")
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert (FOLDER / target).exists(), target
