"""The report's page: style, script and frame. The script draws what `report_charts` describes."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b2430; --soft: #5b6776;
  --line: #dfe4ea; --accent: #2f7ac0; --heat: 224, 92, 30; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2029; --ink: #e6ebf2;
  --soft: #9aa7b8; --line: #2c3542; --accent: #6cb0ee; --heat: 240, 120, 50; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.2rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.45rem; margin: .2rem 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .7rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; font-weight: 600; overflow-wrap: anywhere; }
p.note { color: var(--soft); margin: .1rem 0 .8rem; font-size: .88rem; }
.grid { display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem .9rem; min-width: 0; }
.card.wide { grid-column: 1 / -1; }
.chart { height: 300px; overflow: hidden; }
.big { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; margin: 0 0 .7rem; }
.big div { min-width: 6rem; }
.big b { display: block; font-size: 1.35rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.big span { color: var(--soft); font-size: .82rem; }
.chip { display: inline-block; width: .75em; height: .75em; border-radius: 50%;
  margin-right: .4em; }
.state { font-weight: 500; font-size: .8rem; color: var(--soft); }
.error { color: #d0434f; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr));
  gap: .1rem 1.4rem; margin: 0; font-size: .86rem; }
dl div { display: flex; justify-content: space-between; gap: .8rem;
  border-bottom: 1px solid var(--line); }
dt { color: var(--soft); white-space: nowrap; }
dd { margin: 0; overflow-wrap: anywhere; text-align: right; }
.tokens { font: 13.5px/1.9 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: var(--soft); border-left: 3px solid var(--line); padding-left: .6rem;
  margin-bottom: .3rem; max-height: 12rem; overflow-y: auto; }
.t { background: rgba(var(--heat), var(--d)); border-radius: 2px; padding: .1em 0;
  border-bottom: 2px solid transparent; color: var(--soft); }
.t.k { border-bottom-color: var(--accent); color: var(--ink); font-weight: 600; }
.t:hover { outline: 1px solid var(--accent); }
.more { color: var(--soft); }
.scale { display: inline-block; width: 7em; height: .8em; vertical-align: middle;
  border-radius: 3px;
  background: linear-gradient(90deg, rgba(var(--heat), 0), rgba(var(--heat), .85)); }
footer { color: var(--soft); font-size: .82rem; margin: 2rem 0 .5rem; }
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function draw() {
  const css = getComputedStyle(document.documentElement);
  const colour = name => css.getPropertyValue(name).trim();
  const axis = {gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false,
    automargin: true, tickfont: {size: 11}};
  for (const [id, figure] of Object.entries(figures)) {
    const layout = {paper_bgcolor: "transparent", plot_bgcolor: "transparent",
      font: {color: colour("--ink"), family: "system-ui, sans-serif", size: 12},
      margin: {l: 8, r: 12, t: 8, b: 8}, hovermode: "x unified", showlegend: true,
      hoverlabel: {bgcolor: colour("--card"), bordercolor: colour("--line")},
      legend: {orientation: "h", y: -0.16, yanchor: "top", x: 0, font: {size: 11}},
      ...figure.layout, xaxis: {...axis, ...(figure.layout.xaxis || {})},
      yaxis: {...axis, ...(figure.layout.yaxis || {})}};
    const narrow = document.getElementById(id).clientWidth < 420;
    const traces = figure.traces.map(trace => {
      const own = {...trace};
      if (own.line && own.line.color === "ink") own.line = {...own.line, color: colour("--ink")};
      if (narrow && own.name) own.name = own.name.replace(", ", ",<br>");
      return own;
    });
    Plotly.react(id, traces, layout, {responsive: true, displayModeBar: false});
  }
}
draw();
new ResizeObserver(() => {
  for (const id of Object.keys(figures)) Plotly.Plots.resize(id);
}).observe(document.body);
dark.addEventListener("change", draw);
"""

# Nothing is loaded from anywhere, and only the two scripts of this file run.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {hashes}"

FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="figures">{figures}</script>
<script>{library}</script>
<script>{script}</script>
</body>
</html>
"""
