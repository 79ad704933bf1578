"""The README's diff: both sides of it run, and train."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.tiny_language_models import tiny_model, tiny_pairs, tiny_tokenizer

README = Path(__file__).parent.parent / "README.md"


def sides_of_the_diff() -> dict[str, str]:
    blocks = re.findall(r"^```diff\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    [diff] = [block for block in blocks if "DPOTrainer" in block]
    lines = diff.splitlines()
    return {
        "TRL": "\n".join(line[1:] for line in lines if not line.startswith("+")),
        "RACO": "\n".join(line[1:] for line in lines if not line.startswith("-")),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")  # of TRL: dispatch, names of adapters
@pytest.mark.parametrize("side", ["TRL", "RACO"])
def test_script_trains(side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    model = tiny_model()
    script = {
        "model": model,
        "tokenizer": tiny_tokenizer(),
        "lora": LoraConfig(r=2, target_modules="all-linear"),
        "pairs": Dataset.from_list(tiny_pairs(8)),
    }
    # The default is bfloat16, which TRL takes on a CPU only when told that it is one.
    source = sides_of_the_diff()[side].replace("num_train_epochs=1", "max_steps=2, use_cpu=True")
    exec(compile(source, str(README), "exec"), script)
    adapters = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert adapters and all(torch.any(p != 0) for p in adapters)


def test_diff_changes_the_import_and_one_line() -> None:
    trl, raco = (side.splitlines() for side in sides_of_the_diff().values())
    imports = [line for line in raco if line.startswith("from raco_optim.integrations.trl import")]
    assert [line for line in trl if line not in raco] == ["from trl import DPOConfig, DPOTrainer"]
    added = [line for line in raco if line not in trl and line not in imports]
    assert added == ['    weights={"helpful": 0.7, "harmless": 0.3},']
