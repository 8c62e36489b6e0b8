"""package.module:function: code of the user's own, and its failures as one line."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from tip_ray.contract.errors import SpecError


def load_function(path: str, field: str) -> Callable[..., Any]:
    """The function that spec field `field` names as package.module:function.

    Raises:
        SpecError: the module cannot be imported, or has no such function.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # importing a user's module may raise anything
        raise SpecError(
            field,
            f"{path!r} ({one_line(error)})",
            "an importable package.module:function",
            "put its folder on PYTHONPATH",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise SpecError(field, repr(path), f"a function {name!r} in {module_name}")
    found: Callable[..., Any] = function
    return found


def call_function(function: Callable[..., Any], path: str, field: str, *arguments: Any) -> Any:
    """What `function` answers.

    Raises:
        SpecError: it raised anything.
    """
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:  # so may calling it
        raise SpecError(
            field, f"{path!r} raised {one_line(error)}", "an answer", "mend the function"
        ) from error


def one_line(error: BaseException) -> str:
    """The error's class and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
