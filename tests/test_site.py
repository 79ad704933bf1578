"""The site: nothing public is missing from it, it needs no network, its pictures are drawn anew.

`make docs` tests that it builds without a warning: no page is an orphan and no link is dead.
"""

import inspect
import io
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

import raco_optim
import raco_optim.integrations.gguf
import raco_optim.integrations.trl
import raco_optim.plot
import raco_optim.rules
from benchmarks import first_picture, theory_figures

DOCS = Path(__file__).parent.parent / "docs"


def test_every_public_name_has_its_place_in_the_api():
    page = (DOCS / "api.rst").read_text()
    placed = re.findall(r"^\.\. auto(?:class|function):: (\S+)$", page, re.MULTILINE)
    integrations = raco_optim.integrations
    modules = (raco_optim, integrations.gguf, integrations.trl, raco_optim.plot)
    expected = {f"{module.__name__}.{name}" for module in modules for name in module.__all__}
    expected |= {
        f"raco_optim.rules.{name}"
        for name, value in vars(raco_optim.rules).items()
        if inspect.isclass(value) and name not in raco_optim.__all__
    }
    assert expected == set(placed)
    assert len(placed) == len(expected)
    modules = set(re.findall(r"^\.\. automodule:: (\S+)\n   :members:$", page, re.MULTILINE))
    assert modules == {"raco_optim.pareto", "raco_optim.alignment"}


def test_every_picture_has_words_for_those_who_do_not_see_it():
    for page in DOCS.glob("*.md"):
        words = re.findall(r"!\[(.*?)\]\(", page.read_text(), re.DOTALL)
        assert all(len(text) > 20 for text in words), page


def test_pictures_of_the_theory_are_drawn_anew(tmp_path):
    theory_figures.main([str(tmp_path / "images")])
    drawn = {path.name for path in (tmp_path / "images").iterdir()}
    assert drawn == {path.name for path in (DOCS / "images").glob("theory-*.png")}


def test_first_picture_is_drawn_anew(tmp_path):
    first_picture.draw(tmp_path / first_picture.IMAGE, steps=4)
    assert (tmp_path / first_picture.IMAGE).stat().st_size > 10_000
    assert (DOCS / "images" / first_picture.IMAGE).exists()


def test_first_picture_measures_the_weights_of_an_end_point():
    """The optimum for some weights has reached these, whoever trained it."""
    problem = first_picture.bowls()
    for first in (0.2, 0.7):
        weights = first_picture.torch.tensor([first, 1 - first], dtype=first_picture.torch.float64)
        best = first_picture.torch.stack(problem.losses(problem.weighted_solution(weights)))
        run = first_picture.Run(best.expand(4, 2), 0.0)
        assert first_picture.reached(problem, run) == pytest.approx(first, abs=1e-3)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built in this process, which has imported what the pages document."""
    folder, said = tmp_path_factory.mktemp("site"), io.StringIO()
    with docutils_namespace(), patch_docutils(DOCS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Sphinx and its extensions call
        app = Sphinx(DOCS, DOCS, folder, folder / ".doctrees", "html", status=None, warning=said)
        app.build()
    assert app.statuscode == 0, said.getvalue()
    return folder


def test_formulas_are_part_of_the_pages(site):
    shown = 0
    for page in site.glob("*.html"):
        html = page.read_text()
        shown += html.count("<math ")
        text = re.sub(r"<(pre|code|script|style)\b.*?</\1>|<[^>]+>", "", html, flags=re.DOTALL)
        for raw in ("$", r"\(", r"\[", r"\frac", r"\sum", "mathjax"):
            assert raw not in text, f"{page.name} shows {raw}"
    assert shown > 100


def test_pages_ask_no_other_host(site):
    """Links that a reader follows may lead anywhere; what a page loads is beside it."""
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text()):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), (page.name, tag)
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", style.read_text()), style.name


FRAMES = """<!doctype html><body>{frames}<pre id="found"></pre><script>
window.onload = () => {{
  const found = [...document.querySelectorAll("iframe")].map((frame) => {{
    const page = frame.contentDocument;
    const seen = (name) => [...page.getElementsByTagName(name)].filter((x) => x.checkVisibility());
    const wider = page.documentElement.scrollWidth - page.documentElement.clientWidth;
    const flat = seen("math").filter((x) => x.getBoundingClientRect().height < 5).length;
    const broken = seen("img").filter((x) => x.naturalWidth === 0).length;
    return [frame.getAttribute("src"), frame.width, wider, flat, broken].join(" ");
  }});
  document.getElementById("found").textContent = found.join("\\n");
}};
</script>"""
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_a_browser_without_a_network_shows_every_page_in_full(site, tmp_path):
    """At 1,300 and 400 pixels: nothing is cut off, formulas have a height, pictures are there."""
    pages = sorted(page.with_suffix(".html").name for page in DOCS.glob("*.[mr]*"))
    assert len(pages) > 10
    frames = "".join(
        f'<iframe src="{page}" width="{width}" height="900"></iframe>'
        for page in pages
        for width in (1300, 400)
    )
    (site / "frames.html").write_text(FRAMES.format(frames=frames))
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-web-security",
        "--allow-file-access-from-files",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=60000",
        f"--user-data-dir={tmp_path}",
        "--dump-dom",
        (site / "frames.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1].splitlines()
    assert len(found) == 2 * len(pages), done.stderr
    for line in found:
        page, width, wider, flat, broken = line.split()
        assert (wider, flat, broken) == ("0", "0", "0"), f"{page} at {width} pixels"
