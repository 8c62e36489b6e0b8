"""Peak memory of a piece of work, from the kernel's own high-water mark.

Writing 5 to /proc/self/clear_refs sets VmHWM back to the present VmRSS (Linux, proc(5)); VmHWM
after the work, less VmRSS before it, is then the most that the work held on top of what was there,
pages of allocators included. Sampling could miss a short peak, the mark cannot. Memory that a
process has freed but not given back hides later growth: measure in a fresh process.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def peak_above_bytes(work: Callable[[], T]) -> tuple[T, int]:
    """(what `work` answers, the most bytes resident during it above those before it)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_bytes("VmRSS")
    answer = work()
    return answer, _status_bytes("VmHWM") - before


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` in a process of its own, spawned, so that nothing is resident before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:  # a Pool would kill it at the end
        return pool.submit(function, *args).result()


def fits(need_bytes: int, patience_s: float = 300.0) -> bool:
    """Whether the machine can give that much without swapping; others may yet give theirs back."""
    deadline = time.monotonic() + patience_s
    while need_bytes > _meminfo_bytes("MemAvailable"):
        if need_bytes > _meminfo_bytes("MemTotal") or time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def _meminfo_bytes(field: str) -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
