"""Makes every test repeatable: fixed seeds, one thread, deterministic kernels, no network."""

import os

# Read once, by the first import of torch and of transformers.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["HF_HUB_OFFLINE"] = "1"

import random
from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

from tests.ranks import Ranks

SEED = 0

# One thread: a reduction split over as many threads as the machine has cores rounds differently
# on each machine. Deterministic mode also fills new memory with NaN, so that none is read unset.
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


class _TorchRandom:
    """Lets hypothesis seed torch before every example, as it does `random` and NumPy."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # hypothesis itself holds a weak reference only
hypothesis.register_random(_torch_random)

# A run must not fail for what the machine is doing (deadline) or for luck (derandomize). To go
# looking for luck: HYPOTHESIS_PROFILE=explore make test
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - for code under test that draws from the global state
    torch.manual_seed(SEED)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two processes of one group, for all tests."""
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """Four processes of one group, for all tests."""
    with Ranks(4) as ranks:
        yield ranks
