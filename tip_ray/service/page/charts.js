// One chart: a card with title, note, a legend that reads out values, and a uPlot below.
// Values are columns over a shared x; null is a gap.

import { chip, fill, h, say } from "./dom.js";
import { number, percent } from "./format.js";
import { bars, drawErrors, drawMarks, palette } from "./drawing.js";

const HEIGHT = 210;
const PHONE_HEIGHT = 180;
const FONT = "11px system-ui, sans-serif";
const COUNTS = [1, 2, 5].flatMap((d) => [1, 10, 100, 1e3, 1e4, 1e5, 1e6].map((p) => d * p)).sort((a, b) => a - b);
const dark = matchMedia("(prefers-color-scheme: dark)");
const phone = matchMedia("(max-width: 640px)");

/**
 * A chart's card.
 *
 * title, note: text.
 * lines: [{label, short, colour | "ink", dash, alone}]; `short` is shown for `label`, and in a stack those with
 *   `alone` are drawn as lines over it.
 * stack: "areas" | "bars" | undefined.
 * isPercent: fractions, shown as percentages.  isWhole: the y axis ends at 1.
 * group: charts of one group share the cursor.
 */
export class Chart {
  constructor({ id, title, note, lines, stack, isPercent = false, isWhole = false, group }) {
    Object.assign(this, { title, lines, stack, isPercent, isWhole, group });
    this.format = isPercent ? percent : number;
    this.hidden = new Set();
    this.data = { x: [], columns: [] };
    this.place = h("div", { class: "plot", tabindex: 0, role: "img", onkeydown: (e) => this.onKey(e) });
    this.legend = h("ul", { class: "legend" });
    this.at = h("span", { class: "at" });
    this.element = h("figure", { class: "card chart", "data-chart": id },
      h("figcaption", {}, h("h3", {}, title, this.at), h("p", { class: "note" }, note)),
      this.legend, this.place);
    this.redraw = () => this.build();
    dark.addEventListener("change", this.redraw);
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.place);
    this.fillLegend();
  }

  /** Draw `data`: {x, columns: one for each line, errors?: likewise, marks?: [{step, kind}]}. */
  update(data) {
    const sameLines = this.plot && this.data.columns.length === data.columns.length;
    this.data = data;
    if (sameLines) this.plot.setData(this.drawn(), !this.zoomed());
    else this.build();
    this.readOut();
  }

  /** Other lines than before, as when an evaluation of a new name comes in. */
  setLines(lines) {
    if (JSON.stringify(lines) === JSON.stringify(this.lines)) return;
    this.lines = lines;
    this.fillLegend();
    this.plot?.destroy();
    this.plot = null;
  }

  destroy() {
    dark.removeEventListener("change", this.redraw);
    this.observer.disconnect();
    this.plot?.destroy();
    this.plot = null;
  }

  build() {
    this.plot?.destroy();
    this.plot = null;
    const width = this.place.clientWidth;
    if (!width || !this.data.x.length) return;
    this.plot = new uPlot(this.options(width), this.drawn(), this.place);
  }

  resize() {
    if (!this.plot) return this.build();
    const width = this.place.clientWidth;
    if (width && width !== this.plot.width) this.plot.setSize({ width, height: this.height() });
  }

  height() {
    return phone.matches ? PHONE_HEIGHT : HEIGHT;
  }

  options(width) {
    const colours = palette();
    const axis = { stroke: colours.soft, font: FONT, grid: { stroke: colours.line, width: 1 }, ticks: { show: false } };
    return {
      width,
      height: this.height(),
      padding: [8, () => this.lastTick(), 0, 0],
      legend: { show: false },
      scales: { x: { time: false, range: (_, low, high) => this.rangeX(low, high) }, y: { range: (_, low, high) => this.rangeY(low, high) } },
      axes: [
        { ...axis, size: 24, incrs: COUNTS, values: (_, ticks) => ticks.map((tick) => tick.toLocaleString("en-US")) },
        { ...axis, size: (_, ticks) => 14 + 6.2 * Math.max(2, ...(ticks ?? []).map((tick) => tick.length)), values: (_, ticks) => ticks.map((tick) => this.tick(tick)) },
      ],
      series: [{}, ...this.order().map((index) => this.series(index, colours))],
      cursor: { sync: { key: this.group, scales: ["x", null] }, points: { show: !this.stack, size: 7 }, y: false },
      hooks: {
        setCursor: [() => this.readOut()],
        draw: [(plot) => drawMarks(plot, this.data.marks ?? [], colours), (plot) => drawErrors(plot, this)],
      },
    };
  }

  series(index, colours) {
    const line = this.lines[index];
    const colour = line.colour === "ink" ? colours.ink : line.colour;
    const isLayer = this.stack && !line.alone;
    const few = this.data.x.length < 40;
    return {
      show: !this.hidden.has(index),
      stroke: isLayer && this.stack === "bars" ? undefined : colour,
      width: isLayer ? 0.5 : line.dash ? 1.5 : 2,
      dash: line.dash ? [4, 4] : undefined,
      fill: isLayer ? colour : undefined,
      paths: isLayer && this.stack === "bars" ? bars() : undefined,
      points: { show: !isLayer && (few || line.points), size: line.points ? 6 : 4, fill: colour },
      spanGaps: Boolean(line.points),
    };
  }

  /** Lines in the order they are drawn: a stack from its top layer down, then what lies over it. */
  order() {
    const all = this.lines.map((_, index) => index);
    if (!this.stack) return all;
    const layers = all.filter((index) => !this.lines[index].alone).reverse();
    return [...layers, ...all.filter((index) => this.lines[index].alone)];
  }

  /** What uPlot gets: layers of a stack are sums of the ones below. */
  drawn() {
    const { x, columns } = this.data;
    const shown = columns.map((column) => column);
    if (this.stack) {
      let below = x.map(() => 0);
      this.lines.forEach((line, index) => {
        if (line.alone) return;
        below = below.map((sum, i) => sum + (columns[index][i] ?? 0));
        shown[index] = below;
      });
    }
    return [x, ...this.order().map((index) => shown[index])];
  }

  /** Room at the right for half of the last step's number. */
  lastTick() {
    const last = this.data.x.at(-1) ?? 0;
    return Math.max(10, 3.6 * last.toLocaleString("en-US").length);
  }

  rangeX(low, high) {
    if (low === null) return [0, 1];
    if (this.stack === "bars") return [low - 0.6, high + 0.6];
    return low === high ? [low - 1, high + 1] : [low, high];
  }

  rangeY(low, high) {
    if (this.isWhole) return [0, 1];
    if (low === null || !Number.isFinite(low)) return [0, 1];
    const bottom = Math.min(0, low);
    const top = high > bottom ? high + 0.06 * (high - bottom) : bottom + 1;
    return [bottom < 0 ? bottom * 1.06 : 0, top];
  }

  tick(value) {
    if (this.isPercent) return `${Number((100 * value).toPrecision(3))}%`;
    return Math.abs(value) >= 1e4 ? value.toLocaleString("en-US", { notation: "compact" }) : String(Number(value.toPrecision(4)));
  }

  zoomed() {
    const { x } = this.data;
    const { min, max } = this.plot.scales.x;
    const [low, high] = this.rangeX(x[0], x[x.length - 1]);
    return min > low && max < high;
  }

  fillLegend() {
    this.values = this.lines.map((line) => h("b", { "data-value": line.label }));
    const items = this.lines.map((line, index) => {
      const kind = line.dash ? "dotted" : this.stack && !line.alone ? "" : "line";
      const inside = [chip(line.colour === "ink" ? "var(--ink)" : line.colour, kind), h("span", {}, line.short ?? line.label), this.values[index]];
      if (this.stack) return h("li", {}, h("span", { class: "key" }, inside));
      return h("li", {}, h("button", {
        class: "key", type: "button", "aria-pressed": "true", title: `Show or hide ${line.label}`,
        onclick: (event) => this.toggle(index, event.currentTarget),
      }, inside));
    });
    fill(this.legend, items);
  }

  toggle(index, button) {
    if (!this.hidden.delete(index)) this.hidden.add(index);
    button.setAttribute("aria-pressed", String(!this.hidden.has(index)));
    this.plot?.setSeries(index + 1, { show: !this.hidden.has(index) });
  }

  /** The legend says the values under the cursor, or the newest ones. */
  readOut() {
    const { x, columns } = this.data;
    const index = this.plot?.cursor.idx ?? null;
    say(this.at, index === null ? "" : `step ${x[index].toLocaleString("en-US")}`);
    columns.forEach((column, i) => {
      const value = index === null ? column.findLast((v) => v !== null && v !== undefined) : column[index];
      say(this.values[i], value === undefined || value === null ? "–" : this.format(value));
    });
    if (index === null) this.place.setAttribute("aria-label", this.summary());
  }

  summary() {
    const { x } = this.data;
    if (!x.length) return `${this.title}: nothing yet`;
    const said = this.lines.map((line, i) => `${line.label} ${this.values[i].textContent}`);
    return `${this.title}, steps ${x[0]} to ${x[x.length - 1]}; newest: ${said.join(", ")}. Arrow keys read the steps.`;
  }

  onKey(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!move || !this.plot) return;
    event.preventDefault();
    const last = this.data.x.length - 1;
    const index = Math.min(last, Math.max(0, (this.plot.cursor.idx ?? last) + move));
    this.plot.setCursor({ left: this.plot.valToPos(this.data.x[index], "x"), top: 10 }, true, true);
    const said = this.lines.map((line, i) => `${line.label} ${this.values[i].textContent}`);
    this.place.setAttribute("aria-label", `step ${this.data.x[index]}: ${said.join(", ")}`);
  }
}
