// The page: one conversation in view, answers under way in any of them, and the parts that show both.

import { hasKey, info, models, setKey } from "./api.js";
import { Composer } from "./composer.js";
import { h, icon } from "./dom.js";
import { Drawer } from "./drawer.js";
import { Library } from "./library.js";
import { askKey, Notices } from "./notices.js";
import { Panel } from "./panel.js";
import { TokenCard } from "./probabilities.js";
import { reply } from "./reply.js";
import { Sidebar } from "./sidebar.js";
import { Thread } from "./thread.js";
import { add, DEFAULTS, newConversation, olderHalf, path, requestFor, turn } from "./tree.js";

const KEPT = "llama2.settings"; // what new conversations begin with
const SPOKEN = 1500; // characters of an answer that are read out
const IDEAS = ["Explain why the sky is blue in two sentences", "Write a haiku about patience", "Draft a friendly reminder email", "What is a hash table? Show one in Python"];

const $ = (id) => document.getElementById(id);

class App {
  async start() {
    this.runs = new Map(); // conversation id -> {conversation, message, abort}
    this.models = [];
    this.limits = {};
    this.notices = new Notices($("notices"), $("spoken"));
    this.parts();
    this.keys();
    this.library = await Library.open(this.notices, (id) => this.listed(id));
    addEventListener("popstate", () => this.route());
    addEventListener("pagehide", () => this.library.flush());
    addEventListener("visibilitychange", () => document.hidden && this.library.flush());
    await this.route();
    document.body.classList.add("ready");
    await this.connect();
  }

  parts() {
    this.card = new TokenCard();
    this.thread = new Thread($("thread"), {
      card: this.card,
      edit: (message, text) => this.edit(message, text),
      regenerate: (message) => this.answer(this.current, message.parent),
      goOn: (message) => this.run(this.current, message, true),
      retry: (message) => this.retry(message),
      turn: (message, step) => this.turn(message, step),
      drop: (message) => this.drop(message),
      begin: () => this.newChat(),
      editAbove: (message) => this.thread.editAbove(message),
    });
    this.composer = new Composer($("composer"), { send: (text) => this.send(text), stop: () => this.stop(), editLast: () => this.thread.editLast() });
    this.sidebar = new Sidebar($("list"), {
      open: (id) => this.go(id),
      rename: (id, title) => this.rename(id, title),
      exportOne: async (id) => this.library.export([await this.load(id)]),
      remove: (id) => this.remove(id),
    });
    this.panel = new Panel($("settings"), { changed: (settings) => this.set(settings), keep: (settings) => this.keep(settings), reset: () => this.reset() });
    const [main, side, panel] = [$("main"), $("sidebar"), $("panel")];
    const shade = $("shade");
    this.side = new Drawer(side, { width: 860, wide: true, shade, rest: [main, panel], buttons: [$("menu"), $("hide")] });
    this.tune = new Drawer(panel, { width: 1180, wide: false, shade, rest: [main, side], buttons: [$("tune"), $("untune")] });
    $("tune").addEventListener("click", () => this.panel.fitAll());
    this.drops(main);
    $("new").addEventListener("click", () => this.newChat());
    $("new-top").addEventListener("click", () => this.newChat());
    $("export").addEventListener("click", () => this.library.exportAll());
    $("import").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", () => this.import($("file")));
    $("model").addEventListener("change", () => this.chooseModel($("model").value));
    this.theme();
    for (const idea of IDEAS) $("ideas").append(h("button.idea", { type: "button", on: { click: () => this.send(idea) } }, idea));
    for (const button of document.querySelectorAll("[data-icon]")) button.prepend(icon(button.dataset.icon));
  }

  /** Text files can be dropped anywhere on the chat. */
  drops(main) {
    const files = (event) => event.dataTransfer?.types.includes("Files");
    main.addEventListener("dragover", (event) => {
      if (!files(event)) return;
      event.preventDefault();
      main.classList.add("dropping");
    });
    main.addEventListener("dragleave", (event) => event.relatedTarget && main.contains(event.relatedTarget) || main.classList.remove("dropping"));
    main.addEventListener("drop", async (event) => {
      if (!files(event)) return;
      event.preventDefault();
      main.classList.remove("dropping");
      const fault = await this.composer.take(event.dataTransfer.files);
      if (fault) this.notices.show(fault);
    });
  }

  theme() {
    const names = { auto: "Theme: as the system", light: "Theme: light", dark: "Theme: dark" };
    const show = () => {
      const chosen = globalThis.theme.get();
      $("theme").replaceChildren(icon(chosen));
      $("theme").setAttribute("aria-label", names[chosen]);
      $("theme").title = names[chosen];
    };
    $("theme").addEventListener("click", () => {
      const order = ["auto", "light", "dark"];
      globalThis.theme.set(order[(order.indexOf(globalThis.theme.get()) + 1) % 3]);
      show();
    });
    show();
  }

