"""The site: nothing public is missing from it, and its pictures can be drawn anew.

That it builds without a warning, so that no page is an orphan and no link is dead, is `make docs`.
"""

import inspect
import re
from pathlib import Path

import pytest

import raco_optim
import raco_optim.integrations.gguf
import raco_optim.integrations.trl
import raco_optim.plot
import raco_optim.rules
from benchmarks import theory_figures

DOCS = Path(__file__).parent.parent / "docs"


def test_every_public_name_has_its_place_in_the_api():
    page = (DOCS / "api.rst").read_text()
    placed = re.findall(r"^\.\. auto(?:class|function):: (\S+)$", page, re.MULTILINE)
    expected = {
        f"{module.__name__}.{name}"
        for module in (
            raco_optim,
            raco_optim.integrations.gguf,
            raco_optim.integrations.trl,
            raco_optim.plot,
        )
        for name in module.__all__
    }
    expected |= {
        f"raco_optim.rules.{name}"
        for name, value in vars(raco_optim.rules).items()
        if inspect.isclass(value) and name not in raco_optim.__all__
    }
    assert expected == set(placed)
    assert len(placed) == len(expected)
    modules = set(re.findall(r"^\.\. automodule:: (\S+)\n   :members:$", page, re.MULTILINE))
    assert modules == {"raco_optim.pareto", "raco_optim.alignment"}


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_picture_has_words_for_those_who_do_not_see_it(page):
    words = re.findall(r"!\[(.*?)\]\(", page.read_text(), re.DOTALL)
    assert all(len(text) > 20 for text in words)


def test_pictures_of_the_theory_are_drawn_anew(tmp_path):
    theory_figures.main([str(tmp_path / "images")])
    drawn = {path.name for path in (tmp_path / "images").iterdir()}
    assert drawn == {path.name for path in (DOCS / "images").glob("theory-*.png")}
