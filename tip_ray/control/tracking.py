"""What the trackers are told, in a thread of its own: none of them can hold up or fail a run.

A value that could not be handed over is counted, and the failure is kept for whoever writes
events. A tracker that cannot be opened is given up; one that fails later is tried at every step.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tip_ray.compute.user_function import one_line
from tip_ray.contract.run_state import EvaluationResult, RunState, StepMetrics
from tip_ray.contract.spec import RunSpec
from tip_ray.control.trackers import Tracker, Values, open_tracker

WAITING = 10_000  # steps that a slow tracker may be behind
END_S = 60.0  # for the last values of a run that succeeded
END_EARLY_S = 1.0  # of one that did not: a driver that is told to go has about three
_NOT_CURVES = ("step", "time")
_log = logging.getLogger(__name__)


@dataclass
class _Followed:
    """One tracker of the spec."""

    kind: str
    open: Callable[[], Tracker]
    tracker: Tracker | None = None
    given_up: bool = False
    missed: int = 0  # values' steps since it last answered


@dataclass(frozen=True)
class TrackerEvent:
    """`tracker_failed` or `tracker_recovered`, for events/."""

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)


class Tracking:
    """All trackers of one run; no method blocks but `end`, none raises."""

    def __init__(self, spec: RunSpec, run_id: str, directory: str) -> None:
        self._followed = [
            _Followed(one.kind, partial(open_tracker, one, run_id, directory, spec))
            for one in spec.tracking
        ]
        self._work: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(WAITING)
        self._events: queue.SimpleQueue[TrackerEvent] = queue.SimpleQueue()
        # Not an executor: the interpreter waits for one at its exit, however long that hangs.
        self._thread = threading.Thread(target=self._serve, name="tracking", daemon=True)
        if self._followed:
            self._thread.start()

    def step(self, metrics: StepMetrics) -> None:
        """Hand over every number of a step."""
        numbers = metrics.model_dump(exclude=set(_NOT_CURVES))
        self._submit(_log_values, metrics.step, {name: float(n) for name, n in numbers.items()})

    def evaluation(self, result: EvaluationResult) -> None:
        """Hand over an evaluation as evaluation/<name>/<number>."""
        numbers = result.model_dump(exclude={"name", "step", "samples", "problems"})
        named = {f"evaluation/{result.name}/{key}": float(n) for key, n in numbers.items()}
        self._submit(_log_values, result.step, named)

    def rewind(self, step: int) -> None:
        """Steps after `step` are about to be made again."""
        self._submit(_rewind, step)

    def end(self, state: RunState) -> None:
        """Hand over what is left and the run's end, within END_S; what takes longer is left."""
        if not self._followed:
            return
        self._submit(_end, state)
        limit_s = END_S if state is RunState.SUCCEEDED else END_EARLY_S
        if self._put(None):
            self._thread.join(limit_s)
        if self._thread.is_alive():
            reason = f"not done within {limit_s:g} s of the run's end"
            kinds = ", ".join(one.kind for one in self._followed)
            self._say("tracker_failed", tracker=kinds, reason=reason, steps_missed=self._behind)

    def taken_events(self) -> Sequence[TrackerEvent]:
        """What happened since the last call."""
        taken = []
        while not self._events.empty():
            taken.append(self._events.get())
        return taken

    @property
    def _behind(self) -> int:
        return self._work.qsize()

    def _submit(self, action: Callable[..., None], *args: Any) -> None:
        if self._followed and not self._put(partial(action, *args)):
            reason = f"{WAITING} values behind; this one is left out"
            self._say("tracker_failed", tracker="all", reason=reason, steps_missed=1)

    def _put(self, action: Callable[[Tracker], None] | None) -> bool:
        try:
            self._work.put_nowait(action)
        except queue.Full:
            return False
        return True

    def _serve(self) -> None:
        for followed in self._followed:
            self._guard(followed, partial(_open, followed))
            followed.given_up = followed.tracker is None
        while (action := self._work.get()) is not None:
            for followed in self._followed:
                if followed.tracker is not None:
                    self._guard(followed, partial(action, followed.tracker))
                else:
                    followed.missed += 1
        for followed in self._followed:
            if followed.given_up and followed.missed:
                _log.warning("%s: %d values not handed over", followed.kind, followed.missed)

    def _guard(self, followed: _Followed, action: Callable[[], None]) -> None:
        try:
            action()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a tool may raise anything
            followed.missed += 1
            if followed.missed == 1:
                _log.warning("tracker %s failed", followed.kind, exc_info=error)
                self._say("tracker_failed", tracker=followed.kind, reason=one_line(error))
            return
        if followed.missed:
            missed, followed.missed = followed.missed, 0
            self._say("tracker_recovered", tracker=followed.kind, steps_missed=missed)

    def _say(self, kind: str, **facts: Any) -> None:
        self._events.put(TrackerEvent(kind, facts))


def _open(followed: _Followed) -> None:
    followed.tracker = followed.open()


def _log_values(step: int, values: Values, tracker: Tracker) -> None:
    tracker.log(step, values)


def _rewind(step: int, tracker: Tracker) -> None:
    tracker.rewind(step)


def _end(state: RunState, tracker: Tracker) -> None:
    tracker.end(state)
