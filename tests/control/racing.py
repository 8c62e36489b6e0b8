"""Two drivers that start in the same moment, as processes that load nothing heavy."""

from __future__ import annotations

import time
from typing import Any

from tip_ray.contract.errors import TipRayError
from tip_ray.control.lease import begin, take_over
from tip_ray.control.spec_file import load_spec


def race(spec_path: str, root: str, run_ids: list[str], gate: Any, lost: Any, results: Any) -> None:
    """One of the two: (run id, its own name where it won, else why it lost) of every run.

    Whoever wins keeps its heart beating until the other has lost.
    """
    spec = load_spec(spec_path, {"run_root": root})
    for number, run_id in enumerate(run_ids, start=1):
        gate.wait(60)
        try:
            held = take_over(spec, run_id) or begin(spec, run_id)
            held.claim(spec)
            deadline = time.monotonic() + 60
            while lost.value < number and time.monotonic() < deadline:
                now = time.time()
                held.directory.write_status(held.status.model_copy(update={"heartbeat_at": now}))
                time.sleep(0.005)
            results.put((run_id, held.status.driver, ""))
        except TipRayError as error:
            lost.value += 1
            results.put((run_id, "", f"{error.exit_code} {type(error).__name__}: {error}"))
