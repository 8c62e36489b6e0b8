"""The shapes of the status API's answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from tip_ray.contract.run_state import ObservedStatus, RunState


class Failure(BaseModel):
    """Every answer that is not a good one."""

    error: str = Field(description="One line: what, found, expected, cure.")


class Healthy(BaseModel):
    status: str = "ok"


class RunList(BaseModel):
    runs: list[ObservedStatus] = Field(description="Newest first.")
    broken: list[str] = Field(description="Runs that cannot be read: one line each, named.")
    total: int = Field(description="Readable runs under the root, whatever limit and offset are.")


class Metrics(BaseModel):
    columns: dict[str, list[float | int | None]] = Field(
        description="Column by column, in order of step; null where a number is not finite."
    )


class Events(BaseModel):
    events: list[dict[str, Any]] = Field(description="Oldest first.")


class Samples(BaseModel):
    step: int | None = Field(description="Of these samples; null where the run has none yet.")
    steps: list[int] = Field(description="Steps that have samples.")
    samples: list[dict[str, Any]] = Field(description="One object a rollout.")


class Cancellation(BaseModel):
    run_id: str
    state: RunState
    cancelling: bool = Field(description="False: it has ended already.")
