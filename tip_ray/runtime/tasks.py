"""Running coroutines side by side, with one plain error instead of a group of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

import ray

Result = TypeVar("Result")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05


async def value_of(ref: Any) -> Any:
    """What a Ray reference stands for, as a coroutine that can be timed, gathered and cancelled."""
    return await ref


async def within(limit_s: float, work: Awaitable[Result]) -> Result:
    """The result of `work`, or TimeoutError after `limit_s`.

    In the place of `asyncio.wait_for`, which in Python 3.11 forgets a cancellation that comes as
    `work` ends: what should stop would go on.
    """
    task = asyncio.ensure_future(work)
    async with asyncio.timeout(limit_s):
        await _all_done([task])
    return task.result()


async def next_ref(stream: Any) -> Any:
    """The reference of what a streaming method yields next.

    Where its process died, Ray yields one more reference in the place of an item, and then ends
    the stream as if all were well: it is told apart here, since it may stand where a table would,
    which nobody here reads.

    Raises:
        StopAsyncIteration: the method has ended.
        RayError: why the stream broke off.
    """
    ref = await anext(stream)
    if ref == stream.completed():
        await ref  # raises
    return ref


async def next_ref_afar(stream: Any) -> Any:
    """As `next_ref`, and what it stands for stays on the node that made it.

    To wait for a stream's next item, Ray fetches the item: right for a header, which is read here,
    but with a table it would bring all tables to the driver's node. A table follows its header at
    once, so that asking for it every now and then costs little.
    """
    pause_s = _FIRST_PAUSE_S
    while not ray.wait([stream], timeout=0, fetch_local=False)[0]:
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    return await next_ref(stream)


async def together(*work: Coroutine[Any, Any, Result]) -> list[Result]:
    """Results in order; at the first error the others are cancelled and that error is raised.

    Not a TaskGroup, which in Python 3.11 forgets a cancellation that comes as one of them fails.
    """
    tasks = [asyncio.ensure_future(one) for one in work]
    await _all_done(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()):
            raise error
    return [task.result() for task in tasks]


async def _all_done(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Until all have ended; at the first error, or where this one is cancelled, all are ended."""
    try:
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # also: their errors are seen


async def beside(heart: Coroutine[Any, Any, None], work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, with `heart` beating beside it: where that fails, `work` is ended."""
    beating, working = asyncio.ensure_future(heart), asyncio.ensure_future(work)
    try:
        await asyncio.wait({beating, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            beating.result()  # raises: a heart does not end by itself
        return await working
    finally:
        for task in (beating, working):
            task.cancel()
        await asyncio.gather(beating, working, return_exceptions=True)


def first_leaf(error: BaseException) -> BaseException:
    """The first error that is not itself a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
