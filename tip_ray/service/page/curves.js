// Which charts there are and which numbers they take; shared by the run page and the comparison.

import { Chart } from "./charts.js";

/** Wording and colours that the report has too. */
export const figures = await (await fetch("/page/figures.json")).json();

export const runColour = (index) => figures.runs[index % figures.runs.length];

/** A spare colour for a second and third line of one run, so that they differ by more than dashes. */
const SECOND = ["", "dash"];

/**
 * The charts that several runs share. `runs`: [{label, colour, metrics, evaluations, marks}], the
 * metrics by column. Returns {elements, update(runs), destroy()}.
 */
export function sharedCharts(group, runs) {
  const charts = figures.curves.map((curve) => {
    const chart = new Chart({
      ...curve, group, note: noteOf(curve, runs), isPercent: Boolean(curve.percent), isWhole: curve.id === "accuracy",
      lines: curve.columns ? metricLines(curve, runs) : evaluationLines(runs),
    });
    return { curve, chart };
  });
  return {
    /** The cards of one part of a page, or all. */
    elements: (part) => charts.filter(({ curve }) => part === undefined || (curve.part ?? "") === part).map(({ chart }) => chart.element),
    update(now) {
      for (const { curve, chart } of charts) {
        if (!curve.columns) chart.setLines(evaluationLines(now));
        chart.update(curve.columns ? metricData(curve, now) : evaluationData(now));
      }
    },
    destroy: () => charts.forEach(({ chart }) => chart.destroy()),
  };
}

/** The charts of one run alone: quadrants, stages, bytes to the learner. */
export function ownCharts(group) {
  const quadrants = figures.quadrants.map(({ label, colour }) => ({ label, colour }));
  const stages = figures.stages.map(({ key, colour }) => ({ label: key, colour }));
  const wall = { label: "wall time of the step", colour: "ink", alone: true };
  const charts = {
    quadrants: new Chart({
      id: "quadrants", title: "Quadrants", note: "Thresholds of each step's own quantiles",
      lines: quadrants, stack: "areas", isPercent: true, isWhole: true, group,
    }),
    frozen: new Chart({
      id: "frozen", title: "Quadrants, frozen", note: "Thresholds of step 1: here a run's progress shows",
      lines: quadrants, stack: "areas", isPercent: true, isWhole: true, group,
    }),
    stages: new Chart({
      id: "stages", title: "Seconds by stage",
      note: "Busy seconds; stages of neighbouring steps overlap, the line is wall time",
      lines: [...stages, wall], stack: "bars", group,
    }),
  };
  return {
    charts,
    update({ metrics, marks }) {
      const get = (names) => ({ x: metrics.step, columns: names.map((name) => metrics[name] ?? []), marks });
      const keys = figures.quadrants.map(({ key }) => key);
      charts.quadrants.update(get(keys.map((key) => `${key}_share`)));
      charts.frozen.update(get(keys.map((key) => `frozen_${key}_share`)));
      charts.stages.update(get([...figures.stages.map(({ key }) => `seconds_${key}`), "seconds_step"]));
    },
    destroy: () => Object.values(charts).forEach((chart) => chart.destroy()),
  };
}

/** One line a run and column: the first column solid, the others dashed. */
function metricLines(curve, runs) {
  return runs.flatMap(({ label, colour }) =>
    Object.values(curve.columns).map((what, index) => ({
      label: named(runs, label, what, Object.keys(curve.columns).length > 1),
      short: runs.length > 1 ? (index ? "" : label) : what,
      colour,
      dash: SECOND[index],
    })));
}

/** Where runs are compared, the dashes are explained once. */
function noteOf({ note, columns }, runs) {
  const [solid, dashed] = Object.values(columns ?? {});
  return runs.length > 1 && dashed ? `${note}. Solid: ${solid}, dashed: ${dashed}` : note;
}

function named(runs, label, what, several) {
  if (runs.length === 1) return what;
  return several ? `${label}, ${what}` : label;
}

function metricData(curve, runs) {
  const columns = Object.keys(curve.columns);
  const marks = runs.length === 1 ? runs[0].marks : [];
  if (runs.length === 1) {
    return { x: runs[0].metrics.step, columns: columns.map((name) => runs[0].metrics[name] ?? []), marks };
  }
  const tables = runs.map(({ metrics }) => [metrics.step, ...columns.map((name) => metrics[name])]);
  const [x, ...joined] = uPlot.join(tables, tables.map((table) => table.map(() => 2)));
  return { x, columns: joined, marks };
}

function evaluationNames(run) {
  return [...new Set(run.evaluations.map(({ name }) => name))];
}

function evaluationLines(runs) {
  const lines = runs.flatMap((run) =>
    evaluationNames(run).map((name, index) => ({
      label: named(runs, run.label, name, evaluationNames(run).length > 1), colour: run.colour, dash: SECOND[Math.min(index, 1)], points: true,
    })));
  return lines.length ? lines : [{ label: "no evaluation", colour: "var(--soft)" }];
}

function evaluationData(runs) {
  const series = runs.flatMap((run) =>
    evaluationNames(run).map((name) => run.evaluations.filter((result) => result.name === name)));
  if (!series.length) return { x: [], columns: [[]] };
  const tables = series.map((results) => [
    results.map(({ step }) => step),
    results.map(({ mean }) => mean),
    results.map(({ standard_error: error }) => error),
  ]);
  const [x, ...joined] = uPlot.join(tables);
  const marks = runs.length === 1 ? runs[0].marks : [];
  return {
    x,
    columns: joined.filter((_, index) => index % 2 === 0),
    errors: joined.filter((_, index) => index % 2 === 1),
    marks,
  };
}
