"""Memory of a step, in exact bytes: what torch's CPU allocator hands out and takes back.

The resident size of a process tells something else: glibc keeps freed blocks, or not, by rules that
depend on what ran before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "step_cost: the step begins"


class Memory(NamedTuple):
    """Bytes of a step.

    Attributes:
        held: What the first step left behind for the following ones.
        peak: The most that was there at once in a following step, above `held`.
    """

    held: int
    peak: int


def measure_memory(
    step: Callable[[], object], clear: Callable[[], object], *, cycle: int = 1
) -> Memory:
    """Measures a step after one that is not measured.

    Args:
        step: What to measure.
        clear: Frees what a step leaves behind only for its caller to see (``.grad``).
        cycle: Number of steps over which the peak is taken.
    """
    # What was there before is not known to the profiler, so it would miss its release.
    clear()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
        clear()
        with record_function(_MARK):
            pass
        for _ in range(cycle):
            step()
        clear()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == _MARK)
    changes = sorted(
        ((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"),
        key=lambda change: change[0],
    )
    held = sum(nbytes for when, nbytes in changes if when < start)
    now = peak = held
    for when, nbytes in changes:
        if when >= start:
            now += nbytes
            peak = max(peak, now)
    return Memory(held, peak - held)
