"""What a user gets from `pip install .`: the package alone, on three dependencies."""

import configparser
import email.message
import email.parser
import importlib.metadata
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
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


def names_without_extras(requirements: Iterable[str]) -> set[str]:
    return {
        canonicalize_name(r.name)
        for r in map(Requirement, requirements)
        if r.marker is None or r.marker.evaluate({"extra": ""})
    }


def optional_modules() -> set[str]:
    """Top-level modules that are installed here, but not by the core requirements or theirs."""
    core: set[str] = set()
    pending = set(CORE)
    while pending:
        name = pending.pop()
        core.add(name)
        pending |= names_without_extras(importlib.metadata.requires(name) or []) - core
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not core & {canonicalize_name(owner) for owner in owners}
    } - {"raco_optim"}


def run_python(code: str, *arguments: str, path: Path) -> str:
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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, since setuptools leaves build/ and *.egg-info where it works.
    source = shutil.copytree(
        ROOT,
        folder / "source",
        ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"),
    )
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(folder), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return email.parser.BytesParser().parsebytes(wheel.read(name))


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("raco_optim/**/*.py")}
    assert files == sources | {"raco_optim/py.typed"}


def test_wheel_carries_the_licence_and_the_readme(
    wheel: zipfile.ZipFile, metadata: email.message.Message
) -> None:
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())
    assert metadata["License-Expression"] == "MIT"
    readme = metadata.get_payload(decode=True).decode()
    assert readme.strip() == (ROOT / "README.md").read_text().strip()


def test_core_requirements_are_torch_numpy_and_scipy(metadata: email.message.Message) -> None:
    assert names_without_extras(metadata.get_all("Requires-Dist")) == CORE


def test_wheel_trains_with_nothing_but_the_core_requirements(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
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


def test_import_loads_no_optional_package() -> None:
    # What torch and SciPy import of their own accord where they find it is not ours.
    code = """
    import sys, torch, numpy, scipy.optimize

    before = set(sys.modules)
    import raco_optim

    print(*set(sys.modules) - before)
    """
    loaded = {name.partition(".")[0] for name in run_python(code, path=ROOT).split()}
    assert "raco_optim" in loaded
    assert loaded & optional_modules() == set()


@pytest.mark.parametrize("package", ["trl", "datasets"])
def test_the_trainer_names_the_package_it_lacks_and_its_extra(package: str) -> None:
    code = """
    try:
        import raco_optim.integrations.trl
    except ImportError as error:
        print(error)
    """
    assert run_python(HIDE + textwrap.dedent(code), package, path=ROOT) == (
        f"raco_optim.integrations.trl needs {package}. Run: pip install "
        f'"raco_optim[align]"\n'
    )


def test_optional_packages_are_installed_here() -> None:
    # Or the two tests above would hold for no reason.
    optional = {"matplotlib", "moocore", "torchjd", "cvxpy", "tqdm", "transformers", "tokenizers"}
    assert optional <= optional_modules()


def test_constraints_pin_every_requirement_within_its_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    for line in "\n".join([config["options"]["install_requires"], *extras.values()]).split("\n"):
        if line and not line.startswith("raco_optim["):
            requirement = Requirement(line)
            assert pins[requirement.name] in requirement.specifier, line
