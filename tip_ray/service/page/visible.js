// Text of models as it is: whitespace gets a sign, control characters their codes.

import { h } from "./dom.js";

const SIGN = /[ \t\n\r\u0000-\u001f\u007f-\u009f\u00a0\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/;
const SIGNS = { " ": "␣", "\n": "↵", "\t": "⇥" };

const code = (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`;

/** Nodes that show `text`; where it has breaks, lines break, unless they are left to who calls. */
export function visible(text, breaks = true) {
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(plain);
    plain = "";
  };
  for (const character of text) {
    if (!SIGN.test(character)) {
      plain += character;
      continue;
    }
    flush();
    if (character === " " && breaks) nodes.push(h("wbr"));
    nodes.push(h("span", { class: "ws" }, SIGNS[character] ?? code(character)));
    if (character === "\n" && breaks) nodes.push("\n");
  }
  flush();
  return nodes;
}

/** The same as one string, for labels and tables. */
export function shown(text) {
  return [...text].map((c) => (SIGN.test(c) ? SIGNS[c] ?? code(c) : c)).join("");
}
