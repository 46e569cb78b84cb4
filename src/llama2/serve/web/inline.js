// Markdown within a line: emphasis, code, links, breaks. Gives DOM nodes; every loop is bounded for hostile text.

import { h } from "./dom.js";
import { character } from "./entities.js";

const PUNCTUATION = /[!-/:-@[-`{-~]/;
const BARE = /https?:\/\/[^\s<>[\]`"]+/y;
const ANGLED = /<(https?:\/\/[^\s<>]*)>/y;
const TARGET = /\(\s{0,9}(?:<([^<>\n]*)>|((?:[^\s()<>\\]|\\[^\n]|\((?:[^\s()\\]|\\[^\n])*\))*))(?:\s{1,9}(?:"([^"]*)"|'([^']*)'))?\s{0,9}\)/y;
const ENTITY = /&(#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});/y;
const SPACE = /\s|^$/;
const SIGN = /[\p{P}\p{S}]/u;
const DEEPEST = 24; // a page nested thousands deep overflows the browser's own stack

/** The address when it is an absolute http or https one, else null: javascript:, data:, file: and relative ones stay text. */
export function safeUrl(address) {
  if (!/^https?:\/\//i.test(address)) return null;
  try {
    const url = new URL(address);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}

function link(address, title, nodes) {
  const url = safeUrl(address);
  if (url === null) return null;
  return h("a", { href: url, title: title || url, target: "_blank", rel: "noopener noreferrer nofollow" }, nodes);
}

/** The nodes of `source`. */
export function inline(source) {
  return emphasise(new Scanner(source).run());
}

class Scanner {
  constructor(source) {
    this.source = source;
    this.at = 0;
    this.plain = "";
    this.items = []; // DOM nodes, and runs {mark, count, opens, closes} that emphasis pairs up
    this.brackets = []; // open "[": {index of its item, image}
    this.noTicks = new Set(); // lengths of backtick runs that nothing closes from here on
  }

  run() {
    const steps = { "\\": this.escape, "`": this.code, "\n": this.lineBreak, "[": this.open, "!": this.image, "]": this.close, "<": this.angled, "&": this.entity, h: this.bare, "*": this.mark, "_": this.mark, "~": this.mark };
    while (this.at < this.source.length) {
      const char = this.source[this.at];
      if (!steps[char]?.call(this, char)) {
        this.plain += char;
        this.at += 1;
      }
    }
    this.flush();
    return this.items;
  }

  flush() {
    if (this.plain) this.items.push(document.createTextNode(this.plain));
    this.plain = "";
  }

  put(item, length) {
    this.flush();
    this.items.push(item);
    this.at += length;
    return true;
  }

  escape() {
    const next = this.source[this.at + 1] ?? "";
    if (next === "\n") return this.put(h("br"), 2);
    if (!PUNCTUATION.test(next)) return false;
    this.plain += next;
    this.at += 2;
    return true;
  }

  /** &amp; and the like, by name or number; what names no character stays as it is. */
  entity() {
    ENTITY.lastIndex = this.at;
    const found = ENTITY.exec(this.source);
    const text = found && character(found[1]);
    if (!text) return false;
    this.plain += text;
    this.at += found[0].length;
    return true;
  }

  code() {
    const { length } = /^`+/.exec(this.source.slice(this.at, this.at + 1000))[0];
    const from = this.at + length;
    const end = this.noTicks.has(length) ? -1 : closingTicks(this.source, from, length);
    if (end < 0) {
      this.noTicks.add(length);
      this.plain += "`".repeat(length);
      this.at = from;
      return true;
    }
    const inner = this.source.slice(from, end).replaceAll("\n", " ");
    const padded = inner.length > 2 && inner.startsWith(" ") && inner.endsWith(" ") && inner.trim();
    return this.put(h("code", {}, padded ? inner.slice(1, -1) : inner), end + length - this.at);
  }

  // Models mean their line ends, in verse and addresses, so each is kept.
  lineBreak() {
    this.plain = this.plain.trimEnd();
    const spaces = /^\n[ \t]*/.exec(this.source.slice(this.at, this.at + 1000))[0].length;
    return this.put(h("br"), spaces);
  }

  open() {
    this.brackets.push({ index: this.items.length + (this.plain ? 1 : 0), image: false });
    return this.put(document.createTextNode("["), 1);
  }

  image() {
    if (this.source[this.at + 1] !== "[") return false;
    this.brackets.push({ index: this.items.length + (this.plain ? 1 : 0), image: true });
    return this.put(document.createTextNode("!["), 2);
  }

  close() {
    const bracket = this.brackets.pop();
    if (!bracket) return false;
    TARGET.lastIndex = this.at + 1;
    const target = TARGET.exec(this.source);
    if (!target) return false;
    this.flush();
    const address = (target[1] ?? target[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
    const inner = this.items.slice(bracket.index + 1).flatMap((item) => (item.tagName === "A" ? [...item.childNodes] : [item]));
    const nodes = emphasise(inner);
    // Pictures from elsewhere would tell their host who reads what: an image becomes a link to it.
    const made = link(address, target[3] ?? target[4], nodes.length ? nodes : [address]);
    this.items.length = bracket.index;
    this.items.push(...(made ? [made] : [h("span.dead-link", { title: "This address is not http or https" }, nodes)]));
    if (!bracket.image) this.brackets.length = 0; // a link holds no link
    this.at = TARGET.lastIndex;
    return true;
  }

  angled() {
    ANGLED.lastIndex = this.at;
    const found = ANGLED.exec(this.source);
    const made = found && link(found[1], "", [found[1]]);
    return made ? this.put(made, found[0].length) : false;
  }

  bare() {
    if (/\w/.test(this.source[this.at - 1] ?? "")) return false;
    BARE.lastIndex = this.at;
    const found = BARE.exec(this.source)?.[0];
    if (!found) return false;
    const address = trimmed(found);
    const made = link(address, "", [address]);
    if (made) return this.put(made, address.length);
    this.plain += found; // passed over as a whole: looking again at each part of it would take the square of its length
    this.at += found.length;
    return true;
  }

  mark(mark) {
    let count = 1;
    while (this.source[this.at + count] === mark) count += 1;
    const before = this.source[this.at - 1] ?? "";
    const after = this.source[this.at + count] ?? "";
    const left = !SPACE.test(after) && (!SIGN.test(after) || SPACE.test(before) || SIGN.test(before));
    const right = !SPACE.test(before) && (!SIGN.test(before) || SPACE.test(after) || SIGN.test(after));
    const within = mark === "_" && left && right; // snake_case
    const usable = mark !== "~" || count === 2;
    return this.put({ mark, count, opens: usable && left && (!within || SIGN.test(before)), closes: usable && right && (!within || SIGN.test(after)) }, count);
  }
}

function closingTicks(source, from, length) {
  for (let at = source.indexOf("`", from); at >= 0; ) {
    let end = at;
    while (source[end] === "`") end += 1;
    if (end - at === length) return at;
    at = source.indexOf("`", end);
  }
  return -1;
}

/** A bare address without the sentence's punctuation, and without a ")" that it did not open. */
function trimmed(address) {
  let end = address.length;
  let unopened = address.split(")").length - address.split("(").length;
  for (; end > 0; end -= 1) {
    const last = address[end - 1];
    if (last === ")" && unopened > 0) unopened -= 1;
    else if (!/[.,:;!?'*_~]/.test(last)) break;
  }
  return address.slice(0, end);
}

/** Pairs the runs among items; what finds no partner is text again. */
function emphasise(items) {
  const frames = [{ run: null, nodes: [] }];
  for (const item of items) {
    if (item.mark === undefined) frames.at(-1).nodes.push(item);
    else pair(frames, { ...item });
  }
  merge(frames, 0);
  return frames[0].nodes;
}

function pair(frames, run) {
  while (run.closes && run.count) {
    const opener = frames.findLastIndex((frame) => frame.run?.mark === run.mark);
    if (opener < 0) break;
    merge(frames, opener);
    const frame = frames[opener];
    const strong = frame.run.count > 1 && run.count > 1;
    const tag = run.mark === "~" ? "del" : strong ? "strong" : "em";
    frame.nodes = [h(tag, {}, frame.nodes)];
    frame.run.count -= strong ? 2 : 1;
    run.count -= strong ? 2 : 1;
    if (!frame.run.count) frames.at(-2).nodes.push(...frames.pop().nodes);
  }
  if (!run.count) return;
  if (run.opens && frames.length < DEEPEST) frames.push({ run, nodes: [] });
  else frames.at(-1).nodes.push(document.createTextNode(run.mark.repeat(run.count)));
}

/** Folds the frames above `into` back into it, their unused marks as text. */
function merge(frames, into) {
  for (const { run, nodes } of frames.splice(into + 1)) {
    frames[into].nodes.push(document.createTextNode(run.mark.repeat(run.count)));
    for (const node of nodes) frames[into].nodes.push(node);
  }
}
