// Markdown's blocks: which lines form a paragraph, a list, a table, a fence. Line ranges only, no page.

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+([^]*)$/; // its end is cut off by `withoutClose`: lazy patterns take the cube of the length
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:[ \t]+([^]*))?$/; // [^] and not a dot, which stops at U+2028
const DELIMITER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*(?:\|[ \t]*)?$/;

const blank = (line) => line.trim() === "";
const indent = (line) => /^ */.exec(line)[0].length;
const kindOf = (marker) => (/\d/.test(marker) ? "ordered" : "bullets");

/**
 * The blocks of `lines`: [{kind, from, to, …}], `to` exclusive. A block follows from its own lines and the one line after
 * them, so text that is appended changes only the last block of the complete lines. That is what streaming relies on.
 */
export function blocks(lines) {
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const block = fence(lines, at) ?? heading(lines, at) ?? rule(lines, at) ?? quote(lines, at) ?? list(lines, at) ?? table(lines, at) ?? paragraph(lines, at);
    found.push(block);
    at = block.to;
  }
  return found;
}

/** Whether a line starts a block of its own even right below a paragraph. */
function interrupts(lines, at) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || /^ {0,3}>/.test(line)) return true;
  const item = ITEM.exec(line);
  if (item?.[3] && (kindOf(item[2]) === "bullets" || parseInt(item[2], 10) === 1)) return true;
  return table(lines, at) !== null;
}

function fence(lines, from) {
  const [, marks, info] = FENCE.exec(lines[from]) ?? [];
  if (!marks) return null;
  const shift = indent(lines[from]);
  const closes = new RegExp(`^ {0,3}\\${marks[0]}{${marks.length},}[ \\t]*$`);
  let to = from + 1;
  while (to < lines.length && !closes.test(lines[to])) to += 1;
  const inner = lines.slice(from + 1, to).map((line) => line.slice(Math.min(indent(line), shift)));
  const closed = to < lines.length;
  return { kind: "fence", from, to: closed ? to + 1 : to, language: info.trim().split(/\s/, 1)[0], code: inner.join("\n"), closed };
}

function heading(lines, from) {
  const found = HEADING.exec(lines[from]);
  return found && { kind: "heading", from, to: from + 1, level: found[1].length, text: withoutClose(found[2]) };
}

/** A heading's text without the run of # that may close it. */
function withoutClose(text) {
  const trimmed = trimBlanks(text);
  let end = trimmed.length;
  while (trimmed[end - 1] === "#") end -= 1;
  const closes = end < trimmed.length && (end === 0 || /[ \t]/.test(trimmed[end - 1])); // "C#" ends in its own sign
  return closes ? trimBlanks(trimmed.slice(0, end)) : trimmed;
}

function trimBlanks(text) {
  let end = text.length;
  while (text[end - 1] === " " || text[end - 1] === "\t") end -= 1;
  return text.slice(0, end);
}

function rule(lines, from) {
  return RULE.test(lines[from]) ? { kind: "rule", from, to: from + 1 } : null;
}

function quote(lines, from) {
  if (!/^ {0,3}>/.test(lines[from])) return null;
  const inner = [];
  let to = from;
  for (; to < lines.length; to += 1) {
    const marked = /^ {0,3}> ?([^]*)$/.exec(lines[to]);
    // A paragraph may run on without its mark.
    if (!marked && (blank(lines[to]) || blank(inner.at(-1)) || interrupts(lines, to))) break;
    inner.push(marked ? marked[1] : lines[to]);
  }
  return { kind: "quote", from, to, lines: inner };
}

/** Lists are read kindly: two spaces are enough to belong to an item, whatever the width of its marker. */
function list(lines, from) {
  const first = ITEM.exec(lines[from]);
  if (!first) return null;
  const base = first[1].length;
  const kind = kindOf(first[2]);
  const items = [];
  let [to, loose] = [from, false];
  for (let gap = false; to < lines.length; to += 1) {
    const line = lines[to];
    if (blank(line)) {
      items.at(-1).lines.push("");
      gap = true;
      continue;
    }
    const item = RULE.test(line) ? null : ITEM.exec(line);
    if (item && indent(line) < base + 2) {
      if (kindOf(item[2]) !== kind) break;
      loose ||= gap;
      items.push({ lines: [item[3] ?? ""], width: item[0].length - (item[3] ?? "").length });
    } else if (indent(line) >= base + 2) {
      loose ||= gap;
      items.at(-1).lines.push(line.slice(Math.min(indent(line), items.at(-1).width)));
    } else if (gap || interrupts(lines, to)) {
      break;
    } else {
      items.at(-1).lines.push(line);
    }
    gap = false;
  }
  for (; blank(lines[to - 1]); to -= 1) items.at(-1).lines.pop();
  return { kind: "list", from, to, ordered: kind === "ordered", start: parseInt(first[2], 10), loose, items: items.map((item) => item.lines) };
}

function table(lines, from) {
  const below = lines[from + 1];
  if (below === undefined || !lines[from].includes("|") || !DELIMITER.test(below)) return null;
  const head = cells(lines[from]);
  const marks = cells(below);
  if (head.length !== marks.length) return null;
  const align = marks.map((mark) => (/^:-+:$/.test(mark) ? "center" : /-:$/.test(mark) ? "right" : null));
  let to = from + 2;
  const rows = [];
  for (; to < lines.length && !blank(lines[to]) && lines[to].includes("|"); to += 1) {
    const row = cells(lines[to]).slice(0, head.length);
    rows.push(row.concat(Array(head.length - row.length).fill("")));
  }
  return { kind: "table", from, to, head, align, rows };
}

/** The cells of a row; "\|" is a bar within a cell. */
function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, from) {
  let to = from + 1;
  while (to < lines.length && !blank(lines[to]) && !interrupts(lines, to)) to += 1;
  return { kind: "paragraph", from, to, text: lines.slice(from, to).join("\n").trim() };
}
