// Conversations kept in this browser: IndexedDB, or memory where the browser refuses it.

const NAME = "llama2.conversations";

export class FullError extends Error {}

/** The kept conversations. Titles live apart from messages, so the list opens without reading everything. */
export async function openStore() {
  try {
    return new Store(await open());
  } catch {
    return new MemoryStore();
  }
}

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("heads", { keyPath: "id" });
      request.result.createObjectStore("bodies", { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked by another tab"));
  });
}

const headOf = ({ id, title, updated }) => ({ id, title, updated });

class Store {
  kept = true;

  constructor(database) {
    this.database = database;
    this.database.onversionchange = () => this.database.close();
    // What one tab writes, the others show.
    this.channel = typeof BroadcastChannel === "undefined" ? null : new BroadcastChannel(NAME);
  }

  onChange(handler) {
    if (this.channel) this.channel.onmessage = ({ data }) => handler(data);
  }

  /** Runs `work` on the two stores in one transaction; resolves to its request's result once that is durable. */
  transact(mode, work) {
    return new Promise((resolve, reject) => {
      const transaction = this.database.transaction(["heads", "bodies"], mode);
      let request;
      transaction.oncomplete = () => resolve(request?.result);
      transaction.onabort = () => {
        const { error } = transaction;
        reject(error?.name === "QuotaExceededError" ? new FullError("The browser's storage is full.") : error);
      };
      request = work(transaction.objectStore("heads"), transaction.objectStore("bodies"));
    });
  }

  /** [{id, title, updated}], the latest first. */
  async heads() {
    const heads = await this.transact("readonly", (heads) => heads.getAll());
    return heads.sort((a, b) => b.updated - a.updated);
  }

  read(id) {
    return this.transact("readonly", (_, bodies) => bodies.get(id));
  }

  /** Throws FullError where the browser has no room left. */
  async write(conversation) {
    await this.transact("readwrite", (heads, bodies) => {
      heads.put(headOf(conversation));
      return bodies.put(conversation);
    });
    this.channel?.postMessage(conversation.id);
  }

  async remove(id) {
    await this.transact("readwrite", (heads, bodies) => {
      heads.delete(id);
      return bodies.delete(id);
    });
    this.channel?.postMessage(id);
  }
}

class MemoryStore {
  kept = false;
  bodies = new Map();

  onChange() {}

  async heads() {
    return [...this.bodies.values()].map(headOf).sort((a, b) => b.updated - a.updated);
  }

  async read(id) {
    return structuredClone(this.bodies.get(id));
  }

  async write(conversation) {
    this.bodies.set(conversation.id, structuredClone(conversation));
  }

  async remove(id) {
    this.bodies.delete(id);
  }
}
