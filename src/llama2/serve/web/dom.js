// Elements without markup strings: text only ever enters the page as text nodes, so nothing a model writes is parsed.

const SVG = "http://www.w3.org/2000/svg";

/** h("button.quiet", {type: "button", on: {click}}, "Text", node): attributes by name; null, undefined and false are left out. */
export function h(spec, attributes = {}, ...children) {
  const [tag, ...classes] = spec.split(".");
  const element = document.createElement(tag || "div");
  if (classes.length) element.className = classes.join(" ");
  const { on = {}, ...rest } = attributes;
  for (const [name, value] of Object.entries(rest)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  for (const [event, handler] of Object.entries(on)) element.addEventListener(event, handler);
  // One by one: an answer may have more nodes than a call may have arguments.
  for (const child of children.flat()) if (child !== null && child !== undefined && child !== false) element.append(child);
  return element;
}

// 24 x 24, drawn as strokes.
const ICONS = {
  alert: "M12 8v5M12 16.5v.01M10.3 4.2 2.9 17a2 2 0 0 0 1.7 3h14.8a2 2 0 0 0 1.7-3L13.7 4.2a2 2 0 0 0-3.4 0Z",
  auto: "M12 3v18M12 3a9 9 0 0 1 0 18M12 3a9 9 0 0 0 0 18M15 7.5h3.5M15 12h5.5M15 16.5h3.5",
  check: "m5 12.5 4.5 4.5L19 7.5",
  close: "m6 6 12 12M18 6 6 18",
  copy: "M9 9h9a1.5 1.5 0 0 1 1.5 1.5v9A1.5 1.5 0 0 1 18 21H9a1.5 1.5 0 0 1-1.5-1.5v-9A1.5 1.5 0 0 1 9 9ZM4.5 15V4.5A1.5 1.5 0 0 1 6 3h9",
  dark: "M20.5 14.2A8.5 8.5 0 1 1 9.8 3.5a7 7 0 0 0 10.7 10.7Z",
  down: "M12 5v14M6 13l6 6 6-6",
  edit: "m15.5 5 3.5 3.5M4 20l.9-4.2L16.6 4.1a1.8 1.8 0 0 1 2.6 0l.7.7a1.8 1.8 0 0 1 0 2.6L8.2 19.1 4 20Z",
  left: "m14 6-6 6 6 6",
  light: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8ZM12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4",
  menu: "M4 7h16M4 12h16M4 17h10",
  more: "M5.5 12h.01M12 12h.01M18.5 12h.01",
  plus: "M12 5v14M5 12h14",
  redo: "M19.5 12a7.5 7.5 0 1 1-2.3-5.4L20 9.3M20 4v5.3h-5.3",
  right: "m10 6 6 6-6 6",
  send: "M12 19V5M5.5 11.5 12 5l6.5 6.5",
  tune: "M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4",
};

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", `icon icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  if (name === "stop") {
    const square = document.createElementNS(SVG, "rect");
    for (const [key, value] of Object.entries({ x: 7, y: 7, width: 10, height: 10, rx: 2 })) square.setAttribute(key, value);
    svg.append(square);
  } else {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", ICONS[name]);
    svg.append(path);
  }
  return svg;
}

/** A button that shows only an icon; its label is read and shown as a tip. */
export function iconButton(name, label, click, attributes = {}) {
  return h("button.icon-button", { type: "button", "aria-label": label, title: label, ...attributes, on: { click } }, icon(name));
}

/** Copies text; true when the clipboard took it. Plain http on a local network has no clipboard API, hence the second way. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const field = h("textarea.off-screen", { readonly: true, "aria-hidden": "true" });
    field.value = text;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return copied;
  }
}

/** A click handler that copies what `text()` gives and shows for a moment, in its icon and label, that it did. */
export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    const copied = await copyText(text());
    button.replaceChildren(icon(copied ? "check" : "alert"));
    button.setAttribute("aria-label", copied ? "Copied" : "The browser refused to copy");
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.setAttribute("aria-label", label);
    }, 1600);
  });
  return button;
}

/** Grows a text area with its text, up to what the style sheet allows. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}
