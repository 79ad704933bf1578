"""The shape of the package: who imports whom, who writes `.grad`, how long a module may be."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "raco_optim"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 300

# Module -> the modules of the package that it may import; a new one has to be entered here.
# `step` alone ties the stages together, but for two: `simplex` is the front of the solvers behind
# it, and a rule in `coefficients` starts from a solution of `simplex`. The solvers know nothing of
# each other, only when a point is optimal.
LEAVES = {"_checks", "report"}
SOLVERS = {"active_set", "pgd", "slsqp"}
STAGES = {"gradients", "gram", "simplex", "coefficients", "combine"}
MODES = {"dense", "ghost", "surrogate"}
MAY_IMPORT = {
    "_checks": set(),
    "report": {"_checks"},
    "gradients": LEAVES,
    "gram": LEAVES,
    "linear_algebra": set(),
    "optimality": {"_checks", "linear_algebra"},
    **dict.fromkeys(SOLVERS, {"_checks", "linear_algebra", "optimality"}),
    "simplex": LEAVES | SOLVERS | {"optimality"},
    "coefficients": LEAVES | {"simplex"},
    "combine": LEAVES,
    "per_example": {"gradients"},
    "graph": set(),
    "dense": {"gradients", "gram", "combine"},
    "ghost": {"gradients", "gram", "combine", "graph", "dense"},
    "surrogate": {"gradients", "gram", "combine", "processes", "replicated"},
    "schedule": set(),
    "processes": LEAVES,
    "replicated": {"_checks", "gradients", "combine", "dense", "processes"},
    "sharded": {"gradients", "combine", "dense", "processes"},
    "step": LEAVES | STAGES | MODES | {"processes", "replicated", "sharded"},
    "weights": {"_checks", "gradients", "dense"},
    "wrapper": set(),
    "optimizer": LEAVES
    | {"wrapper", "gradients", "dense", "processes", "schedule", "step", "weights"},
    "unwrap": {"optimizer", "weights"},
    "methods": LEAVES | {"simplex", "coefficients", "step", "optimizer", "weights"},
    "step_log": LEAVES,
    "step_logger": {"coefficients", "step", "step_log", "unwrap"},
    "pareto": LEAVES | {"simplex"},
    "__init__": LEAVES
    | STAGES
    | {"optimizer", "methods", "pareto", "step_log", "step_logger", "unwrap"},
}
MAY_IMPORT_SCIPY = {"linear_algebra", "active_set", "slsqp"}
# Package inside the package -> what its modules may import, beside each other, from the rest of
# it, and which other packages at import.
INNER_MAY_IMPORT = {
    "alignment": {"_checks"},
    "integrations": LEAVES
    | {"simplex", "coefficients", "per_example", "gradients", "dense", "processes", "step"}
    | {"alignment"},
    "cli": {"_checks", "pareto", "processes", "integrations", "plot"},
    "plot": LEAVES | {"pareto", "step_log"},
}
INNER_MAY_IMPORT_OPTIONAL = {"integrations": {"datasets", "trl"}}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(tree: ast.AST) -> Iterator[str]:
    """Full name of everything that is imported; `from a import b` gives a.b, `b` what it may be."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside the package are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def third_party(tree: ast.AST) -> set[str]:
    tops = {name.partition(".")[0] for name in imports(tree)}
    return tops - sys.stdlib_module_names - {"raco_optim"}


class AtImport(ast.NodeTransformer):
    """Leaves only what runs when the module is imported."""

    def visit_FunctionDef(self, node: ast.AST) -> None:
        return None

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        typing_only = ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        return node.orelse if typing_only else self.generic_visit(node)


@pytest.fixture(params=MODULES, ids=name_of)
def module(request: pytest.FixtureRequest) -> str:
    return name_of(request.param)


@pytest.fixture
def source(module: str) -> str:
    return (PACKAGE / module.replace(".", "/")).with_suffix(".py").read_text()


@pytest.fixture
def tree(source: str) -> ast.Module:
    return ast.parse(source)


def test_imports_point_one_way(module: str, tree: ast.Module) -> None:
    inner = {name.split(".")[1] for name in imports(tree) if name.startswith("raco_optim.")}
    assert "raco_optim" not in imports(tree), "only users import the package as a whole"
    package, _, within = module.partition(".")
    if within:
        assert inner <= INNER_MAY_IMPORT[package] | {package}
    else:
        assert inner <= MAY_IMPORT[module]


def test_only_the_solvers_import_scipy(module: str, tree: ast.Module) -> None:
    assert "scipy" not in third_party(tree) or module in MAY_IMPORT_SCIPY


def test_optional_packages_are_imported_at_use(module: str, tree: ast.Module) -> None:
    optional = INNER_MAY_IMPORT_OPTIONAL.get(module.split(".")[0], set())
    assert third_party(AtImport().visit(tree)) <= {"torch", "numpy", "scipy"} | optional


def test_only_combine_writes_grad(module: str, tree: ast.Module) -> None:
    written = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "grad"
        and not isinstance(node.ctx, ast.Load)
    ]
    assert not written or module == "combine"


def test_module_is_short_enough_to_read_in_one_sitting(source: str) -> None:
    length = len(source.splitlines())
    assert length <= LONGEST


def test_oracles_owe_nothing_to_what_they_judge() -> None:
    tree = ast.parse((ROOT / "tests" / "oracles.py").read_text())
    assert not any(name.split(".")[0] == "raco_optim" for name in imports(tree))


def test_benchmarks_use_what_users_can() -> None:
    private = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in ROOT.glob("benchmarks/**/*.py")
        for name in imports(ast.parse(path.read_text()))
        if name.startswith("raco_optim") and "._" in name
    }
    assert private == set()
