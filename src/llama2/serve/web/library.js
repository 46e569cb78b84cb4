// The conversations of this browser as the page uses them: the list, saving while an answer grows, files in and out.

import { h } from "./dom.js";
import { FullError, openStore } from "./store.js";
import { fromJson, toJson } from "./tree.js";

const EVERY = 1500; // ms between saves of a growing answer

export class Library {
  /** `notices` for what the user must know; `changed(id)` when the list, or conversation `id` in another tab, changed. */
  static async open(notices, changed) {
    const library = new Library();
    Object.assign(library, { notices, changed, store: await openStore(), waiting: new Map() });
    library.heads = await library.store.heads();
    library.store.onChange(async (id) => {
      library.heads = await library.store.heads();
      changed(id);
    });
    if (!library.store.kept) notices.show("This browser refuses storage: conversations last until you leave the page.", { seconds: 0 });
    return library;
  }

  /** A conversation, or undefined. Answers that were being written when the page went away are marked. */
  async read(id) {
    const conversation = await this.store.read(id);
    for (const message of conversation?.nodes.values() ?? []) if (message.role === "assistant") message.finish ??= "interrupted";
    return conversation;
  }

  list(conversation) {
    const { id, title, updated } = conversation;
    this.heads = [{ id, title, updated }, ...this.heads.filter((head) => head.id !== id)].sort((a, b) => b.updated - a.updated);
    this.changed(null);
  }

  /** Saves within EVERY ms; `save` saves now. */
  saveSoon(conversation) {
    if (!this.waiting.has(conversation)) this.waiting.set(conversation, setTimeout(() => this.save(conversation), EVERY));
  }

  /** Saves what waits, at once: the page is about to go. */
  flush() {
    for (const conversation of [...this.waiting.keys()]) this.save(conversation);
  }

  async save(conversation) {
    clearTimeout(this.waiting.get(conversation));
    this.waiting.delete(conversation);
    try {
      await this.write(conversation);
      this.warned = false;
    } catch (error) {
      if (this.warned) return; // once is enough until a save succeeds again
      this.warned = true;
      const why = error instanceof FullError ? "The browser's storage is full" : `The browser could not save (${error?.message})`;
      this.notices.show(`${why}. Export or delete conversations to keep this one.`, { action: () => this.export([conversation]), label: "Export", seconds: 0 });
    }
  }

  /** Token probabilities are most of a conversation's size: without room for them, the text is kept. */
  async write(conversation) {
    try {
      await this.store.write(conversation);
    } catch (error) {
      if (!(error instanceof FullError)) throw error;
      const bare = [...conversation.nodes].map(([id, { tokens, ...rest }]) => [id, rest]);
      await this.store.write({ ...conversation, nodes: new Map(bare) });
    }
  }

  async remove(id) {
    for (const [conversation, timer] of this.waiting) {
      if (conversation.id !== id) continue;
      clearTimeout(timer);
      this.waiting.delete(conversation);
    }
    this.heads = this.heads.filter((head) => head.id !== id);
    await this.store.remove(id);
    this.changed(null);
  }

  // -- files ----------------------------------------------------------------------------------------------------

  export(conversations) {
    const url = URL.createObjectURL(new Blob([toJson(conversations)], { type: "application/json" }));
    const name = conversations.length === 1 ? conversations[0].title : `${conversations.length} conversations`;
    const file = `${name.replace(/[^\p{L}\p{N} _-]/gu, "").trim().slice(0, 60) || "conversation"}.json`;
    h("a", { href: url, download: file }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  async exportAll() {
    this.export((await Promise.all(this.heads.map(({ id }) => this.read(id)))).filter(Boolean));
  }

  /** Adds an exported file's conversations; returns their ids, and tells the user what happened. */
  async import(file) {
    try {
      const conversations = fromJson(await file.text());
      for (const conversation of conversations) {
        await this.write(conversation);
        this.list(conversation);
      }
      this.notices.show(`${conversations.length} ${conversations.length === 1 ? "conversation" : "conversations"} imported.`);
      return conversations.map(({ id }) => id);
    } catch (error) {
      this.notices.show(`Not imported. ${error.message}`, { seconds: 0 });
      return [];
    }
  }
}
