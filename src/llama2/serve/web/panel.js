// The settings of one conversation: system prompt, sampling, token probabilities.

import { fit, h } from "./dom.js";

// What each may be; an empty field leaves the choice to the server.
const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, slider: true, start: 1, hint: "0 always takes the likeliest token" },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.01, slider: true, start: 1, hint: "Only the likeliest tokens that make up this share" },
  { name: "top_k", label: "Top k", min: 0, max: 1000, step: 1, hint: "Only this many of the likeliest tokens" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, slider: true, start: 0, hint: "Only tokens at least this likely, as a share of the likeliest" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 10, step: "any", decimal: true, hint: "Above 1 avoids what was said already" },
  { name: "max_tokens", label: "Longest answer", min: 1, max: 1_000_000, step: 1, hint: "In tokens" },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, hint: "The same seed gives the same answer" },
];

/** `actions`: {changed(settings), keep(settings), reset()}. */
export class Panel {
  constructor(root, actions) {
    this.actions = actions;
    this.fields = {};
    this.system = h("textarea", { id: "set-system", rows: 3, placeholder: "How the model should answer", on: { input: () => this.read() } });
    this.stop = h("textarea", { id: "set-stop", rows: 2, placeholder: "One per line", on: { input: () => this.read() } });
    this.form = h("select", { id: "set-form", on: { change: () => this.read() } }, h("option", { value: "text" }, "Text"), h("option", { value: "json" }, "JSON"), h("option", { value: "schema" }, "JSON of a schema"));
    this.schema = h("textarea", { id: "set-schema", rows: 4, spellcheck: "false", placeholder: '{"type": "object", "properties": {…}}', "aria-describedby": "set-schema-hint", on: { input: () => this.read() } });
    this.schemaHint = h("p.hint", { id: "set-schema-hint" });
    this.schemaField = h("div.field", {}, h("label", { for: "set-schema" }, "Schema"), this.schema, this.schemaHint);
    this.base = h("input.switch", { id: "set-base", type: "checkbox", role: "switch", "aria-describedby": "set-base-hint", on: { change: () => this.read() } });
    this.probabilities = h("input.switch", { id: "set-probabilities", type: "checkbox", role: "switch", "aria-describedby": "set-probabilities-hint", on: { change: () => this.read() } });
    root.append(
      this.field("set-system", "System prompt", null, this.system),
      h("h3", {}, "Sampling"),
      ...NUMBERS.map((number) => this.number(number)),
      this.field("set-stop", "Stop at", "The answer ends before any of these texts", this.stop),
      h("h3", {}, "Form"),
      h("div.field.row", {}, h("label", { for: "set-form" }, "Answers are"), this.form),
      this.schemaField,
      h("div.field.row", {}, h("label", { for: "set-base" }, "Continue text"), this.base),
      h("p.hint", { id: "set-base-hint" }, "For base models: your text goes to the model as it is, without turns or a system prompt."),
      h("h3", {}, "Inspect"),
      h("div.field.row", {}, h("label", { for: "set-probabilities" }, "Token probabilities"), this.probabilities),
      h("p.hint", { id: "set-probabilities-hint" }, "New answers are shown as tokens; point at one to see what else was likely."),
      h(
        "div.panel-foot",
        {},
        h("button.button", { type: "button", on: { click: () => this.actions.reset() } }, "Reset"),
        h("button.button", { type: "button", on: { click: () => this.actions.keep(this.settings) } }, "Use for new chats"),
      ),
    );
  }

  field(id, label, hint, ...controls) {
    const note = hint && h("p.hint", { id: `${id}-hint` }, hint);
    if (note) controls[0].setAttribute("aria-describedby", note.id);
    return h("div.field", {}, h("label", { for: id }, label), controls, note);
  }

