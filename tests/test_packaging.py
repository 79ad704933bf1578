"""What a user gets from `pip install .`: the package alone, on three dependencies."""

import configparser
import email.message
import email.parser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
CORE = {"torch", "numpy", "scipy"}

# Run in a fresh interpreter before anything else: hides the modules that the command line names, so
# that they look as if nobody had installed them.
HIDE = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in sys.argv[1:]:
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):  # importlib.metadata asks finders for distributions
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def names_without_extras(requirements):
    found = map(Requirement, requirements)
    return {
        canonicalize_name(r.name)
        for r in found
        if r.marker is None or r.marker.evaluate({"extra": ""})
    }


def optional_modules():
    """Top-level modules that are installed here, but not by the core requirements or theirs."""
    core, pending = set(), set(CORE)
    while pending:
        name = pending.pop()
        core.add(name)
        pending |= names_without_extras(importlib.metadata.requires(name) or []) - core
    owners = importlib.metadata.packages_distributions().items()
    optional = {module for module, of in owners if not core & set(map(canonicalize_name, of))}
    return optional - {"raco_optim"}


def run_python(code, *arguments, path):
    """Runs code in a fresh interpreter that finds raco_optim in `path`; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        cwd=path,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The folder with the source distribution, and the wheel that was built from it."""
    # A copy, since setuptools leaves build/ and *.egg-info where it works.
    source = shutil.copytree(
        ROOT,
        tmp_path_factory.mktemp("distributions") / "source",
        ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"),
    )
    run_module("build", "--no-isolation", str(source))
    return source / "dist"


def run_module(*arguments):
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(distributions):
    (path,) = distributions.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return email.parser.BytesParser().parsebytes(wheel.read(name))


def test_distributions_hold_the_package_and_how_to_build_it(distributions, wheel):
    """And no tests: they import benchmarks and read the docs, which are in the repository."""
    package = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("raco_optim/**/*.py")}
    package.add("raco_optim/py.typed")
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == package
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    about = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert {name for name in names if ".egg-info/" not in name} == package | about


def test_package_index_would_take_both(distributions):
    run_module("twine", "check", "--strict", *map(str, distributions.iterdir()))


def test_metadata_of_the_wheel(wheel, metadata):
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
    assert metadata["License-Expression"] == "MIT"
    readme = metadata.get_payload(decode=True).decode()
    assert readme.strip() == (ROOT / "README.md").read_text().strip()
    assert names_without_extras(metadata.get_all("Requires-Dist")) == CORE


def test_wheel_trains_with_nothing_but_the_core_requirements(wheel, tmp_path):
    wheel.extractall(tmp_path)
    train = """
    import torch, raco_optim

    x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    for solver in ("exact", "pgd", "slsqp"):
        inner = torch.optim.SGD([x], lr=0.1)
        optimizer = raco_optim.CAGradClip(inner, weights=[0.5, 0.5], solver=solver)
        optimizer.zero_grad()
        optimizer.backward([x.square().sum(), (x - 2).square().sum() + x[0]])
        optimizer.step()
    assert torch.isfinite(x).all()
    print(raco_optim.__file__)
    """
    output = run_python(HIDE + textwrap.dedent(train), *optional_modules(), path=tmp_path)
    assert output.strip() == str(tmp_path / "raco_optim" / "__init__.py")


def test_import_loads_nothing_optional_and_the_trainer_names_what_it_lacks():
    # What torch and SciPy import of their own accord where they find it is not ours.
    code = """
    import torch, numpy, scipy.optimize

    before = set(sys.modules)
    import raco_optim

    print(*set(sys.modules) - before)
    for package in ("trl", "datasets"):
        sys.argv[1:] = [package]
        try:
            import raco_optim.integrations.trl
        except ImportError as error:
            print(error)
    """
    loaded, *errors = run_python(HIDE + textwrap.dedent(code), path=ROOT).splitlines()
    loaded = {name.partition(".")[0] for name in loaded.split()}
    assert "raco_optim" in loaded
    assert loaded & optional_modules() == set()
    message = 'raco_optim.integrations.trl needs {}. Run: pip install "raco_optim[align]"'
    assert errors == [message.format("trl"), message.format("datasets")]


def test_optional_packages_are_installed_here():
    # Or the two tests above would hold for no reason.
    optional = {"matplotlib", "moocore", "torchjd", "cvxpy", "tqdm", "transformers", "tokenizers"}
    assert optional <= optional_modules()


def test_constraints_pin_every_requirement_within_its_bounds():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    for line in "\n".join([config["options"]["install_requires"], *extras.values()]).split("\n"):
        if line and not line.startswith("raco_optim["):
            requirement = Requirement(line)
            assert pins[requirement.name] in requirement.specifier, line


# -- Workflows ------------------------------------------------------------------------------------

WORKFLOWS = sorted((ROOT / ".github/workflows").iterdir())


def jobs_of(workflow):
    """Its jobs, by name."""
    found: dict[str, dict[str, Any]] = yaml.safe_load(workflow.read_text())["jobs"]
    return found


def commands_of(workflow):
    return [
        step["run"] for job in jobs_of(workflow).values() for step in job["steps"] if "run" in step
    ]


def test_workflows_run_on_the_pythons_of_the_classifiers(metadata):
    named = set()
    for job in jobs_of(ROOT / ".github/workflows/ci.yml").values():
        named |= set(job.get("strategy", {}).get("matrix", {}).get("python", []))
        named |= {step.get("with", {}).get("python-version") for step in job["steps"]}
    versions = {str(x) for x in named if x and "$" not in str(x)}
    classifiers = " ".join(metadata.get_all("Classifier", []))
    assert versions == set(re.findall(r":: (3\.\d+)", classifiers))
    assert min(versions, key=lambda x: int(x[2:])) == metadata["Requires-Python"].strip(">=")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_is_here(workflow):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.M))
    lines = [line for command in commands_of(workflow) for line in command.splitlines()]
    lines += (ROOT / ".ci/run").read_text().splitlines() if ".ci/run" in lines else []
    assert os.access(ROOT / ".ci/run", os.X_OK)
    for line in lines:
        words = line.split()
        if words[:1] == ["make"]:
            assert set(words[1:]) <= targets, line
        for word in words:
            assert not word.startswith("tests/") or (ROOT / word).is_file(), line


def test_publishing_checks_the_tag_and_both_distributions(metadata):
    publish = ROOT / ".github/workflows/publish.yml"
    jobs, commands = jobs_of(publish), commands_of(publish)
    # YAML takes the key `on` for a truth value.
    assert yaml.safe_load(publish.read_text())[True] == {"push": {"tags": ["v*"]}}
    assert {"python -m build", "twine check --strict dist/*"} <= set(commands)
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    (compare,) = (command for command in commands if "GITHUB_REF_NAME" in command)
    for tag, code in ((f"v{metadata['Version']}", 0), ("v99.0.0", 1)):
        done = subprocess.run(
            ["bash", "-c", compare], cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": tag}
        )
        assert done.returncode == code
