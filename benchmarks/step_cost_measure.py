"""Time, memory and errors of the ways to fill ``.grad``, for one case and one number of losses."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import clock_of, interleaved, spread
from benchmarks.step_cost_cases import (
    APPROXIMATIONS,
    DENSE,
    FLOOR,
    GHOST,
    TORCHJD,
    WEIGHTED_SUM,
    Candidate,
    Case,
    MultiTask,
    candidate,
    draw,
    make,
)
from benchmarks.step_cost_memory import measure_memory

REFERENCES = (FLOOR, WEIGHTED_SUM)
COMPARED = (WEIGHTED_SUM, GHOST, *APPROXIMATIONS)  # with the exact step
ROUNDS, BURST = (5, 15), 0.05  # seconds of a candidate's turn
SLOWEST = 20.0  # seconds of a step, above which a candidate is left out


def measure(
    case: Case,
    m: int,
    names: Sequence[str],
    seed: int,
    seconds: float,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Measures time and memory of the candidates.

    It takes about so many seconds; with 0 every candidate runs a few times, to try the program.
    Left out, with the reason, is what does not fit into an accelerator's memory or takes too long,
    and TorchJD where it fails.
    """
    torch.set_num_threads(1)
    clock = clock_of(device)
    model, batch = make(case, m, seed, device, dtype)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-5)
    activations = measure_memory(lambda: model(*batch), lambda: None, device=device).peak
    burst = BURST if seconds else 0.0
    candidates, memory, left_out, one_round = {}, {}, {}, 0.0
    for name in names:
        if name in case.without:
            continue
        try:
            each = candidate(name, model, adamw)
            start = clock()
            each(batch)  # AdamW's state is there from here on
            if clock() - start > SLOWEST:
                left_out[name] = f"one step takes longer than {SLOWEST:.0f} s"
                continue
            start = clock()
            memory[name] = measure_memory(
                partial(each, batch), each.zero_grad, cycle=each.cycle, device=device
            )
            one_round += max(burst, (clock() - start) / (1 + each.cycle))
            candidates[name] = each
        except Exception as error:
            if name not in TORCHJD and not isinstance(error, torch.OutOfMemoryError):
                raise
            left_out[name] = f"{type(error).__name__}: {str(error)[:200]}"
            del error
            _free(model)
        adamw.zero_grad()
    rounds = min(max(ROUNDS[0], round(seconds / max(one_round, 1e-9))), ROUNDS[1])
    calls = {name: partial(each, batch) for name, each in candidates.items()}
    times = interleaved(calls, repeats=rounds, burst=burst, clock=clock)
    gradient = sum(p.nbytes for p in model.parameters())
    found: dict[str, dict[str, Any]] = {}
    for name, each in candidates.items():
        mine = means(times[name], each.cycle)
        total = memory[name].held + memory[name].peak
        found[name] = {
            "seconds": spread(mine),
            "peak_gradients": total / gradient,
            "held_gradients": memory[name].held / gradient,
            "memory_over_bound": total / (gradient * m + activations),
        }
        for reference in REFERENCES:
            if reference in times:
                ratios = zip(mine, means(times[reference], each.cycle), strict=True)
                found[name][f"over_{reference}"] = spread([a / b for a, b in ratios])
    return {
        "m": m,
        "parameters": sum(p.numel() for p in model.parameters()),
        "activations_bytes": activations,
        "candidates": found,
        "left_out": left_out,
        "errors": errors(case, m, names, seed) if case.errors and m <= 8 else {},
    }


def _free(model: MultiTask) -> None:
    """Frees what a candidate that failed left behind, TorchJD's Jacobians among it."""
    for p in model.parameters():
        vars(p).pop("jac", None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def means(values: Sequence[float], window: int) -> list[float]:
    """Returns the means of each `window` values in a row."""
    starts = range(len(values) - window + 1)
    return [statistics.fmean(values[start : start + window]) for start in starts]


def errors(case: Case, m: int, names: Sequence[str], seed: int) -> dict[str, Any]:
    """Trains along the exact step, and compares the others at the same parameters and batch.

    Returns per candidate the largest 1 - cos of the angle to the exact ``.grad`` and the largest
    error of p, over as many steps as one Gram matrix serves, the first of them left out.
    """
    model, _ = make(case, m, seed)
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-4)
    exact = candidate(DENSE, model, adamw)
    others = {name: candidate(name, model, adamw) for name in COMPARED if name in names}
    found = {name: {"one_minus_cos": 0.0, "error_of_p": 0.0} for name in others}
    for step in range(4):
        batch = draw(case, m)
        wanted = _gradient(exact, batch)
        for name, other in others.items():
            got = _gradient(other, batch)
            if step:
                cosine = torch.nn.functional.cosine_similarity(got, wanted, dim=0)
                worst = found[name]
                worst["one_minus_cos"] = max(worst["one_minus_cos"], 1 - float(cosine))
                if other.optimizer and exact.optimizer:
                    off = other.optimizer.report.p - exact.optimizer.report.p
                    worst["error_of_p"] = max(worst["error_of_p"], float(off.abs().max()))
        exact(batch)
    return found


def _gradient(each: Candidate, batch: Any) -> Tensor:  # noqa: ANN401
    each.zero_grad()
    each.fill(batch)
    zero = torch.zeros(())
    found = [(zero.expand_as(p) if p.grad is None else p.grad).flatten() for p in each.parameters]
    return torch.cat(found).double()