  number({ name, label, min, max, step, slider, start, hint, decimal }) {
    const id = `set-${name}`;
    const entry = h("input.number", { id, type: "number", min, max, step: slider ? "any" : step, inputmode: "decimal", placeholder: "default", "aria-describedby": `${id}-hint`, on: { input: () => this.read() } });
    const range = slider && h("input", { type: "range", min, max, step, "aria-label": `${label}, slider`, on: { input: () => { entry.value = range.value; this.read(); } } });
    const note = h("p.hint", { id: `${id}-hint` }, hint);
    this.fields[name] = { entry, range, min, max, whole: !slider && !decimal, start, note, hint };
    return h("div.field", {}, h("div.row", {}, h("label", { for: id }, label), entry), range, note);
  }

  set(settings) {
    this.settings = settings;
    if (this.system.value !== settings.system) this.system.value = settings.system;
    const stop = settings.stop.map(escaped).join("\n");
    if (this.stop.value !== stop) this.stop.value = stop;
    this.probabilities.checked = settings.probabilities;
    this.form.value = settings.form ?? "text";
    if (this.schema.value !== (settings.schema ?? "")) this.schema.value = settings.schema ?? "";
    this.base.checked = settings.base ?? false;
    this.checkSchema();
    for (const [name, { entry, range, start, note, hint }] of Object.entries(this.fields)) {
      const value = settings[name];
      entry.value = value ?? "";
      entry.removeAttribute("aria-invalid");
      tell(note, hint, false);
      if (!range) continue;
      range.value = value ?? start;
      range.classList.toggle("unset", value === null);
    }
    this.fitAll();
  }

  /** Whether the schema is empty or a JSON object; says under its field where it is neither. */
  checkSchema() {
    this.schemaField.hidden = this.form.value !== "schema";
    let fault = "";
    try {
      const value = JSON.parse(this.schema.value || "{}");
      if (typeof value !== "object" || value === null || Array.isArray(value)) fault = "A JSON object is needed";
    } catch (error) {
      fault = `Not JSON yet: ${error.message}`;
    }
    this.schema.toggleAttribute("aria-invalid", false);
    if (fault) this.schema.setAttribute("aria-invalid", "true");
    tell(this.schemaHint, fault || "Answers keep to this JSON schema", Boolean(fault));
    return !fault;
  }

  /** Text areas can be measured only while they are on screen. */
  fitAll() {
    for (const area of [this.system, this.stop, this.schema]) if (area.offsetParent) fit(area);
  }

  /** Takes over what is valid; a field that is not keeps its former value and says so. */
  read() {
    const settings = { ...this.settings, system: this.system.value, probabilities: this.probabilities.checked, form: this.form.value, base: this.base.checked };
    if (this.checkSchema()) settings.schema = this.schema.value;
    settings.stop = this.stop.value.split("\n").filter((line) => line !== "").map(unescaped);
    for (const [name, { entry, range, min, max, whole, start, note, hint }] of Object.entries(this.fields)) {
      const value = entry.value === "" && !entry.validity.badInput ? null : entry.valueAsNumber;
      const valid = value === null || (value >= min && value <= max && (!whole || Number.isInteger(value)));
      entry.toggleAttribute("aria-invalid", false);
      if (!valid) entry.setAttribute("aria-invalid", "true");
      tell(note, valid ? hint : `${whole ? "A whole number" : "A number"} from ${min} to ${max}; until then the former value counts`, !valid);
      if (!valid) continue;
      settings[name] = value;
      if (!range) continue;
      range.value = value ?? start;
      range.classList.toggle("unset", value === null);
    }
    this.settings = settings;
    this.fitAll();
    this.actions.changed(settings);
  }
}

/** A hint under a field, or why its value does not count. */
function tell(note, text, wrong) {
  if (note.textContent !== text) note.textContent = text;
  note.classList.toggle("wrong", wrong);
}

// A stop text may hold a line end, which one line of a field cannot: it is written \n there.
const escaped = (text) => text.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t");
const unescaped = (line) => line.replace(/\\(.)/g, (_, char) => ({ n: "\n", t: "\t" })[char] ?? char);
