"""Papers with human highlights -> files in the layout of HelpSteer2, for `raco-optim data`.

No published preference set comes with a package. So that the guide (docs/alignment.md) can start
with a file as people have it, this writes the sentences of the `aclsum` package (MIT) as the
records of HelpSteer2: a prompt with three answers, one a line, each with two of its attributes,
and null for the other three.

- ``helpfulness`` is 4 where a human highlighted the sentence as the paper's outcome, 0 elsewhere;
- ``verbosity`` is 0 to 4, by the number of words.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aclsum.aclsum import Document

from benchmarks.demo.data import WORDS, Sentence, load_papers, sentences
from benchmarks.harness import Parser, make_folder, refusals_of

FILES = {"train": ("train", 100), "held_out": ("test", 10)}


def untokenized(text: str) -> str:
    """The text without the spaces that the tokenizer of the corpus put around punctuation."""
    text = re.sub(r"\s+([.,;:?!)\]%])", r"\1", text)
    text = re.sub(r"([(\[])\s+", r"\1", text)
    return re.sub(r"``\s*|\s*''", '"', text)


def record(title: str, sentence: Sentence) -> dict[str, Any]:
    """A line of the file."""
    return {
        "prompt": f'In one sentence: what came out of the paper "{title}"?',
        "response": untokenized(sentence.text),
        "helpfulness": 4 * sentence.states_outcome,
        **dict.fromkeys(("correctness", "coherence", "complexity")),
        "verbosity": min(4, (sentence.words - WORDS.start) // 5),
    }


def records(papers: Iterable[Document], generator: random.Random) -> Iterator[dict[str, Any]]:
    """Three answers for each paper, at least one that states the outcome and one that doesn't.

    Papers that lack one of them are left out.
    """
    for paper in papers:
        known = [x for x in sentences(paper) if x.words in WORDS]
        drawn = []
        for wanted in (True, False, None):
            left = [x for x in known if x not in drawn and wanted in (None, x.states_outcome)]
            drawn += generator.sample(left, min(1, len(left)))
        if len(drawn) == 3:
            yield from (record(paper.title, x) for x in generator.sample(drawn, 3))


@refusals_of("answers")
def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the files and says how many records they have."""
    parser = Parser(prog="python -m benchmarks.demo.answers")
    parser.add_argument("folder", type=Path, help="for train.jsonl, held_out.jsonl, prompts.txt")
    folder = parser.parse_args(arguments).folder
    make_folder(folder, "folder")
    for name, (split, papers) in FILES.items():
        found = list(records(load_papers(split)[:papers], random.Random(0)))
        lines = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in found)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(found)} records")
    prompts = list(dict.fromkeys(x["prompt"] for x in found))
    (folder / "prompts.txt").write_text("\n".join(prompts[:3]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
