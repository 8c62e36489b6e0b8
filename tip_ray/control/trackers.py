"""TensorBoard, Weights & Biases and MLflow behind one small door.

Each continues its own run when the same run id goes on, and is told every value's step. Keys and
addresses come from the environment, as each tool documents it: WANDB_API_KEY,
MLFLOW_TRACKING_URI ... Nothing here is imported before a spec asks for it.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from typing import Any, Protocol

from tip_ray.contract.errors import SpecError
from tip_ray.contract.run_state import RunState
from tip_ray.contract.spec import RunSpec, TrackerSpec
from tip_ray.control.spec_file import flat, redacted
from tip_ray.control.storage import Storage

Values = Mapping[str, float]
RUN_ID_TAG = "tip_ray.run_id"
# Package, and what may stand in the spec beside `kind`.
_NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "tensorboard": ("tensorboard", ("log_dir",)),
    "wandb": ("wandb", ("dir", "entity", "group", "job_type", "mode", "notes", "project", "tags")),
    "mlflow": ("mlflow", ("experiment", "tags", "tracking_uri")),
}


class Tracker(Protocol):
    """One tool's view of one run; whatever a method raises is the tool's own."""

    def log(self, step: int, values: Values) -> None: ...

    def rewind(self, step: int) -> None:
        """What came after `step` is about to be made again."""

    def end(self, state: RunState) -> None: ...


def check_trackers(spec: RunSpec) -> None:
    """Raises SpecError where a tracker's package is missing or an option is unknown or needed."""
    for index, tracker in enumerate(spec.tracking):
        field = f"tracking[{index}]"
        package, known = _NEEDS[tracker.kind]
        unknown = sorted(set(tracker.model_extra or {}) - set(known))
        if unknown:
            cure = "keys and passwords come from the environment"
            raise SpecError(f"{field}.{unknown[0]}", "an unknown key", " | ".join(known), cure)
        if importlib.util.find_spec(package) is None:
            cure = f"pip install 'tip-ray[{tracker.kind}]'"
            raise SpecError(f"{field}.kind", tracker.kind, f"the package {package} installed", cure)
        if tracker.kind == "tensorboard" and "log_dir" not in (tracker.model_extra or {}):
            _refuse_remote_event_files(field, spec.run_root)


def _refuse_remote_event_files(field: str, run_root: str) -> None:
    if not Storage(run_root).local:
        expected = f"a directory, since run_root is {run_root}"
        raise SpecError(f"{field}.log_dir", "nothing", expected, "name one that TensorBoard reads")


def open_tracker(tracker: TrackerSpec, run_id: str, directory: str, spec: RunSpec) -> Tracker:
    """The tool's run of this run id, begun or gone on with.

    Args:
        directory: the run directory's path or URL.
    """
    options = dict(tracker.model_extra or {})
    if tracker.kind == "tensorboard":
        return TensorBoard(options.get("log_dir") or f"{directory}/tensorboard")
    if tracker.kind == "wandb":
        config = redacted(spec.model_dump(mode="json"))
        return WeightsAndBiases(run_id, directory, config, options)
    return MLflow(run_id, spec, options)


class TensorBoard:
    """Event files in `log_dir`, a local directory or a URL that TensorBoard can write to."""

    def __init__(self, log_dir: str) -> None:
        self._log_dir = log_dir
        self._writer = self._open(None)

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(step + 1)

    def end(self, state: RunState) -> None:  # noqa: ARG002 - event files hold no state
        self._writer.close()

    def _open(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._log_dir, purge_step=purge_step)


class WeightsAndBiases:
    """A W&B run whose id is the run id; `step` is the axis of every curve.

    W&B's own step can only rise, and steps are made again after a fault: hence the named axis.
    """

    def __init__(
        self, run_id: str, directory: str, config: dict[str, Any], options: dict[str, Any]
    ) -> None:
        import wandb

        local = Storage(directory)
        place = {"dir": local.url} if local.local else {}
        self._run = wandb.init(
            id=run_id, name=run_id, resume="allow", config=config, **{**place, **options}
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Values) -> None:
        self._run.log({"step": step, **values})

    def rewind(self, step: int) -> None:
        """Points of steps that are made again stand beside the first ones."""

    def end(self, state: RunState) -> None:
        self._run.finish(exit_code=0 if state is RunState.SUCCEEDED else 1)


class MLflow:
    """An MLflow run found by its tag `tip_ray.run_id`, in an experiment of the spec's name."""

    def __init__(self, run_id: str, spec: RunSpec, options: dict[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(options.get("tracking_uri"))
        experiment = self._experiment(str(options.get("experiment") or spec.name))
        wanted = f"tags.`{RUN_ID_TAG}` = '{run_id}'"
        found = self._client.search_runs([experiment], wanted, max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {**options.get("tags", {}), RUN_ID_TAG: run_id}
        self._id = self._client.create_run(experiment, tags=tags, run_name=run_id).info.run_id
        for name, value in flat(redacted(spec.model_dump(mode="json")), ""):
            self._client.log_param(self._id, name, value)

    def log(self, step: int, values: Values) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics)

    def rewind(self, step: int) -> None:
        """Points of steps that are made again stand beside the first ones."""

    def end(self, state: RunState) -> None:
        ended = {RunState.SUCCEEDED: "FINISHED", RunState.CANCELLED: "KILLED"}
        self._client.set_terminated(self._id, ended.get(state, "FAILED"))

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))
