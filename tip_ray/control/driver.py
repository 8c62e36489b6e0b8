"""One run's lifetime in this process: check, place, start, run, finish."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from tip_ray.contract.errors import (
    LeaseLostError,
    RunCancelledError,
    RunDirectoryError,
    RunFailedError,
    RunTerminatedError,
    TipRayError,
)
from tip_ray.contract.run_state import HEARTBEAT_S, RunState, RunStatus
from tip_ray.contract.spec import RunSpec
from tip_ray.control.crew import Stages, close_stages, make_stages, start_stages
from tip_ray.control.journal import Journal
from tip_ray.control.lease import begin, take_over
from tip_ray.control.placement import demand, total_cpus
from tip_ray.control.preflight import Preflight, ready_to_start
from tip_ray.control.progress import Progress
from tip_ray.control.run_directory import RunDirectory, check_run_id, new_run_id
from tip_ray.control.signals import stopped_by_signals
from tip_ray.control.tracking import Tracking
from tip_ray.control.train import train
from tip_ray.runtime.cluster import connected, refuse_what_never_fits, release, reserve
from tip_ray.runtime.tasks import beside

_log = logging.getLogger(__name__)
Finish = Callable[[RunDirectory], None]


def run(
    spec: RunSpec,
    run_id: str | None = None,
    *,
    ray_address: str | None = None,
    progress: Progress,
    finish: Finish,
) -> RunStatus:
    """The whole run, with this process as its driver.

    A run id that exists is gone on with, from its newest good checkpoint; one that has succeeded
    is left as it is.

    Args:
        run_id: a new one is made up if it is None.
        ray_address: a cluster to run on; None starts a private one on this machine.
        finish: called when the run directory is complete, e.g. to write the report.

    Raises:
        UserError: refused before anything was started (exit code 2).
        RunFailedError, RunCancelledError, RunTerminatedError: how the run ended otherwise.
    """
    run_id = check_run_id(run_id or new_run_id(spec.name))
    lease = take_over(spec, run_id)
    if lease is not None and lease.status.state is RunState.SUCCEEDED:
        progress.message(f"{run_id} has succeeded before; nothing to do")
        return lease.status
    checked = ready_to_start(spec)
    lease = lease or begin(spec, run_id)
    lease.claim(spec)
    directory = lease.directory
    for line in checked.first_prompt:
        progress.message(line)
    journal = Journal(
        directory,
        lease.status.model_copy(update={"prompts_skipped": checked.source.skipped}),
        progress,
        checked.tokenizer,
        spec.evaluation[0].name if spec.evaluation else None,
        Tracking(spec, run_id, directory.url),
    )
    cluster = _entered_beating(
        journal, connected(ray_address, num_cpus=total_cpus(spec), namespace=run_id)
    )
    # The inner one writes the last word before the cluster goes, which may take seconds.
    with _logging_to(directory), _ends_well(journal), cluster, _ends_well(journal):
        asyncio.run(_drive(spec, checked, journal))
        journal.end(RunState.SUCCEEDED)
    finish(directory)
    return journal.status


async def _drive(spec: RunSpec, checked: Preflight, journal: Journal) -> None:
    """Place, start, run and export, on a connected cluster; nothing is left running."""
    with stopped_by_signals():
        await journal.state(RunState.STARTING, waiting_for="room on the cluster")
        await beside(journal.heartbeat(), _place_and_train(spec, checked, journal))


async def _place_and_train(spec: RunSpec, checked: Preflight, journal: Journal) -> None:
    bundles = demand(spec)
    refuse_what_never_fits(bundles)
    groups = await reserve(bundles, timeout_s=spec.faults.placement_timeout_s)
    stages = make_stages(spec, checked.facts, groups, journal.event)
    try:
        await _start_and_train(spec, checked, journal, stages)
    finally:
        close_stages(stages)
        release(groups)


async def _start_and_train(
    spec: RunSpec, checked: Preflight, journal: Journal, stages: Stages
) -> None:
    journal.waiting_for("replicas that load their models")
    await start_stages(stages)
    await journal.state(RunState.RUNNING)
    await train(spec, checked, journal, stages)
    await asyncio.to_thread(journal.directory.check_lease)  # rank 0 writes, and does not ask
    url = f"{journal.directory.url}/export"
    await stages.learner.call_same("export", url, checked.facts.student_path)


@contextmanager
def _entered_beating(journal: Journal, context: AbstractContextManager[None]) -> Iterator[None]:
    """`context`, with signs of life while it is entered: Ray's first start can take a minute, and
    a second driver takes a run over whose heart stands still."""
    entered = threading.Event()

    def beat() -> None:
        while not entered.wait(HEARTBEAT_S):
            journal.beat()

    with ExitStack() as stack:
        heart = threading.Thread(target=beat, name="heartbeat")
        heart.start()
        try:
            stack.enter_context(context)
        finally:
            entered.set()
            heart.join()
        yield


@contextmanager
def _ends_well(journal: Journal) -> Iterator[None]:
    """Whatever ends the run, status.json says what and why."""
    try:
        with _early_signals():
            yield
    except LeaseLostError:
        raise  # the other driver writes now
    except RunDirectoryError as error:  # not the user's error any more: things were started
        failure = RunFailedError(str(error))
        journal.end(RunState.FAILED, str(failure))
        raise failure from error
    except RunCancelledError as error:
        journal.end(RunState.CANCELLED, str(error), exit_code=error.exit_code)
        raise
    except TipRayError as error:
        journal.end(RunState.FAILED, str(error), exit_code=error.exit_code)
        raise
    except BaseException as error:
        _log.exception("the driver failed")
        journal.end(RunState.FAILED, f"{type(error).__name__}: {error}", exit_code=1)
        raise


@contextmanager
def _early_signals() -> Iterator[None]:
    """Signals outside of the loop, whose handlers are not set yet or not any more."""
    try:
        yield
    except KeyboardInterrupt:
        raise RunCancelledError("interrupted by SIGINT") from None
    except SystemExit as error:  # what Ray's own handler makes of SIGTERM
        if error.code != signal.SIGTERM:
            raise
        raise RunTerminatedError("terminated by SIGTERM") from None


@contextmanager
def _logging_to(directory: RunDirectory) -> Iterator[None]:
    """What the package logs goes to logs/driver.log as well."""
    handler: Any = directory.log_handler()
    logger = logging.getLogger("tip_ray")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.flush()
