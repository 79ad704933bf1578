"""The protocol, written down before the first run, and the file of its runs.

Data: 11 targets of QM9 (energies as atomisation energies), standardised; 10,000 molecules for
testing, 2,000 for validation, 20,000 for training, fixed. Loss: mean squared error; score: mean
absolute error on the test set. Delta m is the mean relative increase of the errors over those of
single-task models in percent (lower is better); the mean rank is taken over the targets.

Runs: Adam, cosine schedule, 4,000 steps of 128 molecules; of 16 evaluations the one with the least
Delta m on the validation set counts (of a single-task model: with the least error). The first text
of this protocol said 2,500 steps and 10 evaluations; no run was made with those.

Tuning: every method has the same effort: three learning rates, 1,000 steps, one seed of its own;
the least Delta m on the validation set wins. Each radius c counts as a method of its own. Then
five seeds. The network is a check at one learning rate with two seeds.

Sparse labels (see `Run.labels`): the learning rates of the full set, five seeds.

What is asked: (1) Delta m by method. (2) How much of the gain over equal weights does the sum of
logarithms reach, which rescales and ignores conflict? (3) What does surgery add once the losses are
logarithms? (4) Does an absent loss that is left out (None) do better than one that counts as zero?
Intervals are 95 % t-intervals over seeds, of differences paired by seed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import make_folder, write_whole
from benchmarks.studies.qm9.data import QM9, TARGETS, WHEEL_SHA256, Sizes
from benchmarks.studies.qm9.methods import METHODS
from benchmarks.studies.qm9.together import train_together
from benchmarks.studies.qm9.training import Length, Run, delta_m, train
from raco_optim.cli import UsageError

SINGLE = tuple(f"single:{target}" for target in TARGETS)
CHECKED = ("equal", "log", "clip-0.4", "mgda", "imtlg", "clip-0.4-log", "imtlg-log")
SPARSE = ("equal", "clip-0.4", "cagrad-0.4", "mgda", "imtlg")
SPARSE_LOGARITHMS = ("log", "clip-0.4-log", "imtlg-log")


@dataclass(frozen=True)
class Protocol:
    """Sizes of the study; the defaults are those of the protocol."""

    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    length: Length = dataclasses.field(default_factory=Length)
    tuning_length: Length = dataclasses.field(
        default_factory=lambda: Length(steps=1_000, evaluations=5)
    )
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    check_rate: float = 3e-3
    tuning_seed: int = 100
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    check_seeds: tuple[int, ...] = (0, 1)
    methods: tuple[str, ...] = tuple(METHODS)
    targets: tuple[str, ...] = SINGLE

    def settings(self) -> dict[str, Any]:
        """What all runs of one file have in common, as JSON gives it back."""
        kept = {
            "sizes": dataclasses.asdict(self.sizes),
            "length": dataclasses.asdict(self.length),
            "tuning_length": dataclasses.asdict(self.tuning_length),
            "data": WHEEL_SHA256,
        }
        return dict(json.loads(json.dumps(kept)))


class Runs:
    """The finished runs, a line of JSON each below the settings; a study resumes from here."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.records: dict[tuple[Run, bool], dict[str, Any]] = {}
        text = path.read_text() if path.exists() else json.dumps(settings) + "\n"
        # Without the line that a killed process left; written when the first run is added.
        self._whole: str | None = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in self._whole.splitlines()]
        if not lines or lines[0] != settings:
            raise UsageError(
                f"{path} holds runs of other settings. Name another file by `--runs`, or delete it."
            )
        for line in lines[1:]:
            self.records[Run(**line["run"]), line["tuning"]] = line["record"]

    def add(self, run: Run, tuning: bool, record: dict[str, Any]) -> None:
        """Adds one run to the file."""
        if self._whole is not None:
            make_folder(self.path.parent, "--runs")
            write_whole(self.path, self._whole)
            self._whole = None
        self.records[run, tuning] = record
        line = {"run": dataclasses.asdict(run), "tuning": tuning, "record": record}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def reference(self, model: str, seeds: tuple[int, ...], rates: dict[str, float]) -> list[float]:
        """Validation errors of the single-task models, the mean over seeds, by target."""
        return [
            float(np.mean([self._of(model, s, rates, seed)["validation"][k] for seed in seeds]))
            for k, s in enumerate(SINGLE)
        ]

    def _of(self, model: str, method: str, rates: dict[str, float], seed: int) -> dict[str, Any]:
        return self.records[Run(model, method, rates[method], seed), False]


