"""Commands that begin something: init, schema, validate, run."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tip_ray.commands.output import aligned, printable, write
from tip_ray.contract.errors import LeaseLostError, RunDirectoryError, SpecError, TipRayError
from tip_ray.contract.spec import RunSpec
from tip_ray.control.plan import Plan, make_plan
from tip_ray.control.plan_devices import Models, models_of
from tip_ray.control.plan_fit import check_fit
from tip_ray.control.progress import TerminalProgress, size
from tip_ray.control.run_directory import RAY_JOB_VARIABLE, RunDirectory, check_run_id, new_run_id
from tip_ray.control.run_reader import RunReader
from tip_ray.control.spec_file import Difference, differences, load_spec, parse_assignments
from tip_ray.control.templates import TEMPLATES
from tip_ray.runtime.auth import require_a_token


def init(options: argparse.Namespace) -> int:
    """Write a commented spec; never over a file that exists."""
    path = Path(options.file or f"{options.kind}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATES[options.kind])
    except FileExistsError:
        raise SpecError("FILE", f"{path} that exists", "a new file", "name another") from None
    except OSError as error:
        raise RunDirectoryError(f"{path}: cannot be written ({error.strerror})") from None
    write(f"wrote {path}")
    write(f"go on with: tip-ray validate {path}, then tip-ray run {path}")
    return 0


def schema(options: argparse.Namespace) -> int:  # noqa: ARG001
    """The spec's JSON Schema."""
    write(json.dumps(RunSpec.model_json_schema(), indent=2))
    return 0


def validate(options: argparse.Namespace) -> int:
    """Resolve, check, show what differs from the defaults and the plan."""
    spec = load_spec_of(options)
    write("differs from the defaults")
    for line in difference_lines(differences(spec)):
        write(f"  {line}")
    # Before the models are read: what does not fit need not be downloaded first.
    planned = _show_plan(spec, "plan")
    from tip_ray.control.preflight import preflight

    checked = preflight(spec)
    facts = checked.facts
    if planned.unknown:
        models = models_of(spec, facts.student_path, facts.teacher_path)
        _show_plan(spec, "plan, with the models read", models)
    write("")
    for line in checked.first_prompt:
        write(printable(line))
    write(f"\n{options.spec}: good")
    return 0


def _show_plan(spec: RunSpec, title: str, models: Models | None = None) -> Plan:
    """Write the plan, and refuse what does not fit."""
    models = models or models_of(spec)
    plan = make_plan(spec, models=models)
    write(f"\n{title}")
    for line in plan_lines(plan):
        write(f"  {line}")
    check_fit(spec, models)
    return plan


def run(options: argparse.Namespace) -> int:
    """The whole run; the run id is the first line printed."""
    given = None if options.run_id is None else check_run_id(options.run_id)
    if options.dry_run:
        return validate(options)
    spec = load_spec_of(options)
    run_id = given or new_run_id(spec.name)
    write(run_id)
    sys.stdout.flush()
    require_a_token(options.ray_address)  # before Ray is imported, which the driver does
    from tip_ray.control import driver

    progress, ending = TerminalProgress(), _Ending()
    try:
        driver.run(
            spec,
            run_id,
            ray_address=options.ray_address,
            progress=progress,
            finish=ending.write_report,
        )
    except LeaseLostError:
        ending.of_another_driver = True
        raise
    finally:
        progress.close()
        ending.tell(progress, spec, run_id)
    return 0


