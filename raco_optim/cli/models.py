"""Models: resolved for the trainer, or loaded to answer prompts."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raco_optim.cli.environment import ask_hub
from raco_optim.cli.errors import UsageError, one_line, refusals
from raco_optim.cli.files import sha256
from raco_optim.cli.runs import RUN_FILE
from raco_optim.integrations.gguf import find_base, unpack_gguf

Turns = Sequence[dict[str, str]]  # of a conversation: role and content


def loadable_model(name: str, folder: Path) -> str:
    """Returns a hub name, or the absolute path of a folder, that ``from_pretrained`` accepts.

    A .gguf file is unpacked to `folder` once; see `unpack_gguf`.
    """
    file = Path(name)
    if file.suffix == ".gguf" and not file.is_file():
        raise UsageError(f"`--model` must be a model; got {name}, which does not exist.")
    if (file.is_absolute() or name.startswith(".")) and not file.exists():
        raise UsageError(f"`--model` must be a model; got {name}, which does not exist.")
    if file.suffix != ".gguf":
        if file.is_dir():
            return str(file.resolve())
        check_on_hub(name)
        return name
    with refusals(f"`--model` {name} can't be used"):
        unpacked = folder.resolve() / f"base_model-{sha256(file)[:12]}"
        if not unpacked.is_dir():
            unpack_gguf(file, unpacked)
    return str(unpacked)


def check_on_hub(name: str) -> None:
    """Raises `UsageError` unless the model is on the hub or in its local cache."""
    import huggingface_hub

    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            ask_hub(name, "model")
    except Exception as error:
        raise UsageError(
            f"a model must be a folder or a name on the hub; got {name}, which is neither a folder "
            f"here nor found on the hub ({one_line(error)})."
        ) from error


def no_bars() -> None:
    """Hides the progress bars of loading, saving and preparing data, not of training."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def asking_options(parser: argparse.ArgumentParser, temperature: float) -> None:
    """Adds the options of commands that let models answer."""
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, metavar="N", help="longest answer in tokens"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="0 always picks the most likely token; higher values give more variety",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")


def check_asking(options: argparse.Namespace) -> None:
    """Checks these options, and seeds the sampling."""
    if options.max_new_tokens < 1:
        raise UsageError(f"`--max_new_tokens` must be at least 1; got {options.max_new_tokens}.")
    if not 0 <= options.temperature < math.inf:
        raise UsageError(f"`--temperature` must be at least 0; got {options.temperature}.")
    if not 0 <= options.seed < 2**63:
        raise UsageError(f"`--seed` must be in [0, 2^63); got {options.seed}.")
    torch.manual_seed(options.seed)


