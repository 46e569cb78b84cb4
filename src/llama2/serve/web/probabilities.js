// An answer as its tokens, tinted by probability; the alternatives of one are shown on hover, focus or tap.

import { h } from "./dom.js";

/** Names what cannot be seen: spaces and line ends within a token. */
function visible(token) {
  return token.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·") || "∅";
}

const percent = (logprob) => {
  const share = Math.exp(logprob);
  return share >= 0.0995 ? `${Math.round(share * 100)} %` : share >= 0.001 ? `${(share * 100).toFixed(1)} %` : "< 0.1 %";
};

/** Spans for `tokens` ([text, logprob, alternatives]) below `root`. One tab stop; arrow keys go from token to token. */
export class TokenView {
  constructor(root, card) {
    this.root = root;
    this.card = card;
    this.tokens = [];
    root.replaceChildren();
    root.tabIndex = 0;
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", "The answer as tokens. Arrow keys go from token to token.");
    root.addEventListener("pointerover", (event) => this.show(event.target.closest(".token")));
    root.addEventListener("pointerleave", () => this.card.hide());
    root.addEventListener("focusout", () => this.card.hide());
    root.addEventListener("click", (event) => this.show(event.target.closest(".token")));
    root.addEventListener("keydown", (event) => this.key(event));
  }

  set(tokens) {
    for (const token of tokens.slice(this.tokens.length)) {
      // Ten steps of tint: style attributes are not allowed, classes are.
      const step = Math.min(9, Math.floor(Math.exp(token[1]) * 10));
      this.root.append(h(`span.token.p${step}`, {}, token[0]));
    }
    this.tokens = [...tokens];
  }

  show(span) {
    if (!span) return;
    this.current = [...this.root.children].indexOf(span);
    this.card.show(span, this.tokens[this.current]);
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || !this.tokens.length) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(this.tokens.length - 1, (this.current ?? -1) + step));
    this.show(this.root.children[next]);
  }
}

/** The one card that shows a token's alternatives. */
export class TokenCard {
  constructor() {
    this.rows = h("ol.token-rows");
    this.head = h("p.token-head");
    this.node = h("div.token-card", { role: "status", hidden: true }, this.head, this.rows);
    document.body.append(this.node);
    addEventListener("scroll", () => this.hide(), { capture: true, passive: true });
  }

  show(span, [text, logprob, alternatives]) {
    this.target?.classList.remove("current");
    this.target = span;
    span.classList.add("current");
    this.head.replaceChildren(h("code", {}, visible(text)), h("strong", {}, percent(logprob)));
    this.head.hidden = alternatives.length > 0; // the token stands among them
    const known = alternatives.some(([other]) => other === text);
    const listed = known ? alternatives : [...alternatives, [text, logprob]];
    this.rows.replaceChildren(...(alternatives.length ? listed.map((row) => this.row(row, row[0] === text)) : []));
    this.node.hidden = false;
    this.place(span);
  }

  row([text, logprob], chosen) {
    const bar = h("span.bar");
    bar.style.width = `${(Math.exp(logprob) * 100).toFixed(1)}%`;
    return h(chosen ? "li.chosen" : "li", {}, h("code", {}, visible(text)), h("span.track", {}, bar), h("span.share", {}, percent(logprob)));
  }

  place(span) {
    // The last line of a token that wraps is where the eye is.
    const at = [...span.getClientRects()].at(-1) ?? span.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.node;
    const left = Math.max(8, Math.min(at.left + at.width / 2 - width / 2, innerWidth - width - 8));
    const above = at.top - height - 8;
    this.node.style.left = `${left}px`;
    this.node.style.top = `${above > 8 ? above : at.bottom + 8}px`;
  }

  hide() {
    this.target?.classList.remove("current");
    this.target = null;
    this.node.hidden = true;
  }
}
