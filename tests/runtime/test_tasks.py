"""Coroutines that are timed and cancelled."""

from __future__ import annotations

import asyncio

import pytest

from tip_ray.runtime.tasks import value_of, within


def test_a_cancellation_counts_even_as_the_work_ends() -> None:
    async def both_at_once() -> None:
        work = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(within(60, value_of(work)))
        await asyncio.sleep(0)
        work.set_result("done")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(both_at_once())


def test_what_takes_too_long_is_cancelled() -> None:
    async def too_long() -> None:
        work = asyncio.create_task(asyncio.sleep(60))
        with pytest.raises(TimeoutError):
            await within(0.01, work)
        assert work.cancelled()

    asyncio.run(too_long())
    assert asyncio.run(within(60, asyncio.sleep(0, "in time"))) == "in time"
