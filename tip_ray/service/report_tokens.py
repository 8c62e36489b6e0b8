"""Rollouts as HTML: each token shaded by its divergence, those that the learner saw underlined."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from tip_ray.service.client_run import Run

ROLLOUTS_A_STEP = 3
MAX_TOKENS = 600  # of one rollout; the rest is counted
_DEEPEST = 0.85  # opacity of the shade


def chosen_rows(reader: Run) -> list[dict[str, Any]]:
    """A few rollouts of the first and of the newest step that has some."""
    steps = reader.sample_steps()
    rows: list[dict[str, Any]] = []
    for step in dict.fromkeys(steps[:1] + steps[-1:]):
        rows += reader.read_samples(step).slice(0, ROLLOUTS_A_STEP).to_pylist()
    return rows


def token_cards(rows: Sequence[dict[str, Any]]) -> str:
    """One card a rollout; the shade's full depth is the 0.98 quantile over all of them."""
    values = sorted(value for row in rows for value in row["reverse_kl"] if math.isfinite(value))
    deep = values[int(0.98 * (len(values) - 1))] if values else 0.0
    return "".join(_card(row, deep) for row in rows)


def _card(row: dict[str, Any], deep: float) -> str:
    kept, total = sum(row["kept"]), len(row["kept"])
    title = f"step {row['step']}, prompt {row['slot']}, sample {row['sample_index']}"
    note = f"{kept} of {total} tokens kept, finished by {row['finish_reason']}"
    tokens = "".join(_token(row, index, deep) for index in range(min(total, MAX_TOKENS)))
    more = (
        f'<span class="more"> … and {total - MAX_TOKENS} more</span>' if total > MAX_TOKENS else ""
    )
    prompt = f'<div class="tokens prompt">{_visible(row["prompt_text"])}</div>'
    return (
        f'<div class="card"><h3>{title}</h3><p class="note">{_visible(note)}</p>'
        f'{prompt}<div class="tokens">{tokens}{more}</div></div>\n'
    )


def _token(row: dict[str, Any], index: int, deep: float) -> str:
    divergence, entropy = row["reverse_kl"][index], row["student_entropy"][index]
    share = min(max(divergence, 0.0) / deep, 1.0) if deep > 0 and divergence == divergence else 0.0
    kept = bool(row["kept"][index])
    quadrant = row["quadrant"][index]
    where = f"Q{quadrant}" if quadrant else "not the student's"
    hint = (
        f"reverse KL {divergence:.3f}, student entropy {entropy:.3f}, teacher entropy "
        f"{row['teacher_entropy'][index]:.3f} nats; {where}; {'kept' if kept else 'dropped'}"
    )
    classes = "t k" if kept else "t"
    shade = f"--d:{_DEEPEST * math.sqrt(share):.2f}"
    text = _visible(row["text"][index])
    return f'<span class="{classes}" style="{shade}" title="{html.escape(hint)}">{text}</span>'


def _visible(text: str) -> str:
    """Escaped; a line's end is shown and kept, other control characters as their codes."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return html.escape(shown).replace("\n", "↵\n")
