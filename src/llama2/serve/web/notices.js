// Short notes at the edge of the page, the spoken status, and the question for a key.

import { h, iconButton } from "./dom.js";

export class Notices {
  constructor(root, spoken) {
    this.root = root;
    this.spoken = spoken;
  }

  /** Read out by screen readers when they are free. */
  say(text) {
    this.spoken.textContent = "";
    // The same text twice is a change only if the region was empty in between.
    setTimeout(() => (this.spoken.textContent = text), 50);
  }

  /** Shows a note for `seconds` (0: until closed), with one action such as undo. */
  show(text, { action = null, label = "", seconds = 7 } = {}) {
    const close = () => note.remove();
    const act = () => {
      close();
      action();
    };
    const note = h(
      "div.notice",
      { role: "status" },
      h("span", {}, text),
      action && h("button.button", { type: "button", on: { click: act } }, label),
      iconButton("close", "Dismiss", close),
    );
    this.root.append(note);
    if (seconds) setTimeout(close, seconds * 1000);
  }
}

/** Asks for the server's key; resolves to it, or to null when the question is closed. */
export function askKey(wrong) {
  return new Promise((resolve) => {
    const field = h("input", { id: "key", type: "password", autocomplete: "off", spellcheck: "false", required: true });
    const dialog = h(
      "dialog",
      { "aria-labelledby": "key-title" },
      h(
        "form",
        { method: "dialog" },
        h("h2", { id: "key-title" }, "This server wants a key"),
        h("p", {}, wrong ? "It did not accept the key. Try another." : "It is kept in this tab only, and forgotten when you close it."),
        h("label", { for: "key" }, "API key"),
        field,
        h("div.dialog-foot", {}, h("button.button", { type: "button", on: { click: () => dialog.close() } }, "Cancel"), h("button.button.primary", { value: "ok" }, "Continue")),
      ),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "ok" && field.value.trim() ? field.value.trim() : null);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}
