// The field at the bottom: write, send, stop.

import { fit, h, icon } from "./dom.js";

const MOST_BYTES = 1_000_000; // of a file that is dropped in

/** `actions`: {send(text), stop(), editLast()}. */
export class Composer {
  constructor(root, actions) {
    this.actions = actions;
    // On a phone the return key of the keyboard is the only way to a new line; there the button sends.
    this.enterSends = !matchMedia("(pointer: coarse) and (hover: none)").matches;
    this.area = h("textarea", { id: "prompt", rows: 1, placeholder: "Write a message", "aria-label": "Message", enterkeyhint: this.enterSends ? "send" : "enter" });
    this.button = h("button.send", { type: "submit" });
    this.meter = h("span.meter");
    const form = h("form.composer", {}, this.area, this.button);
    root.append(form, h("p.under", {}, h("span.keys", {}, h("kbd", {}, "Enter"), " to send, ", h("kbd", {}, "Shift"), " + ", h("kbd", {}, "Enter"), " for a new line"), this.meter));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.live) this.actions.stop();
      else this.send();
    });
    form.addEventListener("click", (event) => event.target === form && this.area.focus());
    this.area.addEventListener("input", () => this.changed());
    this.area.addEventListener("keydown", (event) => this.key(event));
    this.set(false);
  }

  key(event) {
    // While an input method composes, its keys are its own.
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter" && !event.shiftKey && this.enterSends) {
      event.preventDefault();
      if (!this.live) this.send();
    } else if (event.key === "ArrowUp" && this.area.value === "" && !this.live) {
      event.preventDefault();
      this.actions.editLast();
    }
  }

  send() {
    const text = this.area.value.trim();
    if (!text) return;
    this.write("");
    this.actions.send(text);
  }

  write(text) {
    this.area.value = text;
    this.changed();
  }

  changed() {
    fit(this.area);
    this.button.disabled = !this.live && this.area.value.trim() === "";
  }

  /** Puts text files behind what is written, each with its name and in a block of its own. */
  async take(files) {
    const parts = [];
    for (const file of files) {
      const text = file.size <= MOST_BYTES ? await file.text() : null;
      if (text === null) return `${file.name} is larger than ${MOST_BYTES / 1e6} MB.`;
      if (text.includes("\0")) return `${file.name} is no text file.`;
      const fence = "`".repeat(Math.max(3, ...Array.from(text.matchAll(/`+/g), ([ticks]) => ticks.length + 1)));
      parts.push(`${file.name}:\n${fence}\n${text.trimEnd()}\n${fence}`);
    }
    this.write([this.area.value.trimEnd(), ...parts].filter(Boolean).join("\n\n"));
    this.focus();
    return "";
  }

  /** live: an answer is being written, so the button stops it. */
  set(live) {
    if (this.live !== live) {
      this.button.replaceChildren(icon(live ? "stop" : "send"));
      this.button.setAttribute("aria-label", live ? "Stop" : "Send");
      this.button.title = live ? "Stop (Esc)" : "Send";
    }
    this.live = live;
    this.changed();
  }

  /** How full the context is: tokens of `limit`, or nothing while unknown. */
  fill(tokens, limit) {
    this.meter.textContent = !tokens ? "" : limit ? `${tokens.toLocaleString("en")} of ${limit.toLocaleString("en")} tokens` : `${tokens.toLocaleString("en")} tokens`;
    this.meter.classList.toggle("full", Boolean(limit && tokens > 0.9 * limit));
  }

  focus() {
    this.area.focus();
  }
}