@dataclass
class Study:
    """Runs what is missing, in the order in which the results are of use."""

    protocol: Protocol
    runs: Runs
    data: QM9
    progress: Callable[[str], None] = print

    def run(self) -> None:
        """Runs the whole protocol."""
        rates = self.tune(self.protocol.targets, None)
        for run in self._seeds(self.protocol.targets, rates):
            self.do(run, None)
        reference = self.runs.reference("mlp", self.protocol.seeds, rates)
        rates |= self.tune(self.protocol.methods, reference)
        for method in self.protocol.methods:
            runs = list(self._seeds((method,), rates))
            if METHODS[method].make is not None:
                self.do_together(runs, reference)
            for run in runs:
                self.do(run, reference)
        for run in self._sparse(rates):
            self.do(run, reference)
        rate = dict.fromkeys((*SINGLE, *METHODS), self.protocol.check_rate)
        check = self.protocol.check_seeds
        for seed in check:
            for target in self.protocol.targets:
                self.do(Run("schnet", target, rate[target], seed), None)
        reference = self.runs.reference("schnet", check, rate)
        for seed in check:
            for method in CHECKED:
                self.do(Run("schnet", method, rate[method], seed), reference)

    def tune(self, methods: tuple[str, ...], reference: list[float] | None) -> dict[str, float]:
        """Returns the learning rate of each method."""
        chosen = {}
        for method in methods:
            scores = {}
            for rate in self.protocol.rates:
                run = Run("mlp", method, rate, self.protocol.tuning_seed)
                errors = self.do(run, reference, tuning=True)["validation"]
                scores[rate] = (
                    errors[SINGLE.index(method)]
                    if reference is None
                    else delta_m(errors, reference)
                )
            chosen[method] = min(scores, key=scores.__getitem__)
        return chosen

    def do(
        self, run: Run, reference: list[float] | None, *, tuning: bool = False
    ) -> dict[str, Any]:
        """Returns the record of a run, which is made where it is missing."""
        if (run, tuning) not in self.runs.records:
            length = self.protocol.tuning_length if tuning else self.protocol.length
            record = train(run, self.data, length, reference)
            self.runs.add(run, tuning, record)
            self.progress(f"{run} {'tuning ' if tuning else ''}{record['seconds']} s")
        return self.runs.records[run, tuning]

    def do_together(self, runs: list[Run], reference: list[float]) -> None:
        """Makes the missing records of runs that differ in their seed only."""
        missing = [run for run in runs if (run, False) not in self.runs.records]
        if not missing:
            return
        records = train_together(missing, self.data, self.protocol.length, reference)
        for run, record in zip(missing, records, strict=True):
            self.runs.add(run, False, record)
            self.progress(f"{run} {record['seconds']} s")

    def _seeds(self, methods: tuple[str, ...], rates: dict[str, float]) -> Iterator[Run]:
        """Yields the runs on all labels; seeds change slowest."""
        for seed in self.protocol.seeds:
            for method in methods:
                yield Run("mlp", method, rates[method], seed)

    def _sparse(self, rates: dict[str, float]) -> Iterator[Run]:
        asked = [name for name in (*SPARSE, *SPARSE_LOGARITHMS) if name in rates]
        for seed in self.protocol.seeds:
            for labels in ("source", "random"):
                for method in asked:
                    zero = method in SPARSE and METHODS[method].make is not None
                    for absent in ("none", "zero") if zero else ("none",):
                        yield Run("mlp", method, rates[method], seed, labels, absent)
