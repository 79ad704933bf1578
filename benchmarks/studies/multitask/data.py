"""Three sets with several tasks each, from packages of the Python package index.

- ``digits`` (scikit-learn, BSD; the digits are UCI's, CC BY 4.0): two handwritten digits overlaid
  on a larger canvas, as MultiMNIST does it. Tasks: which digit is at the top left, which at the
  bottom right.
- ``health`` (statsmodels, BSD; the data are in the public domain): a person and a year of the RAND
  Health Insurance Experiment. Tasks: visits to a doctor, money for drugs, any psychotherapy, any
  stay in hospital.
- ``papers`` (aclsum, MIT): a sentence of a paper, as a hashed bag of words. Tasks: did a human mark
  it as stating the challenge, the approach, the outcome.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
import re
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["classes", "value", "yes or no"]
TEST_SEED = 1_000_003  # draws the test sets, which all seeds share


@dataclass(frozen=True)
class Task:
    """What one head predicts.

    Attributes:
        name: For tables.
        kind: Classes (cross-entropy, accuracy), a standardised value (squared error, R^2), or yes
            or no (logistic loss, area under the ROC curve).
        outputs: Width of the head.
    """

    name: str
    kind: Kind
    outputs: int = 1


@dataclass(frozen=True)
class Split:
    """Examples: inputs ``[n, d]``, a target ``[n]`` per task, and the sources they came from."""

    inputs: Tensor
    targets: tuple[Tensor, ...]
    sources: tuple[frozenset[Hashable], ...]


@dataclass(frozen=True)
class Data:
    """A set: its tasks and its splits."""

    tasks: tuple[Task, ...]
    train: Split
    val: Split
    test: Split


@dataclass(frozen=True)
class Sizes:
    """Upper bounds of the numbers of examples."""

    train: int = 4000
    val: int = 2000
    test: int = 4000


def digits(seed: int, sizes: Sizes) -> Data:
    """Two digits of 8 x 8 on a canvas of 11 x 11, the second 3 pixels lower and further right."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 8, 8) / 16
    labels = torch.tensor(labels)
    parts = _parted(range(len(images)), seed, test=500, val=300)

    def split(sources: Sequence[int], count: int, generator: torch.Generator) -> Split:
        pairs = torch.randint(len(sources), (2, count), generator=generator)
        first, second = torch.tensor(sources)[pairs]
        canvas = torch.zeros(count, 11, 11)
        canvas[:, :8, :8] = images[first]
        canvas[:, 3:, 3:] = torch.maximum(canvas[:, 3:, 3:], images[second])
        both = zip(first.tolist(), second.tolist(), strict=True)
        return Split(
            canvas.flatten(1), (labels[first], labels[second]), tuple(map(frozenset, both))
        )

    tasks = (Task("top left", "classes", 10), Task("bottom right", "classes", 10))
    return _data(tasks, split, parts, seed, sizes)


# Insurance plan, person and family, health at the start. What was spent in the year is left out.
_COVARIATES = [
    *("coins", "mdeoff", "pioff", "lpi", "idp", "logc", "fmde", "tookphys", "year", "time"),
    *("black", "female", "xage", "educdec", "linc", "num", "lnum", "child", "fchild"),
    *("mhi", "disea", "physlm", "hlthg", "hlthf", "hlthp", "xghindx"),
]


def health(seed: int, sizes: Sizes) -> Data:
    """Covariates of a person in a year -> four kinds of care that were used."""
    import pandas as pd

    folder = importlib.resources.files("statsmodels") / "datasets" / "randhie" / "src"
    with importlib.resources.as_file(folder / "randhie.csv") as path:
        table = pd.read_csv(path).dropna(subset=_COVARIATES)
    sites = np.eye(6)[table["site"].to_numpy(int) - 1]
    inputs = _float32(np.concatenate([table[_COVARIATES].to_numpy(float), sites], axis=1))
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    targets = (
        *(_standardised(np.log1p(table[name].to_numpy(float))) for name in ("mdvis", "drugdol")),
        *(_float32(table[name].to_numpy(float) > 0) for name in ("mentvis", "totadm")),
    )
    persons = table["zper"].to_numpy(int)
    tasks = (
        Task("doctor", "value"),
        Task("drugs", "value"),
        Task("therapy", "yes or no"),
        Task("hospital", "yes or no"),
    )
    return _data(tasks, _rows(inputs, targets, persons.tolist()), _of(persons, seed), seed, sizes)


WORDS = 1024  # buckets of the hash
_ASPECTS = ("challenge", "approach", "outcome")


