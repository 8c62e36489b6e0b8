"""The kill loop: runs of the tiny pair, and faults of all kinds at random moments.

    python -m tests.faults.chaos --minutes 30 --seed 1

After each run its audit says whether every rollout was trained exactly once. Exits with 1 if
anything was lost or doubled, a fault was not recovered from, or a run did not succeed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.jobs import START_S, Job, full, send, small_disk, unwritable
from tests.faults.nodes import SMALL_OBJECTS, Nodes

STEPS = 40
LAST_STEPS = 6  # so close to its end a run is left alone: nobody would miss what is killed
SCENE_S = 180.0  # of faults; then the run may end in peace, and another begins
RECOVERY_S = 240.0
STAGES = {
    "rollout": "RolloutActor",
    "teacher": "TeacherActor",
    "selector": "SelectorActor",
    "learner": "LearnerActor",
}
REPLICA_KINDS = [f"{what} {stage}" for what in ("kill", "stop") for stage in STAGES]
PRIVATE_KINDS = [
    *REPLICA_KINDS,
    "kill cut",
    "stop cut",
    "kill driver",
    "storage hiccup",
    "storage gone",
    "full disk",
]
VLLM = {"rollout.engine": "vllm", "teacher.engine": "vllm"}
VLLM_KINDS = [
    f"{what} {stage} (vllm)"
    for what in ("kill", "stop")
    for stage in STAGES
    if stage in ("rollout", "teacher")
]
SCENES = ["private", "nodes", "rpc", "vllm"]
RPC_FAILURES = {
    f"{service}.grpc_client.{method}": {
        "num_failures": 5,
        "req_failure_prob": 1,
        "resp_failure_prob": 1,
        "in_flight_failure_prob": 1,
    }
    for service, method in (
        ("CoreWorkerService", "PushTask"),
        ("CoreWorkerService", "ReportGeneratorItemReturns"),
        ("NodeManagerService", "RequestWorkerLease"),
    )
}


@dataclass
class Tally:
    """What became of one kind of fault."""

    times: int = 0
    recovered: int = 0
    lost: int = 0
    doubled: int = 0
    seconds: list[float] = field(default_factory=list)


class Chaos:
    """Runs until the time is over; `tally` by fault kind, `failed` runs with the reason."""

    def __init__(self, root: Path, seed: int, say: Callable[[str], None]) -> None:
        self._root, self._say = root, say
        self._draw = random.Random(seed)
        self.tally: dict[str, Tally] = defaultdict(Tally)
        self.failed: list[str] = []
        self._thrown: set[str] = set()
        self.runs = 0

    def run(self, minutes: float, names: list[str]) -> None:
        """Scenes in turn, until the time is over."""
        deadline = time.monotonic() + 60 * minutes
        scenes = [getattr(self, name) for name in names]
        while time.monotonic() < deadline:
            scenes[self.runs % len(scenes)](deadline)

    def private(self, deadline: float, kinds: list[str] | None = None, steps: int = STEPS) -> None:
        """A run with a Ray of its own: its processes and its storage."""
        kinds = kinds or PRIVATE_KINDS
        environment, inside = self._inner_faults(steps)
        with small_disk(self._root) if "full disk" in kinds else nullcontext():
            job = self._job(steps, environment)
            try:
                self._throw(job, kinds, deadline)
                self._end(job, inside)
            finally:
                self._leave(job)

    def nodes(self, deadline: float, kinds: list[str] | None = None, steps: int = STEPS) -> None:
        """A run on several nodes, which go one by one."""
        nodes = Nodes()
        job = self._job(steps, SMALL_OBJECTS, nodes.address)
        try:
            self._throw(job, kinds or ["lose node", *REPLICA_KINDS[:4]], deadline, nodes)
            self._end(job)
        finally:
            self._leave(job)
            nodes.close()

    def rpc(self, deadline: float, steps: int = STEPS // 2) -> None:  # noqa: ARG002
        """A run whose remote calls fail now and then."""
        job = self._job(steps, {"RAY_testing_rpc_failure": json.dumps(RPC_FAILURES)})
        try:
            job.start()
            self._end(job, {"rpc failures": lambda: True})
        finally:
            self._leave(job)

    def vllm(self, deadline: float, steps: int = STEPS) -> None:
        """A run whose engines are vLLM's, which take longer to come back."""
        job = self._job(steps, {}, engines=VLLM)
        try:
            self._throw(job, VLLM_KINDS, deadline)
            self._end(job)
        finally:
            self._leave(job)

    def _job(
        self,
        steps: int,
        environment: dict[str, str],
        address: str | None = None,
        engines: dict[str, str] | None = None,
    ) -> Job:
        self.runs += 1
        sizes = {"steps": steps, "learner.replicas": 2, **(engines or {})}
        sizes["seed"] = self._draw.randrange(1000)
        return Job(
            self._root, f"chaos-{self.runs}", sizes, address=address, environment=environment
        )

    def _inner_faults(self, steps: int) -> tuple[dict[str, str], dict[str, Callable[[], bool]]]:
        """Poison at two places and two updates that are not finite; what the run must say."""
        poisoned = self._draw.sample(range(2, steps), 2)
        skipped = sorted(self._draw.sample(range(2, steps), 2))
        run_id = f"chaos-{self.runs + 1}"
        places = ",".join(f"{step}:{self._draw.randrange(8)}" for step in poisoned)
        environment = {
            "TIP_TEST_POISON": places,
            "TIP_TEST_NONFINITE": ",".join(map(str, skipped)),
        }

        def reader() -> Any:
            return Job(self._root, run_id, {}).reader

        def quarantined() -> bool:
            outcomes = reader().read_audit().column("outcome").to_pylist()
            return bool(outcomes.count("quarantined") == 2 * 4)  # samples a prompt

        def counted() -> bool:
            metrics = reader().read_metrics().to_pylist()
            return [row["step"] for row in metrics if row["update_skipped"]] == skipped

        return environment, {"poisonous prompt": quarantined, "non-finite loss": counted}

    def _throw(
        self, job: Job, kinds: list[str], deadline: float, nodes: Nodes | None = None
    ) -> None:
        """Faults of random kinds at random moments, each recovered from before the next."""
        job.start()
        bag: list[str] = []
        self._thrown = thrown = set[str]()
        if not job.wait_for(lambda: job.running(step=1), START_S):
            return  # `_end` says why
        deadline = min(deadline, time.monotonic() + SCENE_S)
        while time.monotonic() < deadline:
            time.sleep(self._draw.uniform(0, 2.5))
            status = job.status()
            if status is None or status.state.ended or status.step > job.spec.steps - LAST_STEPS:
                break
            if not bag:
                bag = self._draw.sample(kinds, len(kinds))
            kind = bag.pop()
            seconds = self._inject(kind, job, status.step, status.epoch, nodes)
            if seconds is None:
                continue  # there was nothing to hit
            thrown.add(kind)
            self._count(job, kind, seconds)
            if seconds < 0:
                break

    def _count(self, job: Job, kind: str, seconds: float) -> None:
        tally = self.tally[kind]
        tally.times += 1
        if seconds >= 0:
            tally.recovered += 1
            tally.seconds.append(seconds)
        shown = f"{seconds:.1f} s" if seconds >= 0 else "NOT RECOVERED"
        self._say(f"{job.run_id}  {kind:22}{shown}")

    def _inject(
        self, kind: str, job: Job, step: int, epoch: int, nodes: Nodes | None
    ) -> float | None:
        """Seconds until it was over, negative if it never was; None: there was nothing to hit."""
        what, _, where = kind.removesuffix(" (vllm)").partition(" ")
        began, clock = time.time(), time.monotonic()

        def moved_on() -> bool:
            return job.running(step=step + 3) or job.process.poll() == 0

        if kind == "kill driver":
            job.kill()
            clock = time.monotonic()
            job.start()
            over = job.wait_for(lambda: job.running(epoch=epoch + 1), RECOVERY_S)
        elif kind == "storage hiccup":
            with unwritable(job.path):
                time.sleep(1.0)
            over = job.wait_for(moved_on, RECOVERY_S)
        elif kind in ("storage gone", "full disk"):
            with (full if kind == "full disk" else unwritable)(job.path):
                code = job.finish(RECOVERY_S)
            clock = time.monotonic()
            job.start()
            over = job.wait_for(lambda: job.running(epoch=epoch + 1), RECOVERY_S) and code == 1
        elif kind == "lose node":
            assert nodes is not None
            nodes.lose_one(self._draw)
            over = job.wait_for(moved_on, RECOVERY_S)
            nodes.add_one()
        else:
            signum = signal.SIGKILL if what == "kill" else signal.SIGSTOP
            root = job.process.pid if nodes is None else os.getpid()
            victim = send(STAGES.get(where, where), root, signum, self._draw)
            if victim is None and where == "cut":
                victim = send("IDLE", root, signum, self._draw)  # the next cut runs there
            if victim is None:
                return None

            def replaced() -> bool:
                events = job.events("replica_recovered", began)
                return any(one["pool"] == where for one in events) or job.process.poll() == 0

            over = job.wait_for(moved_on if where == "cut" else replaced, RECOVERY_S)
        return time.monotonic() - clock if over else -1.0

    def _end(self, job: Job, inside: dict[str, Callable[[], bool]] | None = None) -> None:
        """Let the run end, and hold its audit against what was asked for."""
        began = time.monotonic()
        code = job.finish(10 * RECOVERY_S) if job.process else 1
        kinds = self._thrown | set(inside or {})
        audit = job.check()
        if code or not audit.exactly_once or job.status().state != "SUCCEEDED":
            self.failed.append(f"{job.run_id}: exit code {code}, see {job.output}")
            self._say(self.failed[-1])
        for kind, good in (inside or {}).items():
            self.tally[kind].times += 1
            self.tally[kind].recovered += int(code == 0 and good())
        for kind in kinds:
            self.tally[kind].lost += len(audit.lost)
            self.tally[kind].doubled += len(audit.doubled)
        self._thrown = set()
        seconds = time.monotonic() - began
        self._say(f"{job.run_id}  exit code {code}, {audit}, {seconds:.0f} s after the last fault")

    def _leave(self, job: Job) -> None:
        if job.process is not None and job.process.poll() is None:
            job.kill()

    @property
    def good(self) -> bool:
        tallies = self.tally.values()
        return not self.failed and all(one.times == one.recovered for one in tallies)

    def table(self) -> str:
        """Fault kind, times, recovered, lost, doubled, median and worst recovery seconds."""
        head = ("fault", "times", "recovered", "lost", "doubled", "median s", "worst s")
        rows = [head]
        for kind in sorted(self.tally):
            one = self.tally[kind]
            median = f"{statistics.median(one.seconds):.1f}" if one.seconds else "-"
            worst = f"{max(one.seconds):.1f}" if one.seconds else "-"
            counts = (one.times, one.recovered, one.lost, one.doubled)
            rows.append((kind, *map(str, counts), median, worst))
        lines = [row[0].ljust(22) + "".join(cell.rjust(11) for cell in row[1:]) for row in rows]
        return "\n".join([*lines, f"{self.runs} runs, {len(self.failed)} failed"])


def _unwind(signum: int, _: Any) -> None:
    signal.signal(signum, signal.SIG_IGN)  # a second one would break off what the first undoes
    sys.exit(128 + signum)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scenes", nargs="+", choices=SCENES, default=SCENES)
    parser.add_argument("--root", type=Path, help="keep the runs here")
    options = parser.parse_args()
    # An end from outside unwinds too: jobs are stopped, a small disk is unmounted.
    signal.signal(signal.SIGTERM, _unwind)
    root = options.root or Path(tempfile.mkdtemp(prefix="tip-chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(root, options.seed, lambda line: print(line, flush=True))  # noqa: T201
    try:
        chaos.run(options.minutes, options.scenes)
    finally:
        print(chaos.table(), flush=True)  # noqa: T201
    if chaos.good and options.root is None:
        shutil.rmtree(root, ignore_errors=True)
    return 0 if chaos.good else 1


if __name__ == "__main__":
    sys.exit(main())
