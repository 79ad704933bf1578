"""Runs the experiment with a progress bar; prints a table, writes a JSON file and a figure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.demo.experiment import Corpus, Settings, run_experiment
from benchmarks.demo.figure import draw
from benchmarks.demo.results import accuracy_ceiling, as_dict, table
from benchmarks.harness import Parser, make_folder, refusals_of, write_json


@refusals_of("demo")
def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and runs."""
    parser = Parser(prog="python -m benchmarks.demo", description=__doc__)
    help_ = "folder for results.json and tradeoff.png (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help=help_)
    help_ = "seeds; each costs as much time as the next (default: 0 1 2)"
    parser.add_argument("--seeds", type=int, nargs="+", default=Settings.seeds, help=help_)
    options = parser.parse_args(arguments)
    make_folder(options.output, "--output")  # now, not after a minute of work
    run(Settings(seeds=tuple(options.seeds)), options.output)


def run(settings: Settings, output: Path) -> None:
    """Runs the experiment and reports on it."""
    start = time.perf_counter()
    corpus = Corpus(settings.test_pairs)
    with tqdm(total=settings.total_steps, unit="step", desc="pretrain and align") as progress:
        runs = list(run_experiment(settings, corpus, on_step=progress.update))
    seconds = time.perf_counter() - start

    ceiling = accuracy_ceiling(corpus.held_out)
    write_json(output / "results.json", as_dict(runs, ceiling, settings, seconds))
    draw(output / "tradeoff.png", runs, ceiling)
    print(f"\n{table(runs, ceiling)}\n\n{output / 'results.json'}\n{output / 'tradeoff.png'}")


if __name__ == "__main__":
    # At this size a second thread costs more than it brings, and how many threads share a sum
    # decides its last digits: with one, the figures don't depend on the number of cores.
    torch.set_num_threads(1)
    main()
