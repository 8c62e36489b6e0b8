"""report.html: one self-contained page about one run, or several laid over each other."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from typing import Any

from plotly.offline import get_plotlyjs

from tip_ray.contract.errors import NotFoundError
from tip_ray.contract.run_state import RunStatus
from tip_ray.control.progress import percent, size
from tip_ray.control.run_directory import REPORT
from tip_ray.control.run_reader import RunReader
from tip_ray.control.storage import Storage
from tip_ray.service.client_run import Run
from tip_ray.service.report_charts import (
    RUN_COLOURS,
    Curves,
    Figure,
    own_figures,
    shared_figures,
    thinned,
)
from tip_ray.service.report_page import FRAME, POLICY, SCRIPT, STYLE
from tip_ray.service.report_tokens import chosen_rows, token_cards

# What the header says of a spec: label -> path of the field.
_FACTS = {
    "student": "student.model",
    "teacher": "teacher.model",
    "selection": "selection.rule",
    "retention": "selection.retention",
    "loss": "loss.kind",
    "support": "support.k",
    "prompts": "prompts.source",
    "prompts a step": "prompts.prompts_per_step",
    "samples a prompt": "rollout.samples_per_prompt",
    "response tokens, at most": "rollout.max_response_tokens",
    "learning rate": "learner.lr",
    "learner ranks": "learner.replicas",
    "max lag": "max_lag",
    "seed": "seed",
}


def write_report(readers: Sequence[Run], output: str | None = None) -> str:
    """Write the page about the runs of `readers`; returns where it lies.

    Args:
        output: a path or fsspec URL; by default report.html in the directory of the one run, or
            in the working directory for several, and for one whose directory is out of reach.

    Raises:
        NotFoundError: a run has no status yet.
        RunDirectoryError: a file of a run is broken, or the page cannot be written.
    """
    page = render(readers).encode()
    if output is None and len(readers) == 1 and isinstance(readers[0], RunReader):
        readers[0].storage.write(REPORT, page)
        return f"{readers[0].url}/{REPORT}"
    directory, _, name = (output or REPORT).rpartition("/")
    storage = Storage(directory or ("/" if (output or "").startswith("/") else "."))
    storage.write(name, page)
    return f"{storage.url}/{name}"


def render(readers: Sequence[Run]) -> str:
    """The page as HTML."""
    runs = [(reader, reader.read_status(), _curves(reader, i)) for i, reader in enumerate(readers)]
    figures: dict[str, Figure] = {}
    body = [f"<h1>{html.escape(_title(readers))}</h1>", '<div class="grid">']
    wide = " wide" if len(runs) == 1 else ""
    body += [_header(reader, status, curves, wide) for reader, status, curves in runs]
    body.append("</div>")
    drawn = [curves for _, _, curves in runs if curves.steps or curves.evaluations]
    if drawn:
        body += ["<h2>Curves</h2>", _charts(shared_figures(drawn), "", figures)]
    for index, (reader, _, curves) in enumerate(runs):
        suffix = f" of {html.escape(curves.label)}" if len(runs) > 1 else ""
        if curves.steps:
            body += [f"<h2>Tokens, bytes and time{suffix}</h2>"]
            body += [_charts(own_figures(curves), f"-{index}", figures)]
        body += _tokens(reader, suffix)
    body.append("<footer>Made by tip-ray. Nothing on this page is loaded from elsewhere.</footer>")
    return _page(_title(readers), "\n".join(body), figures)


def _title(readers: Sequence[Run]) -> str:
    return f"tip-ray: {readers[0].run_id if len(readers) == 1 else f'{len(readers)} runs'}"


def _curves(reader: Run, index: int) -> Curves:
    colour = RUN_COLOURS[index % len(RUN_COLOURS)]
    metrics = thinned(reader.read_metrics())
    return Curves(reader.run_id, colour, metrics, reader.read_evaluations())


def _header(reader: Run, status: RunStatus, curves: Curves, wide: str) -> str:
    """A card with the run's result and the key facts of its spec."""
    saved = "-"
    if status.bytes_unpruned:
        saved = f"{size(status.bytes_shipped)} of {size(status.bytes_unpruned)}"
    numbers = {
        "accuracy": f"{percent(status.initial_accuracy)} → {percent(status.accuracy)}",
        "kept": percent(status.kept_fraction),
        "shipped to the learner": saved,
        "steps": f"{status.step}/{status.steps}",
    }
    peaks = [peak for peak in curves.metrics["learner_peak_bytes"] if peak is not None]
    facts = _facts(reader) + ([("learner's peak memory", size(max(peaks)))] if peaks else [])
    big = "".join(
        f"<div><b>{html.escape(value)}</b><span>{name}</span></div>"
        for name, value in numbers.items()
    )
    rows = "".join(
        f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in facts
    )
    error = f'<p class="error">{html.escape(status.error)}</p>' if status.error else ""
    chip = f'<span class="chip" style="background:{curves.colour}"></span>'
    state = f'<span class="state">{status.state.value}</span>'
    head = f"<h3>{chip}{html.escape(curves.label)} {state}</h3>"
    return f'<div class="card{wide}">{head}{error}<div class="big">{big}</div><dl>{rows}</dl></div>'


def _facts(reader: Run) -> list[tuple[str, str]]:
    try:
        spec = reader.read_spec()
    except NotFoundError:
        return []
    found = ((name, _at(spec, path)) for name, path in _FACTS.items())
    return [(name, str(value)) for name, value in found if value is not None]


def _at(data: Any, path: str) -> Any:
    for name in path.split("."):
        data = data.get(name) if isinstance(data, dict) else None
    return data


def _charts(
    charts: dict[str, tuple[str, str, Figure]], suffix: str, figures: dict[str, Figure]
) -> str:
    """Cards with a place for each chart; the figures are put into `figures` by the place's id."""
    cards = []
    for name, (title, note, figure) in charts.items():
        figures[f"{name}{suffix}"] = figure
        place = f'<div class="chart" id="{name}{suffix}"></div>'
        cards.append(f'<div class="card"><h3>{title}</h3><p class="note">{note}</p>{place}</div>')
    return f'<div class="grid">{"".join(cards)}</div>'


def _tokens(reader: Run, suffix: str) -> list[str]:
    rows = chosen_rows(reader)
    if not rows:
        return []
    note = (
        '<p class="note">Underlined: the learner saw it. Shade: divergence from the teacher, '
        '<span class="scale"></span> from 0 to the 0.98 quantile. Point at a token for numbers.</p>'
    )
    cards = f'<div class="grid">{token_cards(rows)}</div>'
    return [f"<h2>Rollouts{suffix}</h2>", note, cards]


def _page(title: str, body: str, figures: dict[str, Figure]) -> str:
    library = get_plotlyjs().replace("</script", "<\\/script")
    data = json.dumps(figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in (library, SCRIPT))
    return FRAME.format(
        title=html.escape(title),
        policy=POLICY.format(hashes=hashes),
        style=STYLE,
        body=body,
        figures=data,
        library=library,
        script=SCRIPT,
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
