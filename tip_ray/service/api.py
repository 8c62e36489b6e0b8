"""The status API: runs under one root over HTTP, read-only but for cancel.

    GET  /healthz /openapi.json / /page/*          open
    GET  /metrics                                  Prometheus
    GET  /api/runs /api/runs/{id} /api/runs/{id}/{spec,metrics,events,samples}
    POST /api/runs/{id}/cancel

Everything that is not open needs a bearer token: see api_guard. Errors are `{"error": line}`. Reads
block, so they run in threads and make their own bytes there.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio.to_thread
import pyarrow as pa
from fastapi import APIRouter, FastAPI, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from tip_ray import __version__
from tip_ray.contract.errors import (
    NotFoundError,
    RunDirectoryError,
    SpecError,
    TableError,
    TipRayError,
)
from tip_ray.contract.run_state import ObservedStatus, observe
from tip_ray.service.api_guard import Guard
from tip_ray.service.api_models import (
    Cancellation,
    Events,
    Failure,
    Healthy,
    Metrics,
    RunList,
    Samples,
)
from tip_ray.service.api_prometheus import Prometheus
from tip_ray.service.api_read import EVENTS_READ, Runs
from tip_ray.service.api_tables import arrow_stream, chosen, columns_of, json_bytes, thinned

PAGE = Path(__file__).parent / "page"
ARROW = "application/vnd.apache.arrow.stream"
STEP_HEADER = "X-Tip-Ray-Step"

_THREADS = 8  # more of them only fight for the interpreter
_RUNS, _POINTS, _BROKEN = 1000, 10_000, 100
_LARGEST_STEP = 2**31 - 1
_JSON_BYTES = 16 << 20  # of a table, which takes many times as much on its way to JSON
_STATUSES: dict[type[TipRayError], int] = {
    NotFoundError: 404,
    RunDirectoryError: 409,
    TableError: 409,
    SpecError: 422,
}
_FAILURES: dict[int | str, dict[str, Any]] = {
    401: {"model": Failure, "description": "No token, or a wrong one."},
    404: {"model": Failure, "description": "No such run, step or file."},
    409: {"model": Failure, "description": "A file of the run is broken; the line names it."},
    422: {"model": Failure, "description": "A parameter is wrong."},
}

Step = Annotated[int, Query(ge=0, le=_LARGEST_STEP)]


def make_app(run_root: str, token: str) -> ASGIApp:
    """The service for all runs under `run_root`, any fsspec URL.

    Raises:
        RunDirectoryError: `run_root` cannot be opened.
        SpecError: `token` cannot be sent in a header.
    """
    runs = Runs(run_root)
    prometheus = Prometheus(runs.listing)
    app = FastAPI(
        title="tip-ray status API",
        version=__version__,
        docs_url=None,  # these two load scripts from other sites
        redoc_url=None,
        lifespan=_few_threads,
        redirect_slashes=False,
    )
    closed = [Security(HTTPBearer(auto_error=False, description="The token of `tip-ray serve`."))]
    app.include_router(_open_routes())
    app.include_router(_list_routes(runs, prometheus), dependencies=closed, responses=_FAILURES)
    app.include_router(_run_routes(runs), dependencies=closed, responses=_FAILURES)
    _add_page(app)
    _add_errors(app, runs)
    return Guard(app, token, prometheus)


@asynccontextmanager
async def _few_threads(_: FastAPI) -> AsyncIterator[None]:
    anyio.to_thread.current_default_thread_limiter().total_tokens = _THREADS
    yield


def _open_routes() -> APIRouter:
    router = APIRouter()

    @router.get("/healthz", summary="Is the service up?")
    async def healthz() -> Healthy:
        return Healthy()

    return router


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))


def _list_routes(runs: Runs, prometheus: Prometheus) -> APIRouter:
    router = APIRouter()

    @router.get("/api/runs", summary="All runs", response_model=RunList)
    def list_runs(
        limit: Annotated[int, Query(ge=1, le=_RUNS)] = 200,
        offset: Annotated[int, Query(ge=0, le=_LARGEST_STEP)] = 0,
    ) -> Response:
        found, now = runs.listing(), time.time()
        shown = [observe(run, now) for run in found.runs[offset : offset + limit]]
        broken = [_relative(line, runs) for line in found.broken[:_BROKEN]]
        if len(found.broken) > _BROKEN:
            broken.append(f"and {len(found.broken) - _BROKEN} more")
        return _json(RunList.model_construct(runs=shown, broken=broken, total=len(found.runs)))

    @router.get(
        "/metrics",
        summary="Runs and requests, for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    def prometheus_metrics() -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(prometheus.text(), media_type=kind)

    return router


def _run_routes(runs: Runs) -> APIRouter:
    router = APIRouter(prefix="/api/runs/{run_id}")

    @router.get("", summary="What a run is doing", response_model=ObservedStatus)
    def status(run_id: str) -> Response:
        return _json(observe(runs.status(run_id), time.time()))

    @router.get("/spec", summary="The resolved spec, no secrets", response_model=dict[str, Any])
    def spec(run_id: str) -> Response:
        return _json_of(runs.spec(run_id))

    @router.post(
        "/cancel",
        summary="Ask the run to stop after its step and a checkpoint",
        response_model=Cancellation,
        status_code=202,
        responses={200: {"model": Cancellation, "description": "It has ended already."}},
    )
    def cancel(run_id: str) -> Response:
        state = runs.cancel(run_id).state
        asked = Cancellation(run_id=run_id, state=state, cancelling=not state.ended)
        return _json(asked, 200 if state.ended else 202)

    _add_tables(router, runs)
    return router


def _add_tables(router: APIRouter, runs: Runs) -> None:
    arrow: dict[int | str, dict[str, Any]] = {200: {"content": {ARROW: {}}}}

    @router.get("/metrics", summary="A row a step", response_model=Metrics, responses=arrow)
    def metrics(
        run_id: str,
        request: Request,
        after_step: Step = 0,
        columns: Annotated[str | None, Query(description="Names, comma-separated.")] = None,
        max_points: Annotated[
            int | None,
            Query(ge=1, le=_POINTS, description="Thinned evenly; JSON has at most 10,000."),
        ] = None,
    ) -> Response:
        table = chosen(runs.metrics(run_id), after_step, columns)
        if _wants_arrow(request):
            table = table if max_points is None else thinned(table, max_points)
            return Response(arrow_stream(table), media_type=ARROW)
        return _json_of({"columns": columns_of(thinned(table, max_points or _POINTS))})

    @router.get("/events", summary="Starts, faults, evaluations", response_model=Events)
    def events(
        run_id: str,
        after: Annotated[float, Query(allow_inf_nan=False, description="Seconds, 1970.")] = 0.0,
        limit: Annotated[int, Query(ge=1, le=EVENTS_READ)] = EVENTS_READ,
    ) -> Response:
        later = [event for event in runs.events(run_id) if event["time"] > after]
        return _json_of({"events": later[-limit:]})

    @router.get("/samples", summary="Real rollouts", response_model=Samples, responses=arrow)
    def samples(run_id: str, request: Request, step: Step | None = None) -> Response:
        steps = runs.sample_steps(run_id)
        if step is None and steps:
            step = steps[-1]
        if _wants_arrow(request):
            if step is None:
                raise NotFoundError(f"{run_id}: no samples yet")
            content = arrow_stream(runs.samples(run_id, step))
            return Response(content, media_type=ARROW, headers={STEP_HEADER: str(step)})
        rows = [] if step is None else _rows(runs.samples(run_id, step))
        return _json_of({"step": step, "steps": steps, "samples": rows})


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    if table.nbytes > _JSON_BYTES:
        found = f"samples: found {table.nbytes:,} bytes, expected at most {_JSON_BYTES:,} as JSON"
        raise HTTPException(413, f"{found}; ask for Arrow (Accept: {ARROW})")
    return list(table.to_pylist())


def _add_errors(app: FastAPI, runs: Runs) -> None:
    async def ours(_: Request, error: Exception) -> Response:
        kinds = [status for kind, status in _STATUSES.items() if isinstance(error, kind)]
        return _failure(_relative(str(error), runs), kinds[0] if kinds else 409)

    async def no_route(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _failure(f"{error.detail}; see /openapi.json", error.status_code, error.headers)

    async def parameters(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        problem = error.errors()[0]
        where, found = ".".join(map(str, problem["loc"][1:])), str(problem.get("input"))[:60]
        return _failure(f"{where}: found {found!r}, {problem['msg']}; see /openapi.json", 422)

    async def unforeseen(_: Request, __: Exception) -> Response:
        return _failure("the service failed; its standard error says why", 500)

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        TipRayError: ours,
        HTTPException: no_route,
        RequestValidationError: parameters,
        Exception: unforeseen,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _failure(line: str, status: int, headers: Any = None) -> Response:
    text = " ".join(line.encode(errors="replace").decode().split())
    return JSONResponse({"error": text}, status, headers)


def _relative(line: str, runs: Runs) -> str:
    """Without the root: what lies above it is nobody's business."""
    for root in (runs.storage.url, runs.storage.root):
        if root != "/":
            line = line.replace(f"{root}/", "")
    return line


def _wants_arrow(request: Request) -> bool:
    return ARROW in request.headers.get("accept", "")


def _json(model: BaseModel, status: int = 200) -> Response:
    return Response(model.model_dump_json(), status, media_type="application/json")


def _json_of(value: Any) -> Response:
    return Response(json_bytes(value), media_type="application/json")
