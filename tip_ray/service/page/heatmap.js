// Real rollouts of a step: shaded tokens, a slider over the steps, the panel about a token.

import { choice, fill, h, say } from "./dom.js";
import { number } from "./format.js";
import { label, TokenPanel } from "./token.js";
import { deepest, meanOf, rolloutCard, SHADES } from "./rollout.js";

const ORDERS = {
  divergence: ["largest divergence", (r) => -meanOf(r, "reverse_kl")],
  entropy: ["largest entropy", (r) => -meanOf(r, "student_entropy")],
  drawn: ["as drawn", (r) => r.slot * 1e4 + r.sample_index],
  length: ["longest", (r) => -r.text.length],
};

export class HeatMap {
  /** `load(step | undefined)` gives {step, steps, samples}. */
  constructor(load) {
    this.load = load;
    this.shade = "reverse_kl";
    this.order = "divergence";
    this.follow = true;
    this.steps = [];
    this.samples = [];
    this.asked = 0;
    this.late = false; // newer rollouts wait until nobody reads a token
    this.panel = new TokenPanel(() => this.unpin());
    this.pinned = false;
    this.slider = h("input", { type: "range", min: 0, max: 0, value: 0, "aria-label": "Step", oninput: () => this.slide(Number(this.slider.value)) });
    this.at = h("output", { class: "at" });
    this.cards = h("div", { class: "rollouts" });
    this.scale = h("span", { class: "soft scale-end" });
    this.cards.addEventListener("pointerover", (e) => e.pointerType === "mouse" && this.point(e.target, false));
    this.cards.addEventListener("pointerleave", () => !this.pinned && this.panel.hide());
    this.cards.addEventListener("focusin", (e) => this.point(e.target, false));
    this.cards.addEventListener("focusout", () => !this.pinned && this.panel.hide());
    this.cards.addEventListener("click", (e) => this.point(e.target, true));
    this.cards.addEventListener("keydown", (e) => this.onKey(e));
    this.element = h("div", { class: "heatmap" }, this.controls(), this.legend(), this.cards, this.panel.element);
    this.onScroll = () => this.pinned || this.panel.isSheet || this.panel.hide();
    addEventListener("scroll", this.onScroll, { passive: true });
  }

  destroy() {
    removeEventListener("scroll", this.onScroll);
  }

  controls() {
    const step = (by, name, text) => h("button", {
      type: "button", class: "step", "aria-label": name,
      onclick: () => this.slide(Number(this.slider.value) + by),
    }, text);
    const orders = Object.entries(ORDERS).map(([key, [text]]) => h("option", { value: key }, text));
    const order = h("select", { onchange: () => { this.order = order.value; this.draw(); } }, orders);
    return h("div", { class: "controls" },
      h("div", { class: "slider" }, step(-1, "Step before", "‹"), this.slider, step(1, "Step after", "›"), this.at),
      choice("Shade", SHADES, this.shade, (shade) => { this.shade = shade; this.draw(); }),
      h("label", { class: "pick" }, "First", order));
  }

  legend() {
    this.ramp = h("span", { class: "ramp", "aria-hidden": "true" });
    return h("p", { class: "note heat-legend" },
      h("span", {}, h("span", { class: "t kept sample" }, "kept"), " the learner saw it (underlined, ▴)"),
      h("span", {}, h("span", { class: "t dropped sample" }, "dropped"), " it did not"),
      h("span", {}, "shade ", h("b", {}, "0"), this.ramp, this.scale));
  }

  /** The newest step's rollouts, unless an earlier one is being looked at; whether there are any. */
  async refresh() {
    this.late = !this.panel.element.hidden;
    if (this.late) return true;
    const asked = this.asked;
    const answer = await this.load(this.follow ? undefined : this.step);
    if (answer.samples.length && asked === this.asked) this.take(answer);
    return answer.samples.length > 0;
  }

  async slide(index) {
    const last = this.steps.length - 1;
    const chosen = Math.max(0, Math.min(last, index));
    this.follow = chosen === last;
    this.slider.value = chosen;
    this.say(this.steps[chosen]);
    const asked = (this.asked += 1);
    await new Promise((done) => setTimeout(done, 60)); // a slider that is dragged asks once
    if (asked !== this.asked) return;
    const answer = await this.load(this.steps[chosen]).catch((error) => ({ error }));
    if (asked !== this.asked) return;
    if (answer.error) fill(this.cards, h("p", { class: "error" }, answer.error.message));
    else this.take(answer);
  }

  take({ step, steps, samples }) {
    const changed = step !== this.step || samples.length !== this.samples.length;
    Object.assign(this, { step, steps, samples });
    this.slider.max = Math.max(0, steps.length - 1);
    this.slider.value = steps.indexOf(step);
    this.slider.disabled = steps.length < 2;
    this.say(step);
    if (changed) this.draw();
  }

  say(step) {
    say(this.at, `step ${step}${this.follow ? ", newest" : ` of ${this.steps.at(-1)}`}`);
    this.slider.setAttribute("aria-valuetext", `step ${step}`);
  }

  draw() {
    this.unpin();
    const [, by] = ORDERS[this.order];
    const deep = deepest(this.samples, this.shade);
    const sorted = [...this.samples].sort((a, b) => by(a) - by(b));
    this.element.dataset.shade = SHADES[this.shade];
    say(this.scale, `${number(deep)} nats of ${SHADES[this.shade]} (0.98 quantile)`);
    this.byCard = new Map(sorted.map((rollout) => [rolloutCard(rollout, this.shade, deep), rollout]));
    fill(this.cards, [...this.byCard.keys()]);
    this.cards.dataset.step = this.step;
  }

  /** Show the panel about the token at `target`; a click keeps it there. */
  point(target, pin) {
    const token = target.closest?.("[data-index]");
    if (!token) return pin ? this.unpin() : this.pinned || this.panel.hide();
    if (this.pinned && !pin && !token.matches(":focus")) return undefined;
    const rollout = this.byCard.get(token.closest("article"));
    const index = Number(token.dataset.index);
    this.marked?.classList.remove("shown");
    this.marked = token;
    token.classList.add("shown");
    token.setAttribute("aria-label", label(rollout, index));
    this.pinned = this.pinned || pin;
    this.panel.show(rollout, index, token);
    return undefined;
  }

  unpin() {
    this.pinned = false;
    this.marked?.classList.remove("shown");
    this.panel.hide();
  }

  onKey(event) {
    if (event.key === "Escape") return this.unpin();
    const token = event.target.closest("[data-index]");
    if (!token) return undefined;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return this.point(token, true);
    }
    const all = [...token.parentElement.querySelectorAll("[data-index]")];
    const moves = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity };
    const move = moves[event.key];
    if (!move) return undefined;
    event.preventDefault();
    const next = all[Math.max(0, Math.min(all.length - 1, all.indexOf(token) + move))];
    token.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
    return undefined;
  }
}