class _Ending:
    """What is shown when a run has ended, whichever way."""

    def __init__(self) -> None:
        self._report: str | None = None
        self._problem: str | None = None
        self._began_at = time.time()
        self.of_another_driver = False

    def write_report(self, directory: RunDirectory) -> None:
        """report.html; its failure is told but does not fail the run."""
        from tip_ray.service.client_run import DirectoryRun
        from tip_ray.service.report import write_report

        try:
            self._report = write_report([DirectoryRun(directory.url)])
        except (TipRayError, OSError) as error:
            self._problem = f"no report: {error}"

    def tell(self, progress: TerminalProgress, spec: RunSpec, run_id: str) -> None:
        """The summary, unless the run is another's, or this process never began it."""
        if self.of_another_driver:
            return
        try:
            directory = RunDirectory.open(spec.run_root, run_id)
            status = RunReader(directory.url).read_status()
        except TipRayError:
            return
        if status.updated_at < self._began_at:
            return
        if self._report is None and self._problem is None and status.step:
            self.write_report(directory)
        if self._problem:
            progress.message(self._problem)
        progress.finish(status, directory.url, self._report)


def difference_lines(found: list[Difference]) -> list[str]:
    """`field  value  (default ...)`, aligned."""
    rows = [("field", "value", "default")]
    rows += [(one.field, _show(one.value), _show(one.default)) for one in found]
    return aligned(rows)


def plan_lines(plan: Plan) -> list[str]:
    """Pools, bytes a token at each hop, and what a step moves at most."""
    pools = [("pool", "replicas", "CPUs", "GPUs")]
    pools += [(p.name, str(p.replicas), str(p.cpus), str(p.gpus)) for p in plan.pools]
    pools += [("all", "", str(plan.cpus), str(plan.gpus))]
    hops = [("hop", "bytes a response token", "all tokens kept", "a step, at most")]
    for hop in plan.hops:
        if hop.bytes_a_step is None:
            hops.append((hop.name, "known once the teacher is read", "", ""))
            continue
        shipped, unpruned = f"{hop.bytes_a_token:g}", f"{hop.bytes_a_token_unpruned:g}"
        hops.append((hop.name, shipped, unpruned, size(hop.bytes_a_step)))
    sync = "known once the student is read"
    if plan.weight_sync_bytes is not None:
        sync = f"{size(plan.weight_sync_bytes)} a step and rollout replica"
    store = "known once both models are read"
    if plan.object_store_bytes is not None:
        store = f"{size(plan.object_store_bytes)} at most, over all nodes"
    tokens = f"{plan.rollouts_a_step:,} rollouts, at most {plan.response_tokens_a_step:,} tokens"
    lines = [*aligned(pools), "", *_memory_lines(plan), *aligned(hops), ""]
    lines += [f"a step: {tokens}", f"weight sync: {sync}", f"object store: {store}"]
    if plan.seconds:
        each = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in plan.seconds.items())
        whole = "" if plan.step_seconds is None else f"; a step about {plan.step_seconds:.0f} s"
        lines.append(f"estimate on {plan.device}, all responses at their longest: {each}{whole}")
    return lines


def _memory_lines(plan: Plan) -> list[str]:
    """GB (10^9 bytes) a device by pool, and of what."""
    rows = [("pool", "GB a device", "at most", "of")]
    for pool in plan.memory:
        parts = [f"{name} {_gb(part)}" for name, part in pool.parts.items()]
        limit = _gb(pool.limit_bytes) if pool.limit_bytes else "no GPU"
        rows.append((pool.name, _gb(pool.total_bytes), limit, ", ".join(parts)))
    lines = [*aligned(rows), ""] if plan.memory else []
    for field in plan.unknown:
        cure = "known once it is read: give a local directory, or let the hub be reached"
        lines += [f"{field}: architecture not known; its memory and seconds are {cure}", ""]
    return lines


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g}"


def load_spec_of(options: argparse.Namespace) -> RunSpec:
    """SPEC with --set and --run-root laid over it."""
    overrides = parse_assignments(options.assignments)
    if options.run_root:
        overrides["run_root"] = from_here(options.run_root)
    return load_spec(options.spec, overrides)


def from_here(run_root: str) -> str:
    """A relative --run-root is meant from the working directory, except inside a Ray job."""
    if "://" in run_root or run_root.startswith("~") or RAY_JOB_VARIABLE in os.environ:
        return run_root
    return os.path.abspath(run_root)


def _show(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return printable(text if len(text) <= 60 else f"{text[:57]}...")
