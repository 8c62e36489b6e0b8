"""Running coroutines side by side, with one plain error instead of a group of them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def value_of(ref: Any) -> Any:
    """What a Ray reference stands for, as a coroutine that can be timed, gathered and cancelled."""
    return await ref


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


async def together(*work: Coroutine[Any, Any, Result]) -> list[Result]:
    """Results in order; at the first error the others are cancelled and that error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise first_leaf(errors) from errors
    return [task.result() for task in tasks]


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
