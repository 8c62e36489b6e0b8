"""Runs behind a status API (`tip-ray serve`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import pyarrow as pa
import requests
from pydantic import ValidationError

from tip_ray.contract.errors import (
    NotFoundError,
    NotSupportedError,
    RunDirectoryError,
    UnreachableError,
)
from tip_ray.contract.run_state import EvaluationResult, ObservedStatus
from tip_ray.control.run_directory import is_run_id
from tip_ray.control.run_reader import newest_evaluations
from tip_ray.service.client_run import Notice
from tip_ray.service.client_wire import Wire, said

ARROW = "application/vnd.apache.arrow.stream"
_PAGE = 200  # runs a request
_GONE = 404


class HttpRun:
    """One run, as a status API tells of it; satisfies `client_run.Run`."""

    def __init__(self, wire: Wire, run_id: str) -> None:
        self.run_id = run_id
        self._wire = wire

    @property
    def url(self) -> str:
        return f"{self._wire.url}{self._path}"

    @property
    def _path(self) -> str:
        if not is_run_id(self.run_id):
            raise NotFoundError(f"no run {self.run_id!r}: that is not a run id")
        return f"/api/runs/{self.run_id}"

    def read_status(self) -> ObservedStatus:
        return _status(self._wire, self._json())

    def read_spec(self) -> dict[str, Any]:
        return self._object("/spec")

    def read_metrics(self) -> pa.Table:
        return self._table("/metrics")

    def read_events(self) -> list[dict[str, Any]]:
        return list(_item(self._wire, self._object("/events"), "events", list))

    def read_evaluations(self) -> list[EvaluationResult]:
        return newest_evaluations(self.read_events(), f"{self.url}/events")

    def sample_steps(self) -> list[int]:
        return list(_item(self._wire, self._object("/samples"), "steps", list))

    def read_samples(self, step: int | None = None) -> pa.Table:
        return self._table("/samples", None if step is None else {"step": step})

    def read_log(self) -> NoReturn:
        raise _not_supported("logs", "see `tip-ray logs` with the run's --run-root, or the Ray job")

    def cancel(self) -> bool:
        answer = self._wire.send("POST", f"{self._path}/cancel", repeat=True)
        body = _body(self._wire, self._checked(answer))
        return bool(_item(self._wire, body, "cancelling", bool))

    def _json(self, path: str = "") -> Any:
        return self._wire.json(self._checked(self._wire.get(f"{self._path}{path}")))

    def _object(self, path: str) -> dict[str, Any]:
        return _body(self._wire, self._checked(self._wire.get(f"{self._path}{path}")))

    def _table(self, path: str, params: Mapping[str, Any] | None = None) -> pa.Table:
        answer = self._wire.get(f"{self._path}{path}", params=params, accept=ARROW)
        content = self._wire.good(self._checked(answer)).content
        try:
            table = pa.ipc.open_stream(pa.BufferReader(content)).read_all()
            table.validate(full=True)
        except (pa.ArrowException, OSError):
            raise self._wire.unreachable("sends no whole Arrow stream") from None
        return table

    def _checked(self, answer: requests.Response) -> requests.Response:
        """An answer about the run itself as the errors that a directory would raise."""
        if answer.status_code == _GONE:
            raise NotFoundError(f"{self._wire.url}: {said(answer)}")
        if 400 <= answer.status_code < 500:
            raise RunDirectoryError(f"{self._wire.url}: {said(answer)}")
        return answer


class HttpRuns:
    """All runs of a status API."""

    def __init__(self, wire: Wire, notice: Notice) -> None:
        self._wire, self._notice = wire, notice

    def run(self, run_id: str) -> HttpRun:
        return HttpRun(self._wire, run_id)

    def runs(self) -> list[ObservedStatus]:
        """Newest first; those that cannot be read are told to `notice`."""
        found: dict[str, ObservedStatus] = {}
        broken: dict[str, None] = {}
        offset = 0
        while True:
            params = {"limit": _PAGE, "offset": offset}
            page = _body(self._wire, self._wire.get("/api/runs", params=params))
            statuses = [_status(self._wire, one) for one in _item(self._wire, page, "runs", list)]
            found.update((status.run_id, status) for status in statuses)
            broken.update(dict.fromkeys(map(str, page.get("broken", []))))
            offset += len(statuses)
            if not statuses or offset >= _item(self._wire, page, "total", int):
                break
        for line in broken:
            self._notice(line)
        return sorted(found.values(), key=lambda status: status.started_at, reverse=True)

    def submit(self, *_: Any) -> NoReturn:
        cure = "submit through the cluster: RunClient.cluster, or `tip-ray submit --address`"
        raise _not_supported("submit", cure)


def _not_supported(what: str, cure: str) -> NotSupportedError:
    return NotSupportedError(f"{what}: a status API reads run directories only; {cure}")


def _status(wire: Wire, body: Any) -> ObservedStatus:
    try:
        return ObservedStatus.model_validate(body)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"])) or "the answer"
        raise UnreachableError(
            f"{wire.url}: {field} is not that of a run's status; is it `tip-ray serve`, and of a "
            f"release like this one?"
        ) from None


def _body(wire: Wire, answer: requests.Response) -> dict[str, Any]:
    body = wire.json(answer)
    if not isinstance(body, dict):
        raise wire.unreachable("answers with no JSON object")
    return body


def _item(wire: Wire, body: dict[str, Any], name: str, kind: type) -> Any:
    if not isinstance(body.get(name), kind):
        raise wire.unreachable(f"answers without {name!r}")
    return body[name]
