"""The section on objectives in the model card of a trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from raco_optim.integrations.trl_config import MultiObjectiveDPOConfig

_ARTICLE = """@article{{{key},
    title   = {{{{{title}}}}},
    author  = {{{authors}}},
    year    = {{20{year}}},
    journal = {{arXiv:{id}}},
}}"""


class Paper(NamedTuple):
    """The paper that introduced a method."""

    name: str
    title: str
    id: str
    authors: str

    def entry(self) -> dict[str, str]:
        """Returns the fields that TRL's model card takes."""
        year = self.id[:2]
        key = f"{self.authors.partition(',')[0].split()[0].lower()}{20}{year}{self.name.lower()}"
        citation = _ARTICLE.format(key=key, year=year, **self._asdict())
        return {"title": self.title, "id": self.id, "citation": citation}


# Method -> its paper. The weighted sum of DPO losses keeps TRL's entry, the DPO paper.
PAPERS = {
    "raco": Paper(
        "RACO",
        "Reward-free Alignment for Conflicting Objectives",
        "2602.02495",
        "Chen, Peter and Li, Xiaopeng and Chen, Xi and Lin, Tianyi",
    ),
    "cagrad": Paper(
        "CAGrad",
        "Conflict-Averse Gradient Descent for Multi-task Learning",
        "2110.14048",
        "Liu, Bo and Liu, Xingchao and Jin, Xiaojie and Stone, Peter and Liu, Qiang",
    ),
    "mgda": Paper(
        "MGDA",
        "Multi-Task Learning as Multi-Objective Optimization",
        "1810.04650",
        "Sener, Ozan and Koltun, Vladlen",
    ),
    "amopo": Paper(
        "AMoPO",
        "AMoPO: Adaptive Multi-objective Preference Optimization without Reward Models and "
        "Reference Models",
        "2506.07165",
        "Liu and others",
    ),
    "modpo": Paper(
        "MODPO",
        "Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct Preference Optimization",
        "2310.03708",
        "Zhou, Zhanhui and others",
    ),
}


def section(args: MultiObjectiveDPOConfig, history: Sequence[Mapping[str, Any]]) -> str:
    """Returns a section on method, objectives and weights, with held-out scores from `history`."""
    settings = [f"method `{args.method}`", f"loss `{' + '.join(args.loss_type)}`"]
    if args.method in ("raco", "cagrad"):
        settings.insert(1, f"radius c = {args.c:g}")
    settings.append(f"beta = {args.beta:g}")
    evaluations = [logs for logs in history if any(k.startswith("eval_loss/") for k in logs)]
    header, columns = ["objective", "weight"], []
    for logs in evaluations[:1] + evaluations[1:][-1:]:
        for score in ("loss", "accuracy"):
            header.append(f"held-out {score}, step {logs['step']}")
            columns.append((logs, f"eval_{score}/"))
    rows = [header, ["---"] * len(header)]
    for name, weight in args.objective_weights.items():
        scores = [logs.get(key + name) for logs, key in columns]
        rows.append(
            [name, f"{weight:g}", *("" if score is None else f"{score:.4f}" for score in scores)]
        )
    table = "\n".join(f"| {' | '.join(cell.replace('|', '') for cell in row)} |" for row in rows)
    return (
        f"## Objectives\n\nTrained with [raco_optim](https://arxiv.org/abs/2602.02495): "
        f"{', '.join(settings)}.\n\n{table}\n\n"
    )
