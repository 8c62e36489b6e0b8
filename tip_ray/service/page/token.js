// The panel about one token: numbers, and what both models would have said in its place.

import { fill, h, style } from "./dom.js";
import { number, probability as share } from "./format.js";
import { figures } from "./curves.js";
import { shown } from "./visible.js";

const sheet = matchMedia("(max-width: 640px)"); // there the panel lies at the bottom
const MARGIN = 8;

export class TokenPanel {
  /** `close` is called by the panel's own button. */
  constructor(close) {
    this.close = close;
    this.element = h("div", { class: "panel", id: "token-panel", role: "tooltip" });
    this.element.hidden = true;
  }

  /** Show token `index` of `rollout` beside `anchor`. */
  show(rollout, index, anchor) {
    const close = h("button", { type: "button", class: "quiet close", "aria-label": "Close", onclick: this.close }, "✕");
    fill(this.element, close, heading(rollout, index), scalars(rollout, index),
      h("div", { class: "tops" }, top(rollout, index, "student"), top(rollout, index, "teacher")));
    this.element.hidden = false;
    anchor.setAttribute("aria-describedby", this.element.id);
    if (sheet.matches) anchor.scrollIntoView({ block: "nearest" }); // its margin is the sheet's height
    else this.place(anchor);
  }

  /** Whether it lies at the foot of the window, where scrolling does not part it from its token. */
  get isSheet() {
    return sheet.matches;
  }

  hide() {
    this.element.hidden = true;
  }

  /** Below the token, or above it where there is no room. */
  place(anchor) {
    const at = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.element;
    const left = Math.max(MARGIN, Math.min(at.left, innerWidth - width - MARGIN));
    const below = at.bottom + MARGIN;
    const top = below + height < innerHeight ? below : Math.max(MARGIN, at.top - height - MARGIN);
    this.element.style.left = `${left}px`;
    this.element.style.top = `${top}px`;
  }
}

/** One line about a token, as its label for screen readers. */
export function label(rollout, index) {
  return `“${shown(rollout.text[index])}”, token ${index + 1}, ${fate(rollout, index)}, ` +
    `divergence ${number(rollout.reverse_kl[index])}, entropy ${number(rollout.student_entropy[index])} nats`;
}

function fate(rollout, index) {
  if (!rollout.loss_mask[index]) return "not the student's";
  return rollout.kept[index] ? "kept" : "dropped";
}

function heading(rollout, index) {
  const kept = rollout.kept[index] ? "kept" : "dropped";
  const quadrant = figures.quadrants[rollout.quadrant[index] - 1];
  return h("div", { class: "head" },
    h("code", {}, shown(rollout.text[index])),
    h("span", { class: `fate ${kept}` }, fate(rollout, index)),
    h("span", { class: "soft" }, `token ${index + 1} of ${rollout.text.length}`),
    h("span", { class: "soft quadrant" }, quadrant ? `${quadrant.label}; numbers in nats` : "numbers in nats"));
}

function scalars(rollout, index) {
  const facts = {
    "reverse KL": rollout.reverse_kl, "forward KL": rollout.forward_kl,
    "student entropy": rollout.student_entropy, "teacher entropy": rollout.teacher_entropy,
  };
  return h("dl", { class: "scalars" }, Object.entries(facts).map(([name, column]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, number(column[index])))));
}

/** A model's top 5 with probabilities; the sampled token is marked, and added where it is not among them. */
function top(rollout, index, model) {
  const ids = rollout[`${model}_top_ids`][index];
  const logprobs = rollout[`${model}_top_logprobs`][index];
  const texts = rollout[`${model}_top_text`]?.[index]; // older runs have none
  const sampled = rollout.response_ids[index];
  const rows = ids
    .map((id, i) => ({ id, text: texts?.[i] ?? `#${id}`, probability: Math.exp(logprobs[i]) }))
    .filter(({ id }) => id >= 0);
  if (!rows.some(({ id }) => id === sampled)) {
    const probability = Math.exp(rollout[`${model}_logprob`][index]);
    rows.push({ id: sampled, text: rollout.text[index], probability, beyond: true });
  }
  return h("table", { class: `top ${model}` },
    h("caption", {}, model),
    h("tbody", {}, rows.map((row) => line(row, row.id === sampled))));
}

function line({ text, probability, beyond }, chosen) {
  const bar = style(h("span", { class: "meter", "aria-hidden": "true" }), "--p", `${(100 * probability).toFixed(2)}%`);
  return h("tr", { class: [chosen ? "chosen" : "", beyond ? "beyond" : ""].join(" ").trim() },
    h("td", {}, h("code", {}, shown(text)), chosen ? h("span", { class: "mark", title: "the sampled token" }, " ◀") : null),
    h("td", {}, bar),
    h("td", { class: "num" }, share(probability)));
}
