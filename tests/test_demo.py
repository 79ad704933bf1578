"""The parts of `make demo`, each against something that was computed another way."""

import dataclasses
import itertools
import json
import math
import random

import pytest
import torch

pytest.importorskip("aclsum", reason="the demo needs Python 3.11 and its extra")

from benchmarks.demo import __main__ as demo
from benchmarks.demo import align, data, model, results
from benchmarks.demo.experiment import Corpus, Settings, run_experiment

TINY = Settings(
    seeds=(0, 1),
    outcome_weights=(0.2, 0.8),
    pretraining_steps=2,
    alignment_steps=2,
    batch_size=4,
    test_pairs=12,
)


@pytest.fixture(scope="module")
def corpus():
    return Corpus(TINY.test_pairs)


@pytest.fixture(scope="module")
def policy(corpus):
    torch.manual_seed(0)
    return model.build_model(corpus.tokenizer.get_vocab_size())


# -- data -----------------------------------------------------------------------------------------

# Sentences of the abstract of E09-1056, the first test paper, read and counted by hand.
TERMINOLOGY = "Handling terminology is an important matter in a translation workflow ."
LEADS = (
    "Combining it with a phrasebased statistical engine leads to significant improvements ."
)


def test_labels_of_real_sentences():
    paper = data.load_papers("test")[0]
    labels = {sentence.text: sentence for sentence in data.sentences(paper)}
    assert paper.id == "E09-1056"
    assert labels[TERMINOLOGY].words == 11
    assert labels[LEADS].words == 12
