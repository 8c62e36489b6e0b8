"""Running coroutines side by side, with one plain error instead of a group of them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


async def together(*work: Coroutine[Any, Any, Result]) -> list[Result]:
    """Results in order; at the first error the others are cancelled and that error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise first_leaf(errors) from errors
    return [task.result() for task in tasks]


def first_leaf(error: BaseException) -> BaseException:
    """The first error that is not itself a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
