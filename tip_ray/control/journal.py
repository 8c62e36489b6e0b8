"""The driver's account of a run: status, heartbeat, metrics, samples and events, in order.

All writes go through one thread, so they are in the order of their calls and never block the
loop. Each is tried again for a few seconds; what fails for longer surfaces at the next awaited one
and by `end`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from tip_ray.contract import tables
from tip_ray.contract.errors import LeaseLostError, RunDirectoryError, RunFailedError
from tip_ray.contract.headers import Quarantined
from tip_ray.contract.run_state import (
    HEARTBEAT_S,
    EvaluationResult,
    RunState,
    RunStatus,
    StepMetrics,
    check_transition,
)
from tip_ray.control.progress import Progress
from tip_ray.control.run_directory import RunDirectory
from tip_ray.control.run_reader import RunReader
from tip_ray.control.samples import with_text
from tip_ray.control.tracking import Tracking

PAUSES_S = (0.2, 0.5, 1.0, 2.0)  # before storage that failed is tried again
Result = TypeVar("Result")
_log = logging.getLogger(__name__)


class Journal:
    """The only writer of a run directory.

    Args:
        status: as it stands at the start; replaced, never changed in place.
        first_evaluation: name of the evaluation whose mean is the run's accuracy.
        tracking: told of every step and evaluation; its failures become events.
    """

    def __init__(
        self,
        directory: RunDirectory,
        status: RunStatus,
        progress: Progress,
        tokenizer: PreTrainedTokenizerBase,
        first_evaluation: str | None,
        tracking: Tracking | None = None,
    ) -> None:
        self.directory, self.status = directory, status
        self._progress, self._tokenizer = progress, tokenizer
        self._first_evaluation, self._tracking = first_evaluation, tracking
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._pending: list[Future[Any]] = []
        self._replicas_lost = 0
        self._unwritable = False

    async def state(
        self, state: RunState, *, error: str | None = None, waiting_for: str | None = None
    ) -> None:
        """Change the run's state, and write it down.

        Raises:
            TransitionError: the change is illegal.
        """
        self._set_state(state, error=error, waiting_for=waiting_for)
        await self._settle()

    def waiting_for(self, what: str) -> None:
        """Say what a starting run waits for. Returns at once."""
        self._change(waiting_for=what)

    def event(self, kind: str, **facts: Any) -> None:
        """Something happened: a fault, a recovery. Returns at once."""
        step = facts.pop("step", self.status.step)
        _log.info("%s %s", kind, facts)
        self._submit(self.directory.write_event, kind, step, **facts)
        if kind == "replica_lost":
            self._replicas_lost += 1
            if self.status.state is RunState.RUNNING:
                self._set_state(RunState.RECOVERING, waiting_for=f"{facts['pool']} replica")
        elif kind == "replica_recovered":
            self._replicas_lost -= 1
            self._change(recoveries=self.status.recoveries + 1)
            if self.status.state is RunState.RECOVERING and not self._replicas_lost:
                self._set_state(RunState.RUNNING)

    def quarantine(self, items: Sequence[Quarantined]) -> None:
        """Write down rollouts that no replica can process."""
        if items:
            self._submit(self.directory.quarantine, items)
            self._change(rollouts_quarantined=self.status.rollouts_quarantined + len(items))
            self._progress.message(f"quarantined {len(items)}: {items[0].reason}")

    async def step(
        self, metrics: StepMetrics, samples: Sequence[pa.Table], audit: pa.Table
    ) -> None:
        """One trained step: its audit, metrics, samples and status."""
        self._submit(self.directory.write_audit, metrics.step, audit)
        self._submit(self.directory.append_metrics, metrics)
        shown = tables.newest_attempts(tables.concat(samples, tables.SAMPLES))
        if shown.num_rows:
            text = with_text(shown, self._tokenizer)
            self._submit(self.directory.write_samples, metrics.step, text)
        status = self.status
        self._change(
            step=metrics.step,
            loss=metrics.loss,
            kept_fraction=metrics.kept_fraction,
            weight_version=metrics.step,
            learner_tokens_per_s=metrics.learner_tokens_per_s,
            tokens_generated=status.tokens_generated + metrics.tokens_generated,
            tokens_kept=status.tokens_kept + metrics.tokens_kept,
            bytes_shipped=status.bytes_shipped + metrics.bytes_cut_to_learner,
            bytes_unpruned=status.bytes_unpruned + metrics.bytes_unpruned_to_learner,
            updates_skipped=status.updates_skipped + metrics.update_skipped,
        )
        self._progress.step(metrics, status.steps, self.status.accuracy)
        if self._tracking is not None:
            self._tracking.step(metrics)
            self._note_trackers(self._tracking)
        await self._settle()

    async def evaluation(self, result: EvaluationResult) -> None:
        """One evaluation's result; the first entry's mean is the run's accuracy."""
        self._submit(self.directory.write_evaluation, result)
        if result.name == self._first_evaluation:
            changes: dict[str, Any] = {"accuracy": result.mean}
            if result.step == 0:
                changes["initial_accuracy"] = result.mean
            self._change(**changes)
        self._progress.evaluation(result)
        if self._tracking is not None:
            self._tracking.evaluation(result)
        await self._settle()

    def warn(self, kind: str, line: str) -> None:
        """An event that a person should see. Returns at once."""
        self.event(kind, reason=line)
        self._progress.message(f"warning: {line}")

    async def rewind(self, step: int) -> None:
        """Go back to the end of `step`: later metrics and samples are about to be made again."""
        if step == self.status.step == 0 and self.status.epoch == 1:
            return
        self._submit(self.directory.forget_after, step)
        if self._tracking is not None:
            self._tracking.rewind(step)
        counted = await self._run(partial(_counted, RunReader(self.directory.url)))
        self._change(step=step, weight_version=step, **counted)
        await self._settle()

    async def cancel_requested(self) -> bool:
        """Whether somebody asked for the run to stop."""
        return await self._run(self.directory.cancel_requested)

    async def heartbeat(self) -> None:
        """Say every few seconds that the driver lives; runs until it is cancelled."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self.beat()
            await self._settle()

    def beat(self) -> None:
        """One sign of life. Returns at once."""
        self._write_status()

    def end(
        self, state: RunState, error: str | None = None, *, exit_code: int | None = None
    ) -> None:
        """The last word, without a loop: waits until everything is on disk; said once only.

        Args:
            exit_code: of this process; None leaves it to `state`.

        Raises:
            RunFailedError: a write failed.
            LeaseLostError: another driver has taken over.
        """
        if self.status.state.ended:
            return
        self._set_state(state, error=error, exit_code=exit_code)
        if self._tracking is not None:
            self._tracking.end(state)
            self._note_trackers(self._tracking)
        self._writer.shutdown(wait=True)
        self._raise_failed()

    def _note_trackers(self, tracking: Tracking) -> None:
        for event in tracking.taken_events():
            if event.kind == "tracker_failed":
                self._progress.message(
                    f"warning: {event.facts['tracker']}: {event.facts['reason']}"
                )
            self.event(event.kind, **event.facts)

    def _set_state(
        self,
        state: RunState,
        *,
        error: str | None = None,
        waiting_for: str | None = None,
        exit_code: int | None = None,
    ) -> None:
        check_transition(self.status.state, state)
        self._submit(self.directory.write_event, "state", self.status.step, state=state.value)
        self._change(state=state, error=error, waiting_for=waiting_for, exit_code=exit_code)

    def _change(self, **changes: Any) -> None:
        now = time.time()
        self.status = self.status.model_copy(update={**changes, "updated_at": now})
        self._write_status()

    def _write_status(self) -> None:
        status = self.status.model_copy(update={"heartbeat_at": time.time()})
        self._submit(self.directory.write_status, status)

    def _submit(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        action = partial(write, *args, **kwargs)
        self._pending.append(self._writer.submit(self._patiently, action))

    def _patiently(self, action: Callable[[], Result]) -> Result:
        """Do it, in the writer's thread; storage that fails for a moment costs nothing."""
        for pause_s in PAUSES_S:
            try:
                return action()
            except LeaseLostError:
                raise
            except RunDirectoryError:
                if self._unwritable:
                    break
                time.sleep(pause_s)
        try:
            return action()
        except LeaseLostError:
            raise
        except RunDirectoryError as error:
            self._unwritable = True
            raise RunFailedError(
                f"{error}; once it can be written, the same --run-id goes on"
            ) from error

    async def _run(self, read: Callable[[], Result]) -> Result:
        return await _unbroken(self._writer.submit(self._patiently, read))

    async def _settle(self) -> None:
        """Wait until all writes so far are done; raise the first that failed."""
        pending = self._pending.copy()
        await asyncio.gather(*map(_unbroken, pending), return_exceptions=True)
        self._raise_failed()

    def _raise_failed(self) -> None:
        done = [future for future in self._pending if future.done()]
        self._pending = [future for future in self._pending if not future.done()]
        for future in done:
            future.result()


def _unbroken(future: Future[Result]) -> asyncio.Future[Result]:
    """Waiting for `future` may be cancelled; `future` itself, a write, may not."""
    return asyncio.shield(asyncio.wrap_future(future))


def _counted(reader: RunReader) -> dict[str, Any]:
    """What status.json counts over all steps, from the metrics that are there."""
    rows = reader.read_metrics().to_pylist()
    totals = {
        "tokens_generated": "tokens_generated",
        "tokens_kept": "tokens_kept",
        "bytes_shipped": "bytes_cut_to_learner",
        "bytes_unpruned": "bytes_unpruned_to_learner",
        "updates_skipped": "update_skipped",
        "rollouts_quarantined": "rollouts_quarantined",
    }
    last = rows[-1] if rows else {}
    latest = {name: last.get(name) for name in ("loss", "kept_fraction", "learner_tokens_per_s")}
    return {ours: sum(row[name] for row in rows) for ours, name in totals.items()} | latest
