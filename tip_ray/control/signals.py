"""SIGTERM and SIGINT as the errors that they mean."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tip_ray.contract.errors import RunCancelledError, RunTerminatedError


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT cancel the running task, and end it with the error that says so."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    received: list[signal.Signals] = []

    def stop(signum: signal.Signals) -> None:
        received.append(signum)
        task.cancel()

    handled = (signal.SIGTERM, signal.SIGINT)
    for signum in handled:
        loop.add_signal_handler(signum, stop, signum)
    try:
        yield
    except asyncio.CancelledError:
        if received and received[0] is signal.SIGINT:
            raise RunCancelledError("interrupted by SIGINT") from None
        if received:
            raise RunTerminatedError("terminated by SIGTERM") from None
        raise
    finally:
        for signum in handled:
            loop.remove_signal_handler(signum)
