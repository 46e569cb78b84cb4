// Markdown to DOM nodes, safe by construction: elements are made by name, text is text, addresses are http or https.

import { blocks } from "./blocks.js";
import { copyButton, h } from "./dom.js";
import { highlight } from "./highlight.js";
import { inline } from "./inline.js";

const DEEPEST = 12; // quotes and lists nested further are shown as text

/** Shows a growing text below `root`; only blocks that can still change are made again. */
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.reset();
  }

  reset() {
    this.root.replaceChildren();
    this.text = "";
    this.stable = 0; // where, in the text, the first block begins that later text may change
    this.settled = 0; // how many blocks stand before it
    this.shown = []; // {source, node} of every block
  }

  /** `done`: nothing follows, so an open fence is as closed as it will be. */
  set(text, done = false) {
    if (!text.startsWith(this.text)) this.reset();
    this.text = text;
    const raw = text.slice(this.stable).split("\n");
    const lines = raw.map(plainLine);
    const found = blocks(lines);
    if (done && found.length) found.at(-1).closed = true;
    found.forEach((block, index) => this.show(this.settled + index, block, lines.slice(block.from, block.to).join("\n")));
    for (const { node } of this.shown.splice(this.settled + found.length)) node.remove();
    this.settle(raw, blocks(lines.slice(0, -1)));
  }

  show(index, block, source) {
    const old = this.shown[index];
    if (old?.source === source && old.block.closed === block.closed) return;
    if (old && block.kind === "fence" && old.block.kind === "fence" && !old.block.closed && !block.closed && old.block.language === block.language) {
      const text = old.node.querySelector("code").firstChild;
      if (text && block.code.startsWith(old.block.code)) {
        text.appendData(block.code.slice(old.block.code.length));
        this.shown[index] = { source, block, node: old.node };
        return;
      }
    }
    const node = render(block, 0);
    if (old) old.node.replaceWith(node);
    else this.root.append(node);
    this.shown[index] = { source, block, node };
  }

  /** The last block of the complete lines, and what follows, may yet change; what stands before it will not. */
  settle(raw, complete) {
    if (complete.length < 2) return;
    for (const line of raw.slice(0, complete.at(-1).from)) this.stable += line.length + 1;
    this.settled += complete.length - 1;
  }
}

/** A line without its carriage return, its indentation in spaces. */
function plainLine(line) {
  return line.replace(/\r$/, "").replace(/^ *\t[ \t]*/, (space) => space.replaceAll("\t", "    "));
}

function render(block, depth) {
  return RENDER[block.kind](block, depth);
}

function renderAll(lines, depth) {
  if (depth > DEEPEST) return [h("p", {}, lines.join("\n"))];
  return blocks(lines).map((block) => render(block, depth));
}

const RENDER = {
  paragraph: ({ text }) => h("p", {}, inline(text)),
  // The page's own headings come first in the outline: a model's "#" is a third level here.
  heading: ({ level, text }) => h(`h${Math.min(level + 2, 6)}.h${level}`, {}, inline(text)),
  rule: () => h("hr"),
  quote: ({ lines }, depth) => h("blockquote", {}, renderAll(lines, depth + 1)),
  list: renderList,
  table: renderTable,
  fence: renderFence,
};

function renderList({ ordered, start, loose, items }, depth) {
  const rendered = items.map((lines) => {
    const task = /^\[([ xX])\] /.exec(lines[0]);
    const body = renderAll(task ? [lines[0].slice(4), ...lines.slice(1)] : lines, depth + 1);
    const flat = loose ? body : body.flatMap((node) => (node.tagName === "P" ? [...node.childNodes] : [node]));
    const box = task && h("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": task[1] === " " ? "Open" : "Done" });
    return h(task ? "li.task" : "li", {}, box, flat);
  });
  return h(ordered ? "ol" : "ul", { start: ordered && start !== 1 ? start : null }, rendered);
}

function renderTable({ head, align, rows }) {
  const row = (tag, texts) => h("tr", {}, texts.map((text, column) => h(align[column] ? `${tag}.${align[column]}` : tag, tag === "th" ? { scope: "col" } : {}, inline(text))));
  const body = h("tbody", {}, rows.map((texts) => row("td", texts)));
  const table = h("table", {}, h("thead", {}, row("th", head)), body);
  return h("div.table", { role: "region", "aria-label": "Table", tabindex: 0 }, table);
}

function renderFence({ language, code, closed }) {
  const shown = h("code", {}, closed ? highlight(code, language) : document.createTextNode(code));
  const name = language.slice(0, 40);
  return h(
    "div.code",
    {},
    h("div.code-head", {}, h("span", {}, name || "text"), copyButton(() => shown.textContent, "Copy code")),
    h("pre", { tabindex: 0, role: "region", "aria-label": name ? `Code, ${name}` : "Code" }, shown),
  );
}
