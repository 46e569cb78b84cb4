// One message of the thread: its text, its branches, what can be done with it.

import { copyButton, fit, h, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { TokenView } from "./probabilities.js";
import { perplexity, rate } from "./reply.js";

/**
 * `actions`: {edit(message, text), regenerate(message), goOn(message), turn(message, step), retry(message), drop(message),
 * begin(), editAbove(message), card}. `update`
 * shows the message as it stands: {place: {index, count}, live: being written, locked: an answer is being written
 * somewhere below, last: nothing stands below, probabilities: shown as tokens where these are known}.
 */
export class MessageView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.mine = message.role === "user";
    this.body = h(this.mine ? "div.text" : "div.text.markdown");
    this.foot = h("div.foot");
    this.note = h("div.note");
    this.node = h(
      `li.message.${this.mine ? "user" : "assistant"}`,
      {},
      h("article", { "aria-label": this.mine ? "You" : "Answer" }, this.body, this.note, this.foot),
    );
    if (this.mine) this.body.textContent = message.content;
  }

  update(state) {
    const { live } = state;
    this.node.classList.toggle("live", live);
    this.node.setAttribute("aria-busy", String(live));
    if (!this.mine) this.updateAnswer(state);
    const signature = JSON.stringify([state, this.message.finish, this.message.stats?.tokens, Boolean(this.editor)]);
    if (signature === this.signature) return;
    this.signature = signature;
    this.note.replaceChildren(...this.notes(state));
    if (live) this.liveFoot();
    else this.foot.replaceChildren(...this.feet(state));
  }

  updateAnswer({ probabilities, live }) {
    const { tokens, content } = this.message;
    const asTokens = Boolean(probabilities && tokens?.length);
    if (this.view === undefined || asTokens !== this.asTokens) {
      const fresh = h(asTokens ? "div.text.tokens" : "div.text.markdown");
      this.body.replaceWith(fresh);
      this.body = fresh;
      this.asTokens = asTokens;
      this.view = asTokens ? new TokenView(fresh, this.actions.card) : new MarkdownView(fresh);
    }
    this.view.set(asTokens ? tokens : content, !live);
  }

  // While pieces arrive only the figures change, so that a button under the pointer stays where it is.
  liveFoot() {
    const text = this.figures();
    if (this.foot.firstElementChild?.classList.contains("figures")) this.foot.firstElementChild.textContent = text;
    else this.foot.replaceChildren(h("span.figures", {}, text));
  }

  notes({ live, locked, last }) {
    const { error, finish, content } = this.message;
    if (live && !content) return [h("span.waiting", { role: "img", "aria-label": "Waiting for the first token" }, h("i"), h("i"), h("i"))];
    if (error) return [this.errorNote(error)];
    const said = { stopped: "You stopped this answer.", length: "Cut off at the token limit.", interrupted: "This answer was interrupted." };
    if (live || !said[finish]) return [];
    const goOn = last && content && h("button.text-button", { type: "button", disabled: locked, on: { click: () => this.actions.goOn(this.message) } }, "Continue");
    return [h("p.aside", {}, said[finish], goOn)];
  }

  errorNote({ message, retryAfter, code, status }) {
    const wait = retryAfter ? ` The server asks to wait ${retryAfter} s.` : "";
    const button = (label, click) => h("button.button", { type: "button", on: { click } }, label);
    // What the server refused it will refuse again, unless the message or the settings change.
    const refused = status >= 400 && status < 500 && ![401, 408, 429].includes(status);
    const full = code === "context_length_exceeded";
    return h(
      "div.error",
      { role: "alert" },
      icon("alert"),
      h("p", {}, message + wait),
      full && button("Drop the oldest turns", () => this.actions.drop(this.message)),
      full && button("New chat", () => this.actions.begin()),
      refused && button("Edit", () => this.actions.editAbove(this.message)),
      button("Retry", () => this.actions.retry(this.message)),
    );
  }

  feet({ place, locked }) {
    const { content, error } = this.message;
    const turned = place.count > 1 && this.branches(place, locked);
    const actions = [
      content && copyButton(() => this.message.content, "Copy message"),
      !this.mine && !(error && !content) && iconButton("redo", "Regenerate", () => this.actions.regenerate(this.message), { disabled: locked }),
      (this.mine || content) && iconButton("edit", this.mine ? "Edit message" : "Edit answer", () => this.edit(), { disabled: locked, class: "icon-button edit" }),
    ];
    const figures = !this.mine && this.figures();
    return [turned, h("span.actions", {}, actions), figures && h("span.figures", {}, figures)].filter(Boolean);
  }

  branches({ index, count }, locked) {
    const step = (by) => () => this.actions.turn(this.message, by);
    return h(
      "span.branches",
      { role: "group", "aria-label": "Versions of this message" },
      iconButton("left", "Previous version", step(-1), { disabled: locked || index === 0 }),
      h("span", { "aria-label": `Version ${index + 1} of ${count}` }, `${index + 1}/${count}`),
      iconButton("right", "Next version", step(1), { disabled: locked || index === count - 1 }),
    );
  }

  figures() {
    const { stats, tokens, edited } = this.message;
    if (edited) return "edited";
    if (!stats) return "";
    const speed = rate(stats);
    const parts = [`${stats.tokens} ${stats.tokens === 1 ? "token" : "tokens"}`];
    if (speed) parts.push(`${speed.toFixed(speed < 100 ? 1 : 0)} tokens/s`);
    parts.push(`first after ${stats.first.toFixed(2)} s`);
    if (this.asTokens) parts.push(`perplexity ${perplexity(tokens).toFixed(2)}`);
    return parts.join("  ·  ");
  }

  /** Opens the editor in place of the text; Enter or the button sends, Escape leaves. */
  edit() {
    if (this.editor) return;
    const area = h("textarea", { "aria-label": this.mine ? "Edit your message" : "Edit the answer", rows: 1 });
    area.value = this.message.content;
    const close = () => {
      this.editor.remove();
      this.editor = null;
      this.node.classList.remove("editing");
      this.node.querySelector(".edit")?.focus();
    };
    const save = () => {
      const text = area.value.trim();
      if (!text) return;
      close();
      this.actions.edit(this.message, text);
    };
    area.addEventListener("input", () => fit(area));
    area.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && !event.shiftKey && this.mine) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.editor = h(
      "div.editor",
      {},
      area,
      h(
        "div.editor-foot",
        {},
        h("span.hint", {}, this.mine ? "The old version stays; go back with the arrows." : "Later messages see your text."),
        h("button.button", { type: "button", on: { click: close } }, "Cancel"),
        h("button.button.primary", { type: "button", on: { click: save } }, this.mine ? "Send" : "Save"),
      ),
    );
    this.node.classList.add("editing");
    this.node.firstElementChild.append(this.editor);
    fit(area);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}
