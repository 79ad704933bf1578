"""`raco-optim` itself: help and version at once, one line for an error, a traceback for a bug."""

import configparser
import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from raco_optim.cli import COMMANDS, main
from raco_optim.cli.errors import UsageError, refusals

ROOT = Path(__file__).parent.parent
HEAVY = {"accelerate", "datasets", "matplotlib", "pandas", "peft", "pyarrow", "transformers", "trl"}


def test_help_of_the_module_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "raco_optim.cli", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    loaded = {line.split("|")[-1].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "raco_optim" in loaded
    assert not loaded & HEAVY
    for command in COMMANDS:
        assert f"\n  {command}" in done.stdout


def test_module_is_the_command(monkeypatch, capsys):
    arguments = ["report", "missing.jsonl", "--output", "/tmp/r.html"]
    monkeypatch.setattr(sys, "argv", ["raco-optim", *arguments])
    # Another test may have imported it, which runpy warns of.
    monkeypatch.delitem(sys.modules, "raco_optim.cli.__main__", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("raco_optim.cli", run_name="__main__")
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == "raco-optim: missing.jsonl can't be read (No such file or directory).\n"
    assert printed.out == ""


def assert_shown(arguments, text, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(text)


def test_version(capsys):
    assert_shown(["--version"], "raco_optim ", capsys)


def test_the_command_is_installed_under_its_name():
    """`raco` is Racket's."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    scripts = settings["options.entry_points"]["console_scripts"].split("\n")
    assert [line for line in scripts if line] == ["raco-optim = raco_optim.cli:main"]


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
    assert_shown([command, "--help"], f"usage: raco-optim {command}", capsys)


def raising(error):
    def run(arguments):
        raise error

    return run


def test_interruption_says_how_to_go_on(monkeypatch, capsys):
    monkeypatch.setattr("raco_optim.cli.report.main", raising(KeyboardInterrupt()))
    assert main(["report"]) == 130
    assert "Run the same command again" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("raco_optim.cli.report.main", raising(ValueError("a bug")))
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
