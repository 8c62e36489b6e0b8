"""How a run ends by a signal that comes while the cluster starts, before the loop handles any."""

from __future__ import annotations

import signal
import types
from typing import Any, cast

import pytest

from tip_ray.contract.errors import RunCancelledError, RunTerminatedError
from tip_ray.contract.run_state import RunState
from tip_ray.control.driver import _ends_well
from tip_ray.control.journal import Journal


@pytest.mark.parametrize(
    ("raised", "error", "state", "code"),
    [
        (SystemExit(signal.SIGTERM.value), RunTerminatedError, RunState.FAILED, 143),
        (KeyboardInterrupt(), RunCancelledError, RunState.CANCELLED, 130),
    ],
)
def test_an_early_signal_is_told_as_one(
    raised: BaseException, error: type[Exception], state: RunState, code: int
) -> None:
    told: list[tuple[Any, ...]] = []

    def end(state: RunState, text: str, *, exit_code: int) -> None:
        told.append((state, text, exit_code))

    journal = cast("Journal", types.SimpleNamespace(end=end))
    with pytest.raises(error) as caught, _ends_well(journal):
        raise raised
    assert caught.value.exit_code == code
    assert told == [(state, str(caught.value), code)]
