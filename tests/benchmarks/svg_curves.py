"""Curves with bands of one standard error as a standalone SVG: panels side by side, one legend."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, GAP = 430, 300, 62  # of a panel's plot area, and between panels
LEGEND_HEIGHT, TOP, LEFT = 46, 40, 52
CHARACTER = 7  # its width in the legend, about
INK, SOFT, GRID = "#1b2430", "#5b6776", "#e3e7ec"


@dataclass(frozen=True)
class Line:
    """One curve; `error` is drawn as a band above and below."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float]
    dash: str = ""  # as SVG's stroke-dasharray


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    lines: Sequence[Line]
    x_range: tuple[float, float]
    y_range: tuple[float, float]  # fractions, shown in percent
    log_x: bool = False

    def place(self, x: float, y: float) -> tuple[float, float]:
        """In the panel's own coordinates, y downwards."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        if self.log_x:
            x, x0, x1 = math.log(max(x, x0)), math.log(x0), math.log(x1)
        return (x - x0) / (x1 - x0) * WIDTH, (1 - (y - y0) / (y1 - y0)) * HEIGHT

    def x_ticks(self) -> list[float]:
        x0, x1 = self.x_range
        if self.log_x:
            powers = range(math.floor(math.log10(x0)), math.ceil(math.log10(x1)) + 1)
            ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        else:
            step = max(round((x1 - x0) / 6), 1)
            ticks = [x0 + step * n for n in range(8)]
        return [tick for tick in ticks if x0 <= tick <= x1]

    def y_ticks(self) -> list[float]:
        y0, y1 = self.y_range
        return [n / 10 for n in range(11) if y0 - 1e-9 <= n / 10 <= y1 + 1e-9]


def draw(panels: Sequence[Sequence[Panel]]) -> str:
    """The SVG of rows of panels; the legend has the lines of the first."""
    columns = max(len(row) for row in panels)
    width = LEFT + columns * (WIDTH + GAP)
    height = LEGEND_HEIGHT + len(panels) * (HEIGHT + TOP + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(panels[0][0].lines),
    ]
    for i, row in enumerate(panels):
        for j, panel in enumerate(row):
            x, y = LEFT + j * (WIDTH + GAP), LEGEND_HEIGHT + TOP + i * (HEIGHT + TOP + GAP)
            parts += [f'<g transform="translate({x} {y})">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel) -> Iterator[str]:
    yield _text(0, -12, panel.title, anchor="start", weight="bold")
    for tick in panel.y_ticks():
        _, y = panel.place(panel.x_range[0], tick)
        yield f'<path d="M0 {y:.1f}H{WIDTH}" stroke="{GRID}"/>'
        yield _text(-8, y + 4, f"{tick:.0%}", anchor="end", colour=SOFT)
    for tick in panel.x_ticks():
        x, _ = panel.place(tick, panel.y_range[0])
        yield f'<path d="M{x:.1f} {HEIGHT}v5" stroke="{SOFT}"/>'
        yield _text(x, HEIGHT + 19, f"{tick:,.0f}", colour=SOFT)
    yield _text(WIDTH / 2, HEIGHT + 38, panel.x_label, colour=SOFT)
    for line in panel.lines:
        yield _band(panel, line)
    for line in sorted(panel.lines, key=lambda one: bool(one.dash)):  # dashes let others through
        yield _stroke(line, _path([panel.place(x, y) for x, y in zip(line.x, line.y, strict=True)]))


def _band(panel: Panel, line: Line) -> str:
    values = list(zip(line.x, line.y, line.error, strict=True))
    upper = [panel.place(x, y + error) for x, y, error in values]
    lower = [panel.place(x, y - error) for x, y, error in reversed(values)]
    return f'<path d="{_path(upper + lower)}Z" fill="{line.colour}" fill-opacity="0.12"/>'


def _stroke(line: Line, path: str) -> str:
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    style = f'stroke="{line.colour}" stroke-width="2" stroke-linejoin="round"{dash}'
    return f'<path d="{path}" fill="none" {style}/>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _legend(lines: Sequence[Line]) -> Iterator[str]:
    x = float(LEFT)
    for line in lines:
        yield _stroke(line, f"M{x:.1f} 22h22")
        yield _text(x + 27, 26, line.name, anchor="start")
        x += 45 + CHARACTER * len(line.name)


def _text(
    x: float, y: float, text: str, *, anchor: str = "middle", weight: str = "", colour: str = INK
) -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{bold}'
    return f"<text {place}>{html.escape(text)}</text>"
