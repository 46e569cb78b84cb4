// The messages of the conversation in view, and the scroll that follows them.

import { h, iconButton } from "./dom.js";
import { MessageView } from "./message.js";
import { path, place } from "./tree.js";

const NEAR = 48; // px from the end that still count as being there

export class Thread {
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    this.list = h("ol.messages", { "aria-label": "Messages" });
    this.latest = iconButton("down", "To the latest", () => this.toEnd(true), { class: "icon-button latest", hidden: true });
    root.append(this.list, this.latest);
    this.views = new Map();
    this.pinned = true;
    root.addEventListener("scroll", () => this.scrolled(), { passive: true });
    new ResizeObserver(() => this.follow()).observe(this.list);
  }

  /** Shows a conversation; `live` is the message being written, or null. */
  show(conversation, live) {
    if (this.conversation !== conversation) {
      this.list.replaceChildren();
      this.views.clear();
      this.pinned = true;
      this.conversation = conversation;
    }
    const shown = path(conversation);
    const kept = new Set(shown.map((message) => message.id));
    for (const [id, view] of this.views) {
      if (kept.has(id)) continue;
      view.node.remove();
      this.views.delete(id);
    }
    shown.forEach((message, index) => {
      let view = this.views.get(message.id);
      if (!view) this.views.set(message.id, (view = new MessageView(message, this.actions)));
      if (this.list.children[index] !== view.node) this.list.insertBefore(view.node, this.list.children[index] ?? null);
      this.refresh(message, live);
    });
    this.follow();
  }

  /** Shows one message again, as pieces arrive. */
  refresh(message, live) {
    const { probabilities } = this.conversation.settings;
    this.views.get(message.id)?.update({ place: place(this.conversation, message), live: message === live, locked: live !== null, last: message.chosen === null, probabilities });
  }

  /** Opens the editor of the last message of the user. */
  editLast() {
    const last = path(this.conversation).findLast((message) => message.role === "user");
    if (last) this.views.get(last.id).edit();
  }

  /** Opens the editor of the message that an answer was to. */
  editAbove(message) {
    this.views.get(message.parent)?.edit();
  }

  focusMessage(message) {
    const button = this.views.get(message.id)?.node.querySelector(".branches button:not(:disabled)");
    button?.focus();
  }

  scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.root;
    this.pinned = scrollHeight - scrollTop - clientHeight < NEAR;
    this.latest.hidden = this.pinned;
  }

  /** Stays at the end where it was; a chat that has become short enough to fit has no end to go to. */
  follow() {
    if (this.pinned) this.root.scrollTop = this.root.scrollHeight;
    this.scrolled();
  }

  toEnd(smooth = false) {
    this.pinned = true;
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.root.scrollTo({ top: this.root.scrollHeight, behavior: smooth && !calm ? "smooth" : "auto" });
  }
}
