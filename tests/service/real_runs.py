"""Two short runs of the real pipeline on the tiny pair, made once for whoever looks at runs."""

from __future__ import annotations

from pathlib import Path

from tests.jobs.harness import Crew, quickstart
from tip_ray.control.run_reader import RunReader

STEPS = 6
WHOLE, PRUNED = "whole-half", "pruned-tenth"  # run ids
SMALL = {
    "rollout__engine": "transformers",
    "steps": STEPS,
    "prompts__prompts_per_step": 8,
    "evaluation.0.every_steps": 3,
    "evaluation.0.limit": 32,
    "samples_per_step": 3,
}


def make_real_runs(root: Path) -> dict[str, RunReader]:
    """Finished runs under `root` by run id: half of the tokens kept, and a tenth. Needs Ray."""
    crew = Crew.start(quickstart(**SMALL))
    try:
        return {
            run_id: crew.train(quickstart(**SMALL, selection__retention=kept), root, run_id)
            for run_id, kept in ((WHOLE, 0.5), (PRUNED, 0.1))
        }
    finally:
        crew.close()
