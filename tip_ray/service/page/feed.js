// One run's metrics and events, kept up to date with as little asking as possible.

import { api } from "./api.js";
import { evaluations, marks } from "./events.js";

const POINTS = 500; // a curve has no more; longer runs come thinned
const EVENTS = 5000;

export class Feed {
  constructor(run) {
    this.run = run;
    this.status = null;
    this.reset();
  }

  reset() {
    this.metrics = { step: [] };
    this.events = [];
    this.problems = []; // a line for each file of the run that cannot be read
  }

  /** Ask for the status and, where it has moved, for what is new. Returns whether it had. */
  async refresh() {
    const status = await api.status(this.run);
    const before = this.status;
    this.status = status;
    const again = before && (status.epoch !== before.epoch || status.step < before.step || status.recoveries !== before.recoveries);
    const same = before && !again && status.updated_at === before.updated_at;
    if (same && !this.problems.length) return false;
    if (again) this.reset(); // steps may have been made anew
    const tried = await Promise.allSettled([this.moreMetrics(), this.moreEvents()]);
    const failures = tried.filter(({ status: became }) => became === "rejected").map(({ reason }) => reason);
    const fatal = failures.find((error) => error.status === 401 || !error.status);
    if (fatal) throw fatal;
    this.problems = failures.map((error) => error.message);
    return true;
  }

  async moreMetrics() {
    const known = this.metrics.step;
    const isLong = known.length > 2 * POINTS;
    const after = known.length && !isLong ? known[known.length - 1] : 0;
    const { columns } = await api.metrics(this.run, { after_step: after, max_points: POINTS });
    if (!after) this.metrics = columns;
    else for (const name of Object.keys(this.metrics)) this.metrics[name] = this.metrics[name].concat(columns[name] ?? []);
  }

  async moreEvents() {
    const after = this.events.at(-1)?.time;
    const { events } = await api.events(this.run, { after, limit: EVENTS });
    this.events = this.events.concat(events);
  }

  get evaluations() {
    return evaluations(this.events);
  }

  get marks() {
    return marks(this.events);
  }
}
