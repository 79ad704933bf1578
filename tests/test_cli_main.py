"""`raco-optim` itself: help and version at once, one line for an error, a traceback for a bug."""

import ast
import configparser
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raco_optim import cli
from raco_optim.cli import COMMANDS, grid, main
from raco_optim.cli.errors import UsageError, refusals

ROOT = Path(__file__).parent.parent
HEAVY = {"accelerate", "datasets", "matplotlib", "pandas", "peft", "pyarrow", "transformers", "trl"}


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_help_imports_nothing_heavy():
    code = f"""
    import sys
    from raco_optim.cli import main

    try:
        main(["--help"])
    except SystemExit as end:
        assert end.code == 0
    loaded = {{name.partition(".")[0] for name in sys.modules}}
    assert not loaded & {HEAVY}, loaded & {HEAVY}
    """
    done = python("-c", "\n".join(line[4:] for line in code.splitlines()))
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"\n  {command}" in done.stdout


def test_module_is_the_command():
    done = python("-m", "raco_optim.cli", "report", "missing.jsonl", "--output", "/tmp/r.html")
    assert done.returncode == 2
    assert done.stderr == "raco-optim: missing.jsonl can't be read (No such file or directory).\n"
    assert done.stdout == ""


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("raco_optim ")


def test_the_command_is_installed_under_its_name():
    """`raco` is Racket's."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    scripts = settings["options.entry_points"]["console_scripts"].split("\n")
    assert [line for line in scripts if line] == ["raco-optim = raco_optim.cli:main"]


def test_benchmarks_import_what_is_public_here():
    public = {"raco_optim.cli": cli.__all__, "raco_optim.cli.grid": grid.__all__}
    private = [
        f"{path.relative_to(ROOT)}: {node.module}.{alias.name}"
        for path in ROOT.glob("benchmarks/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("raco_optim.cli")
        for alias in node.names
        if alias.name not in public.get(node.module, [])
    ]
    assert private == []


@pytest.mark.parametrize("arguments", [[], ["alight"], ["--unknown"]])
def test_unknown_command(arguments, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("raco-optim: ")
    assert printed.err.endswith("See `raco-optim --help`.\n")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("command", ["sweep", "report"])
def test_help_of_a_command(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: raco-optim {command}" in capsys.readouterr().out


def test_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("raco_optim.cli.report.main", interrupt)
    assert main(["report"]) == 130
    assert "Run the same command again" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail(arguments):
        raise ValueError("a bug")

    monkeypatch.setattr("raco_optim.cli.report.main", fail)
    with pytest.raises(ValueError, match="a bug"):
        main(["report"])


def test_missing_package_is_told_from_a_broken_one(monkeypatch, capsys):
    def imports(arguments):
        importlib.import_module(arguments[0])

    monkeypatch.setattr("raco_optim.cli.report.main", imports)
    assert main(["report", "no_such_package"]) == 2
    error = 'raco-optim: no_such_package is not installed. Run `pip install "raco_optim[align]"`.\n'
    assert capsys.readouterr().err == error
    with pytest.raises(ModuleNotFoundError):
        main(["report", "raco_optim.no_such_module"])


def test_refusal_is_one_line_and_names_the_work():
    with pytest.raises(UsageError, match=r"^reading: one two$"), refusals("reading", OSError):
        raise OSError("one\n  two")
    with pytest.raises(KeyError), refusals("reading", OSError):
        raise KeyError("a bug")
    with pytest.raises(UsageError, match=r"^known$"), refusals("reading", ValueError):
        raise UsageError("known")