  keys() {
    const apple = /Mac|iPhone|iPad/.test(navigator.platform);
    $("new").querySelector("kbd").textContent = apple ? "⌘ K" : "Ctrl K";
    document.addEventListener("keydown", (event) => {
      if (event.isComposing || event.defaultPrevented) return;
      if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "k") {
        event.preventDefault();
        this.newChat();
      } else if (event.key === "Escape" && !document.querySelector("dialog[open], :popover-open")) {
        const drawer = [this.side, this.tune].find((drawer) => drawer.covers);
        if (!this.card.node.hidden) this.card.hide();
        else if (drawer) drawer.set(false);
        else this.stop();
      }
    });
  }

  // -- the server -----------------------------------------------------------------------------------------------

  async connect() {
    try {
      [this.models, this.limits] = await Promise.all([models(), info()]);
    } catch (error) {
      if (error.status === 401 && (await this.unlock())) return this.connect();
      if (error.status !== 401) this.notices.show(`${error.message} Is it still running?`, { action: () => this.connect(), label: "Retry", seconds: 0 });
    }
    return this.showModel();
  }

  /** Asks for a key; true once there is one to try. */
  async unlock() {
    const key = await askKey(hasKey());
    if (key) setKey(key);
    return key !== null;
  }

  get model() {
    return (this.models.find(({ id }) => id === this.current?.model) ?? this.models[0])?.id ?? null;
  }

  chooseModel(id) {
    this.current.model = id;
    this.meter();
    if (path(this.current).length) this.library.save(this.current);
  }

  showModel() {
    const several = this.models.length > 1;
    const name = (id) => id.split("/").at(-1);
    $("model").hidden = !several;
    $("model-name").hidden = several;
    $("model").replaceChildren(...this.models.map(({ id }) => h("option", { value: id, selected: id === this.model }, name(id))));
    $("model-name").textContent = this.model ? name(this.model) : "";
    $("model-name").title = this.model ?? "";
    this.meter();
  }

  meter() {
    const last = path(this.current).findLast(({ stats }) => stats?.prompt !== undefined);
    const limit = this.models.find(({ id }) => id === this.model)?.max_model_len ?? this.limits.max_total_tokens;
    this.composer.fill(last && last.stats.prompt + last.stats.tokens, limit);
  }

  // -- which conversation ---------------------------------------------------------------------------------------

  async route() {
    const id = decodeURIComponent(location.hash.slice(1));
    const found = id && (await this.load(id));
    this.view(found || newConversation(this.defaults()));
    if (id && !found) history.replaceState(null, "", location.pathname);
  }

  async load(id) {
    if (this.current?.id === id) return this.current;
    return this.runs.get(id)?.conversation ?? this.library.read(id);
  }

  async go(id) {
    if (id !== this.current.id) {
      history.pushState(null, "", `#${id}`);
      await this.route();
    }
    if (this.side.covers) this.side.set(false);
    this.composer.focus();
  }

  newChat() {
    if (path(this.current).length) {
      history.pushState(null, "", location.pathname);
      this.view(newConversation(this.defaults()));
    }
    if (this.side.covers) this.side.set(false);
    this.composer.focus();
  }

  view(conversation) {
    this.current = conversation;
    this.panel.set(conversation.settings);
    this.show();
    this.showModel();
  }

  show() {
    const live = this.runs.get(this.current.id)?.message ?? null;
    const empty = path(this.current).length === 0;
    document.body.classList.toggle("empty", empty);
    $("greeting").hidden = !empty;
    this.thread.show(this.current, live);
    this.composer.set(live !== null);
    $("title").textContent = this.current.title;
    $("title").hidden = !this.current.title;
    document.title = this.current.title ? `${this.current.title} · Llama 2` : "Llama 2";
    if (this.library) this.drawList();
  }

  drawList() {
    this.sidebar.set(this.library.heads, this.current?.id, new Set(this.runs.keys()));
    $("export").disabled = this.library.heads.length === 0;
  }

  /** The list changed; with an id, another tab wrote that conversation. */
  async listed(id) {
    this.drawList();
    if (!id || id !== this.current?.id || this.runs.has(id)) return;
    const fresh = await this.library.read(id);
    if (fresh && this.current.id === id && !this.runs.has(id)) this.view(fresh);
  }

  async rename(id, title) {
    const conversation = await this.load(id);
    if (!conversation) return;
    Object.assign(conversation, { title, renamed: true });
    this.library.list(conversation);
    this.library.save(conversation);
    if (id === this.current.id) this.show();
  }

  async remove(id) {
    const conversation = await this.load(id);
    const run = this.runs.get(id);
    run?.abort.abort();
    await run?.done;
    await this.library.remove(id);
    if (id === this.current.id) {
      history.replaceState(null, "", location.pathname);
      this.view(newConversation(this.defaults()));
    }
    this.composer.focus();
    if (!conversation) return;
    this.notices.show(`“${conversation.title || "New chat"}” deleted.`, {
      label: "Undo",
      action: () => {
        this.library.list(conversation);
        this.library.save(conversation);
      },
    });
  }

  async import(input) {
    const [file] = input.files;
    if (!file) return;
    const [first] = await this.library.import(file);
    input.value = ""; // the same file may be chosen again
    if (first) this.go(first);
  }

  // -- settings -------------------------------------------------------------------------------------------------

  defaults() {
    try {
      return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(KEPT) ?? "{}") };
    } catch {
      return DEFAULTS;
    }
  }

  set(settings) {
    this.current.settings = settings;
    if (!path(this.current).length) return;
    this.show();
    this.library.saveSoon(this.current);
  }

  keep(settings) {
    try {
      localStorage.setItem(KEPT, JSON.stringify(settings));
      this.notices.show("New chats will begin with these settings.");
    } catch {
      this.notices.show("The browser did not keep the settings.");
    }
  }

  reset() {
    this.set({ ...DEFAULTS, stop: [] });
    this.panel.set(this.current.settings);
  }

  // -- messages -------------------------------------------------------------------------------------------------

  send(text) {
    if (this.runs.has(this.current.id)) return;
    const user = add(this.current, path(this.current).at(-1)?.id ?? null, "user", text);
    if (!location.hash) history.replaceState(null, "", `#${this.current.id}`);
    this.composer.focus();
    this.answer(this.current, user.id);
  }

  edit(message, text) {
    if (message.role === "user") {
      this.composer.focus();
      this.answer(this.current, add(this.current, message.parent, "user", text).id);
    } else if (text !== message.content) {
      Object.assign(add(this.current, message.parent, "assistant", text), { finish: "stop", edited: true });
      this.library.save(this.current);
      this.show();
    }
  }

  turn(message, step) {
    const shown = turn(this.current, message, step);
    if (!shown) return;
    this.library.save(this.current);
    this.show();
    this.meter();
    this.thread.focusMessage(shown);
  }

  /** A part of an answer that failed stays as a version of its own. */
  retry(message) {
    if (message.content) this.answer(this.current, message.parent);
    else this.run(this.current, message);
  }

  /** Leaves the older half of the turns out of what is sent from now on, and asks again. */
  drop(message) {
    this.current.from = olderHalf(this.current, message);
    this.notices.show("The oldest turns stay here, but the model no longer reads them.");
    this.retry(message);
  }

  answer(conversation, parent) {
    this.run(conversation, add(conversation, parent, "assistant", ""));
  }

  stop() {
    this.runs.get(this.current.id)?.abort.abort();
  }

  /** Begins an answer, or goes on with the one that `message` holds. */
  run(conversation, message, goOn = false) {
    if (this.runs.has(conversation.id)) return;
    const run = { conversation, message, goOn, abort: new AbortController() };
    this.runs.set(conversation.id, run);
    conversation.updated = Date.now();
    this.library.list(conversation);
    run.done = this.follow(run);
  }

  /** Reads an answer to its end, showing it at most once a frame and saving it now and then. */
  async follow({ conversation, message, goOn, abort }) {
    let frame = 0;
    const draw = () => {
      frame = 0;
      if (this.current === conversation && this.runs.has(conversation.id)) this.thread.refresh(message, message);
    };
    const changed = () => {
      frame ||= requestAnimationFrame(draw);
      this.library.saveSoon(conversation);
    };
    Object.assign(message, { finish: null, error: undefined });
    if (this.current === conversation) {
      this.show();
      this.thread.toEnd();
    }
    if (!this.models.length) await this.connect();
    const model = conversation.model ?? this.model;
    await reply(message, requestFor(conversation, message, model, goOn), { goOn, signal: abort.signal, changed });
    cancelAnimationFrame(frame);
    this.runs.delete(conversation.id);
    conversation.updated = Date.now();
    await this.library.save(conversation);
    this.finished(conversation, message);
  }

  async finished(conversation, message) {
    this.drawList();
    if (this.current === conversation) {
      this.show();
      this.meter();
    }
    if (message.finish === "stopped") this.notices.say("Stopped.");
    else if (!message.error) this.notices.say(`Answer: ${message.content.slice(0, SPOKEN)}`);
    if (message.error?.status === 401 && (await this.unlock())) this.run(conversation, message);
  }
}

// The one handle on the running page, for tests and the console.
globalThis.app = new App();
globalThis.app.start();
