"""Memory of a step, in exact bytes: what torch's allocator hands out and takes back.

On a CPU the profiler says so; CUDA's allocator counts itself. The resident size of a process tells
something else: glibc keeps freed blocks, or not, by rules that depend on what ran before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "step_cost: the step begins"


class Memory(NamedTuple):
    """Bytes of a step."""

    held: int  # what the first step left behind for the following ones
    peak: int  # the most that was there at once in a following step, above `held`


def measure_memory(
    step: Callable[[], object],
    clear: Callable[[], object],
    *,
    cycle: int = 1,
    device: str = "cpu",
) -> Memory:
    """Measures `cycle` steps after one that is not measured.

    `clear` frees what a step leaves behind only for its caller to see (``.grad``). On a GPU, what
    the step held before the call is not seen.
    """
    if device != "cpu":
        return _of_cuda(step, clear, cycle)
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
    roots = profiler.profiler.kineto_results.experimental_event_tree()
    # A block that was not allocated here does not count when it is freed here. Where an earlier
    # measurement saw its address, the profiler has a size for it: that of the block there then.
    sizes: dict[int, int] = {}
    held = now = peak = 0
    for event in sorted(_descendants(roots), key=lambda event: event.start_time_ns):
        if event.name == _MARK:
            held = peak = now
        elif event.name == "[memory]":
            block = event.extra_fields
            if block.alloc_size > 0:
                sizes[block.ptr] = block.alloc_size
                now += block.alloc_size
            else:
                now -= sizes.pop(block.ptr, 0)
            peak = max(peak, now)
    return Memory(held, peak - held)


def _of_cuda(step: Callable[[], object], clear: Callable[[], object], cycle: int) -> Memory:
    clear()
    before = torch.cuda.memory_allocated()
    step()
    clear()
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    for _ in range(cycle):
        step()
    clear()
    return Memory(held, torch.cuda.max_memory_allocated() - before - held)


def _descendants(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _descendants(event.children)
