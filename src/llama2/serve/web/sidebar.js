// The list of conversations: open, rename, export, delete, find.

import { h, icon, iconButton } from "./dom.js";

const DAY = 86_400_000;
const FILTER_FROM = 8; // conversations before a filter is worth its room

function group(updated) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (updated >= midnight) return "Today";
  if (updated >= midnight - DAY) return "Yesterday";
  if (updated >= midnight - 7 * DAY) return "Previous 7 days";
  return "Older";
}

/** `actions`: {open(id), rename(id, title), exportOne(id), remove(id)}. */
export class Sidebar {
  constructor(root, actions) {
    this.actions = actions;
    this.list = h("div.conversations");
    this.filter = h("input.filter", { type: "search", placeholder: "Find a conversation", "aria-label": "Find a conversation", on: { input: () => this.draw() } });
    this.menu = h("div.menu", { role: "menu", popover: "auto", id: "conversation-menu" });
    this.menu.addEventListener("keydown", (event) => this.menuKey(event));
    root.append(this.filter, this.list, this.menu);
    this.heads = [];
  }

  /** heads: [{id, title, updated}], newest first; `busy`: ids with an answer under way. */
  set(heads, current, busy) {
    Object.assign(this, { heads, current, busy });
    if (!this.renaming) this.draw();
  }

  draw() {
    this.filter.hidden = this.heads.length < FILTER_FROM;
    const wanted = this.filter.hidden ? "" : this.filter.value.trim().toLowerCase();
    const found = this.heads.filter(({ title }) => title.toLowerCase().includes(wanted));
    const focused = this.list.contains(document.activeElement) ? document.activeElement.dataset : null;
    this.list.replaceChildren(...this.groups(found));
    if (focused?.id) this.row(focused.id)?.querySelector(`[data-part="${focused.part}"]`)?.focus();
  }

  groups(found) {
    if (!found.length) return [h("p.none", {}, this.heads.length ? "No title has these words." : "Your conversations stay in this browser.")];
    const byName = groupBy(found);
    return [...byName].map(([name, heads]) => h("section", {}, h("h3", {}, name), h("ul", {}, heads.map((head) => this.item(head)))));
  }

  item(head) {
    const here = head.id === this.current;
    const title = head.title || "New chat";
    const open = h(
      "button.open",
      { type: "button", "data-id": head.id, "data-part": "open", "aria-current": here ? "page" : null, title, on: { click: () => this.actions.open(head.id), dblclick: () => this.rename(head) } },
      h("span", {}, title),
      this.busy.has(head.id) && h("i.busy", { role: "img", "aria-label": "answer under way" }),
    );
    const more = iconButton("more", `More for ${title}`, () => this.openMenu(head, more), { class: "icon-button more", "data-id": head.id, "data-part": "more", "aria-haspopup": "menu" });
    return h(here ? "li.here" : "li", { "data-row": head.id }, open, more);
  }

  row(id) {
    return [...this.list.querySelectorAll("li")].find((item) => item.dataset.row === id);
  }

  openMenu(head, button) {
    const entry = (label, action, kind = "") =>
      h(`button.${kind || "plain"}`, { type: "button", role: "menuitem", tabindex: -1, on: { click: () => { this.menu.hidePopover(); action(); } } }, label);
    this.menu.replaceChildren(
      entry("Rename", () => this.rename(head)),
      entry("Export", () => this.actions.exportOne(head.id)),
      entry("Delete", () => this.actions.remove(head.id), "danger"),
    );
    this.menu.showPopover();
    const at = button.getBoundingClientRect();
    this.menu.style.left = `${Math.min(at.left, innerWidth - this.menu.offsetWidth - 8)}px`;
    this.menu.style.top = `${Math.min(at.bottom + 4, innerHeight - this.menu.offsetHeight - 8)}px`;
    this.menu.firstElementChild.focus();
    this.menu.ontoggle = (event) => {
      if (event.newState === "closed" && !this.renaming && document.activeElement === document.body) button.focus();
    };
  }

  menuKey(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const entries = [...this.menu.children];
    entries.at((entries.indexOf(document.activeElement) + step) % entries.length).focus();
  }

  rename(head) {
    const item = this.row(head.id);
    if (!item) return;
    const field = h("input.rename", { "aria-label": "Title", maxlength: 120 });
    field.value = head.title;
    this.renaming = true;
    let left = false;
    const leave = (keep) => {
      if (left) return;
      left = true;
      this.renaming = false;
      const title = field.value.trim();
      if (keep && title && title !== head.title) this.actions.rename(head.id, title);
      else this.draw();
      this.row(head.id)?.querySelector(".open")?.focus();
    };
    field.addEventListener("blur", () => leave(true));
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
      event.preventDefault();
      event.stopPropagation();
      leave(event.key === "Enter");
    });
    item.replaceChildren(field);
    field.focus();
    field.select();
  }
}

function groupBy(heads) {
  const groups = new Map();
  for (const head of heads) groups.set(group(head.updated), [...(groups.get(group(head.updated)) ?? []), head]);
  return groups;
}

/** An icon with its label beside it, as the sidebar's buttons have. */
export function labelled(name, label, click, attributes = {}) {
  return h("button.labelled", { type: "button", ...attributes, on: { click } }, icon(name), h("span", {}, label));
}
