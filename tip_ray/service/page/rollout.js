// One rollout as a card: its prompt, and its response token by token.

import { h, style } from "./dom.js";
import { count, number, percent } from "./format.js";
import { visible } from "./visible.js";

const AT_FIRST = 1500; // tokens of a long response; the rest on demand
const DEEPEST = 0.85; // opacity of the shade

export const SHADES = {
  reverse_kl: "divergence",
  student_entropy: "entropy",
};

/** Mean of the student's own tokens. */
export function meanOf(rollout, column) {
  const own = rollout[column].filter((value, i) => rollout.loss_mask[i] && Number.isFinite(value));
  return own.length ? own.reduce((sum, value) => sum + value, 0) / own.length : 0;
}

/** The 0.98 quantile of `column` over the tokens of `rollouts`: where the shade is deepest. */
export function deepest(rollouts, column) {
  const values = rollouts.flatMap((r) => r[column].filter((v, i) => r.loss_mask[i] && Number.isFinite(v)));
  values.sort((a, b) => a - b);
  return values.length ? values[Math.floor(0.98 * (values.length - 1))] : 0;
}

/** The card of `rollout`; shaded by `shade`. Its tokens carry their index as data-index. */
export function rolloutCard(rollout, shade, deep) {
  const total = rollout.text.length;
  const tokens = h("div", {
    class: "tokens", role: "group", "aria-label": `Response, ${total} tokens; arrow keys go from token to token`,
  });
  const more = h("button", { type: "button", class: "quiet" });
  let made = 0;
  const extend = (upTo) => {
    for (; made < upTo; made += 1) tokens.append(...token(rollout, made, shade, deep));
    more.textContent = `Show ${count(total - made)} more tokens`;
    more.hidden = made === total;
  };
  more.onclick = () => extend(total);
  extend(Math.min(total, AT_FIRST));
  const prompt = h("div", { class: "tokens prompt", tabindex: 0, role: "group", "aria-label": "Prompt" }, visible(rollout.prompt_text));
  return h("article", { class: "card rollout", "data-slot": rollout.slot, "data-sample": rollout.sample_index },
    h("h3", {}, `Prompt ${rollout.slot}, sample ${rollout.sample_index}`),
    h("p", { class: "note" }, facts(rollout)), prompt, tokens, more);
}

function facts(rollout) {
  const kept = rollout.kept.reduce((sum, one) => sum + one, 0);
  return [
    `${kept} of ${rollout.text.length} tokens kept (${percent(kept / rollout.text.length)})`,
    `mean divergence ${number(meanOf(rollout, "reverse_kl"))}, entropy ${number(meanOf(rollout, "student_entropy"))} nats`,
    `ended by ${rollout.finish_reason}`,
    `weights of step ${rollout.weight_version}`,
  ].join(" · ");
}

/** The token between places where lines may, or do, break: inside it they would part its marks. */
function token(rollout, index, shade, deep) {
  const own = Boolean(rollout.loss_mask[index]);
  const kept = Boolean(rollout.kept[index]);
  const classes = ["t", kept ? "kept" : "dropped", own ? "" : "foreign"].filter(Boolean).join(" ");
  const element = h("span", { class: classes, "data-index": index, tabindex: index ? -1 : 0, role: "button" }, visible(rollout.text[index], false));
  const value = rollout[shade][index];
  const share = own && deep > 0 && Number.isFinite(value) ? Math.min(1, Math.max(0, value) / deep) : 0;
  style(element, "--d", (DEEPEST * Math.sqrt(share)).toFixed(3));
  return [h("wbr"), element, rollout.text[index].match(/\n*$/)[0]];
}