@dataclass(frozen=True)
class Loaded:
    """A model that can answer prompts.

    Attributes:
        name: The folder, or the name on the model hub.
        run: The content of `RUN_FILE` in its folder; empty for a model of another program.
        model: The model, with its adapters.
        tokenizer: Its tokenizer.
        start: Path or name of the model that training started from; None if unknown.
    """

    name: str
    run: dict[str, Any]
    model: Any
    tokenizer: Any
    start: str | None

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        found: torch.device = self.model.device
        return found

    def encode(self, prompt: str | Turns) -> Tensor:
        """Returns the tokens ``[n]`` of a text, or of a conversation in the chat template."""
        with refusals(f"the prompt for {self.name}"):
            if isinstance(prompt, str):
                ids = self.tokenizer(prompt)["input_ids"]
            else:
                ids = self.tokenizer.apply_chat_template(
                    list(prompt), add_generation_prompt=True, return_dict=False
                )
        if not 0 < len(ids) < self.longest:
            raise UsageError(
                f"the prompt must have at least one token and fewer than {self.longest}, the "
                f"limit of {self.name}; got {len(ids)}."
            )
        return torch.tensor(ids, device=self.device)

    @property
    def longest(self) -> int:
        """The largest number of tokens of a prompt and its answer."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**31)

    def answer(
        self, prompt: Tensor, max_new_tokens: int, temperature: float, streamer: object = None
    ) -> Tensor:
        """Returns the tokens ``[n]`` of an answer, including the end token if it was generated.

        Args:
            prompt: The result of `encode`.
            max_new_tokens: Maximal length of the answer.
            temperature: 0 for the most likely tokens, otherwise the temperature of sampling.
            streamer: Receives tokens as they are generated; see `transformers.TextStreamer`.
        """
        config = self.model.generation_config
        ends = config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}
        drawn: dict[str, Any] = dict.fromkeys(("temperature", "top_p", "top_k"))
        if temperature:
            drawn = {"temperature": temperature, "top_p": 1.0, "top_k": 0}
        with torch.inference_mode(), refusals(f"{self.name} can't answer"):
            found = self.model.generate(
                input_ids=prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                max_new_tokens=min(max_new_tokens, self.longest - len(prompt)),
                do_sample=temperature > 0,
                eos_token_id=sorted(ends) or None,
                pad_token_id=self.tokenizer.pad_token_id or next(iter(sorted(ends)), 0),
                streamer=streamer,
                **drawn,
            )
        answer: Tensor = found[0, len(prompt) :]
        return answer

    def text(self, tokens: Tensor) -> str:
        """Returns the text of an answer's tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def log_probability(model: Any, prompt: Tensor, answer: Tensor) -> float:  # noqa: ANN401
    """Returns log pi(answer | prompt) of a model, from tokens ``[n]`` and ``[k]``."""
    with torch.inference_mode():
        logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.float().log_softmax(-1)
        return float(log_probs.gather(1, answer[:, None]).double().sum())


def load(name: str) -> Loaded:
    """Loads a model, or adapters with their model, and the tokenizer from a folder or the hub."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    no_bars()
    folder = Path(name)
    if folder.is_file() or ((folder.is_absolute() or name.startswith(".")) and not folder.exists()):
        raise UsageError(f"a model must be a folder or a name on the hub; got {name}.")
    if not folder.exists():
        check_on_hub(name)
    run = read_run(name)
    if run and run.get("status") != "finished":
        raise UsageError(f"{name} holds an unfinished run. Run `raco-optim align` again.")
    adapters = has_adapters(name)
    with refusals(f"loading {name}"):
        base = find_base(name) if adapters else name
        model = AutoModelForCausalLM.from_pretrained(base, dtype=_dtype(run))
        if adapters:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, name)
        own = (folder / "tokenizer_config.json").exists() or not adapters
        tokenizer = AutoTokenizer.from_pretrained(name if own else base)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    start = next(folder.glob("base_model-*"), None)
    of_run = run.get("model_path") if start is None else str(start)
    return Loaded(name, run, model, tokenizer, of_run or (base if adapters else None))


@contextlib.contextmanager
def reference_of(loaded: Loaded) -> Iterator[Any]:
    """Yields the reference model of a run, or None; adapters are off while it lasts."""
    start = loaded.start
    if has_adapters(loaded.name) and not has_adapters(start or ""):
        with loaded.model.disable_adapter():
            yield loaded.model
    elif start is not None and (Path(start).exists() or not Path(start).is_absolute()):
        yield load(start).model
    else:
        if start is not None:
            sys.stderr.write(f"{loaded.name}: no implicit reward, because {start} is missing.\n")
        yield None


def read_run(name: str) -> dict[str, Any]:
    """Returns the content of `RUN_FILE` in a model's folder; empty if there is none."""
    file = Path(name, RUN_FILE)
    with refusals(f"{file} can't be read"):
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def on_text(names: Sequence[str]) -> bool:
    """Returns whether any of the models was trained on texts instead of conversations."""
    return any(read_run(name).get("data_format") == "text" for name in names)


def _dtype(run: dict[str, Any]) -> str:
    return (run.get("settings") or {}).get("dtype") or "auto"


def has_adapters(name: str) -> bool:
    """Returns whether a folder holds adapters, as peft saves them."""
    return Path(name, "adapter_config.json").is_file()