def papers(seed: int, sizes: Sizes) -> Data:
    """The words of a sentence -> what it states."""
    inputs, targets, source = _sentences()
    tasks = tuple(Task(aspect, "yes or no") for aspect in _ASPECTS)
    parts = _of(np.array(source), seed)
    return _data(tasks, _rows(inputs, targets, source), parts, seed, sizes)


@functools.cache
def _sentences() -> tuple[Tensor, tuple[Tensor, ...], list[str]]:
    """Bags of words, marks and papers of all sentences; no seed changes them."""
    from aclsum import ACLSum

    documents = [paper for split in ("train", "val", "test") for paper in ACLSum(split).documents]
    bags, marks, source = [], [], []
    for document in documents:
        highlights = [document.get_all_highlights(aspect) for aspect in _ASPECTS]
        for i, sentence in enumerate(document.get_all_sentences()):
            bags.append(bag_of_words(sentence))
            marks.append([bool(of_aspect[i]) for of_aspect in highlights])
            source.append(document.id)
    return torch.stack(bags), tuple(_float32(np.array(marks)).T.contiguous()), source


def bag_of_words(sentence: str) -> Tensor:
    """Counts of hashed lower-case words, scaled to unit length."""
    bag = torch.zeros(WORDS)
    for word in re.findall(r"[a-z]+|\d|[^\sa-z\d]", sentence.lower()):
        bag[zlib.crc32(word.encode()) % WORDS] += 1
    return bag / bag.norm().clamp(min=1)


SETS: dict[str, Callable[[int, Sizes], Data]] = {
    "digits": digits,
    "health": health,
    "papers": papers,
}


def constant_losses(data: Data) -> list[float]:
    """Test loss of each task for the best constant prediction that the training set tells."""
    found = []
    for task, known, asked in zip(data.tasks, data.train.targets, data.test.targets, strict=True):
        if task.kind == "classes":
            shares = torch.bincount(known, minlength=task.outputs).double() / len(known)
            found.append(float(-shares[asked].log().mean()))
        elif task.kind == "value":
            found.append(float((asked.double() - known.double().mean()).square().mean()))
        else:
            share, asked_share = float(known.mean()), float(asked.mean())
            found.append(-(asked_share * math.log(share) + (1 - asked_share) * math.log(1 - share)))
    return found


CONSTANT_SCORES: dict[Kind, float] = {"value": 0.0, "yes or no": 0.5}


def constant_scores(data: Data) -> list[float]:
    """Test score of each task for a constant prediction."""
    return [
        float((asked == known.mode().values).double().mean())
        if task.kind == "classes"
        else CONSTANT_SCORES[task.kind]
        for task, known, asked in zip(
            data.tasks, data.train.targets, data.test.targets, strict=True
        )
    ]


Parts = tuple[list, list, list]
Draw = Callable[[list, int, torch.Generator], Split]


def _parted(sources: Sequence[Hashable], seed: int, *, test: int, val: int) -> Parts:
    """Train, val and test sources; the test part is that of every seed."""
    order = np.random.default_rng(TEST_SEED).permutation(len(sources))
    left = np.random.default_rng(seed).permutation(order[test:])
    return tuple([sources[i] for i in part] for part in (left[val:], left[:val], order[:test]))


def _of(sources: np.ndarray, seed: int) -> Parts:
    """40 % of the sources for the test, 20 % for validation."""
    distinct = list(dict.fromkeys(sources.tolist()))
    return _parted(distinct, seed, test=len(distinct) * 2 // 5, val=len(distinct) // 5)


def _rows(inputs: Tensor, targets: tuple[Tensor, ...], source: Sequence[Hashable]) -> Draw:
    def split(sources: list, count: int, generator: torch.Generator) -> Split:
        inside = set(sources)
        rows = torch.tensor([i for i, name in enumerate(source) if name in inside])
        rows = rows[torch.randperm(len(rows), generator=generator)[:count]]
        return Split(
            inputs[rows],
            tuple(target[rows] for target in targets),
            tuple(frozenset([source[i]]) for i in rows.tolist()),
        )

    return split


def _data(tasks: tuple[Task, ...], split: Draw, parts: Parts, seed: int, sizes: Sizes) -> Data:
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(TEST_SEED)
    train, val, test = parts
    return Data(
        tasks,
        split(train, sizes.train, generator),
        split(val, sizes.val, generator),
        split(test, sizes.test, fixed),
    )


def _standardised(values: np.ndarray) -> Tensor:
    return _float32((values - values.mean()) / values.std())


def _float32(values: np.ndarray) -> Tensor:
    return torch.tensor(np.ascontiguousarray(values), dtype=torch.float32)
