"""Coroutines that are timed and cancelled."""

from __future__ import annotations

import asyncio

import pytest

from tip_ray.runtime.tasks import together, value_of, within


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


@pytest.mark.parametrize("ticks", range(6))
def test_a_cancellation_counts_even_as_one_of_several_fails(ticks: int) -> None:
    async def both_at_once() -> None:
        loop = asyncio.get_running_loop()
        failing, waiting = loop.create_future(), loop.create_future()
        work = together(value_of(failing), value_of(waiting))
        task = asyncio.create_task(within(60, work))
        await asyncio.sleep(0.01)
        failing.set_exception(ValueError("one of several"))
        for _ in range(ticks):
            await asyncio.sleep(0)
        if cancelled := not task.done():
            task.cancel()
        with pytest.raises(asyncio.CancelledError if cancelled else ValueError):
            await task
        assert waiting.cancelled()

    asyncio.run(both_at_once())


def test_the_first_error_ends_the_others() -> None:
    async def fails() -> None:
        raise ValueError("first")

    async def several() -> None:
        waiting = asyncio.create_task(asyncio.sleep(60))
        with pytest.raises(ValueError, match="first"):
            await together(value_of(waiting), fails())
        assert waiting.cancelled()
        assert await together(asyncio.sleep(0, 1), asyncio.sleep(0, 2)) == [1, 2]
        assert await together() == []

    asyncio.run(several())
