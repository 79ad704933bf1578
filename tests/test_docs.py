"""The documentation is true: its code runs, what it points at exists, and nothing is left out."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import raco_optim
import raco_optim.alignment
import raco_optim.integrations.gguf
import raco_optim.integrations.trl
import raco_optim.pareto
import raco_optim.plot
import raco_optim.rules
from raco_optim.gradients import explain

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
MODULES = sorted(
    ["raco_optim", *(m.name for m in pkgutil.walk_packages(raco_optim.__path__, "raco_optim."))]
)
# Every language that a fence may name: a misspelt "python" would run nowhere.
LANGUAGES = {"python", "diff", "bash", "text"}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page_id(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(params=PAGES, ids=page_id)
def page(request):
    return request.param


def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, text = {"__name__": "__main__"}, page.read_text()
    for found in FENCE.finditer(text):
        assert found[1] in LANGUAGES
        if found[1] == "python":
            # Padded, so that a traceback names the line of the page.
            lines = "\n" * text.count("\n", 0, found.start(2))
            exec(compile(lines + found[2], str(page), "exec"), namespace)


def anchors(page):
    """The anchors of a page's headings, as Sphinx and the hosts of repositories make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_links_lead_somewhere_and_tests_that_are_named_exist(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", FENCE.sub("", text))
    for target, anchor in targets:
        if "://" not in target:
            file = page.parent / target if target else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), f"{target}#{anchor}"
    for path, name in re.findall(r"\b(tests/\w+\.py)(?:::(\w+))?", text):
        assert re.search(rf"\b(def|class) {name}", (ROOT / path).read_text())


def words(page):
    """Words of a page, its code included; a sign such as the | of a table is none."""
    return sum(any(map(str.isalnum, word)) for word in page.read_text().split())


def test_there_is_not_more_to_read_than_a_person_reads():
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*.rst")]
    assert len(pages) <= 16
    assert sum(map(words, pages)) <= 16_000
    assert words(ROOT / "README.md") <= 1_000
    assert words(ROOT / "docs" / "evidence.md") <= 2_000


@pytest.mark.parametrize("name", MODULES)
def test_doctests_run(name):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(name), optionflags=options).failed == 0


def own_names(module):
    """Functions and classes that the module itself defines for its users."""
    return [
        f"{module.__name__}.{name}"
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
    ]


WITH_ALL = (
    raco_optim,
    raco_optim.alignment,
    raco_optim.integrations.gguf,
    raco_optim.integrations.trl,
    raco_optim.plot,
)
PUBLIC = [
    *(f"{module.__name__}.{name}" for module in WITH_ALL for name in module.__all__),
    *own_names(raco_optim.pareto),
    *(f"raco_optim.rules.{name}" for name in vars(raco_optim.rules) if name.endswith("Rule")),
]


def test_public_names_have_a_docstring_with_an_example():
    assert len(set(PUBLIC)) == len(PUBLIC)
    for name in PUBLIC:
        public = pkgutil.resolve_name(name)
        if inspect.isclass(public) or inspect.isfunction(public):
            # Its own, not one inherited from a parent, nor the signature that dataclass() fills in.
            assert ">>>" in (public.__doc__ or ""), name


def imported(path):
    """Modules of the package and the names that a file imports from them."""
    return [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("raco_optim")
        for alias in node.names
    ]


def test_benchmarks_and_examples_import_only_what_users_can():
    pages = "".join(page.read_text() for page in (*PAGES, ROOT / "docs" / "api.rst"))
    files = [*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("docs/examples/*.py")]
    found = {(module, name) for path in files for module, name in imported(path)}
    assert len({module for module, _ in found}) > 5
    for module, name in found:
        assert module in pages, f"{module} is on no page"
        public = getattr(importlib.import_module(module), "__all__", None)
        assert not name.startswith("_")
        assert public is None or name in public, f"{module}.{name}"


def test_the_remedy_for_compiled_models_works_in_a_fresh_process():
    """Each place that names the setting says, in code, all that has to run."""
    places = {page_id(page): FENCE.sub("", page.read_text()) for page in PAGES}
    places["what is raised"] = "".join(map(" ".join, explain._REMEDIES))
    spans = {
        name: [x for x in re.findall(r"`([^`]+)`", text) if "torch._functorch" in x]
        for name, text in places.items()
    }
    spans = {name: found for name, found in spans.items() if found}
    assert spans.keys() >= {"docs/recipes.md", "what is raised"}
    check = "assert torch._functorch.config.donated_buffer is False"
    for found in {tuple(" ".join(x.split()) for x in found) for found in spans.values()}:
        code = "\n".join(["import torch", *found, check])
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, f"{code}: {done.stderr}"
