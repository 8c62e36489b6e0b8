// What uPlot does not draw by itself: marks of events, error bars, and the page's own colours.

/** The page's colours as they are now, light or dark. */
export function palette() {
  const css = getComputedStyle(document.documentElement);
  const get = (name) => css.getPropertyValue(name).trim();
  return { ink: get("--ink"), soft: get("--soft"), line: get("--line"), bad: get("--bad"), good: get("--good") };
}

/** Bars that touch where there are many steps. */
export function bars() {
  return uPlot.paths.bars({ size: [0.82, 64], align: 0 });
}

/** A dashed line at the step of each fault (a triangle down, on top) and recovery (up, at the foot). */
export function drawMarks(plot, marks, colours) {
  const { ctx, bbox } = plot;
  const pixel = devicePixelRatio;
  const { min, max } = plot.scales.x;
  ctx.save();
  for (const { step, kind } of marks) {
    if (step < min || step > max) continue;
    const x = Math.round(plot.valToPos(step, "x", true));
    ctx.strokeStyle = ctx.fillStyle = kind === "fault" ? colours.bad : colours.good;
    ctx.lineWidth = pixel;
    ctx.setLineDash([3 * pixel, 4 * pixel]);
    const [top, foot] = [bbox.top, bbox.top + bbox.height];
    ctx.globalAlpha = 0.4;
    line(ctx, x, top, x, foot);
    ctx.globalAlpha = 1;
    triangle(ctx, x, kind === "fault" ? top : foot, 4 * pixel, kind === "fault");
  }
  ctx.restore();
}

/** One standard error up and down, for charts whose data have `errors`. */
export function drawErrors(plot, chart) {
  const { x, columns, errors } = chart.data;
  if (!errors) return;
  const { ctx } = plot;
  const pixel = devicePixelRatio;
  ctx.save();
  ctx.lineWidth = pixel;
  columns.forEach((column, index) => {
    if (chart.hidden.has(index)) return;
    ctx.strokeStyle = chart.lines[index].colour;
    column.forEach((value, i) => {
      const error = errors[index][i];
      if (value === null || value === undefined || !error) return;
      const at = plot.valToPos(x[i], "x", true);
      const [top, bottom] = [value + error, value - error].map((y) => plot.valToPos(y, "y", true));
      line(ctx, at, top, at, bottom);
      for (const y of [top, bottom]) line(ctx, at - 3 * pixel, y, at + 3 * pixel, y);
    });
  });
  ctx.restore();
}

function line(ctx, x1, y1, x2, y2) {
  ctx.beginPath();
  ctx.moveTo(x1, y1);
  ctx.lineTo(x2, y2);
  ctx.stroke();
}

function triangle(ctx, x, y, size, down) {
  const tip = down ? y + size : y - size;
  ctx.beginPath();
  ctx.moveTo(x - size, down ? y - size / 2 : y + size / 2);
  ctx.lineTo(x + size, down ? y - size / 2 : y + size / 2);
  ctx.lineTo(x, tip);
  ctx.fill();
}
