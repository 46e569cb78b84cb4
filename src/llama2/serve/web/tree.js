// A conversation is a tree of messages: editing or asking again adds a sibling, and `chosen` says which child is shown.
// No page, no network: everything here is data.

const ROOT = "root";
const FORMAT = "llama2-conversations";

/** What a request may carry; null means the server's own default. */
export const DEFAULTS = Object.freeze({
  system: "", temperature: null, top_p: null, top_k: null, min_p: null, repetition_penalty: null, max_tokens: null, seed: null,
  stop: [], form: "text", schema: "", base: false, probabilities: false,
});

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

export function newId() {
  // crypto.randomUUID wants a secure page; plain http on a local network is not one.
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function node(id, parent, role, content) {
  return { id, parent, role, content, created: Date.now(), children: [], chosen: null };
}

export function newConversation(settings = DEFAULTS) {
  const now = Date.now();
  return {
    id: newId(), title: "", renamed: false, created: now, updated: now, model: null,
    settings: { ...DEFAULTS, ...structuredClone(settings) },
    nodes: new Map([[ROOT, node(ROOT, null, ROOT, "")]]),
  };
}

/** The messages shown, first to last. */
export function path(conversation) {
  const shown = [];
  for (let at = conversation.nodes.get(ROOT); at.chosen !== null; shown.push(at)) at = conversation.nodes.get(at.chosen);
  return shown;
}

/** Adds a message under `parent` (an id, or null for the start) and shows it. */
export function add(conversation, parent, role, content) {
  const above = conversation.nodes.get(parent ?? ROOT);
  const added = node(newId(), above.id, role, content);
  conversation.nodes.set(added.id, added);
  above.children.push(added.id);
  above.chosen = added.id;
  touch(conversation);
  return added;
}

function touch(conversation) {
  conversation.updated = Date.now();
  if (conversation.renamed) return;
  const first = path(conversation).find((message) => message.role === "user");
  if (first) conversation.title = titleOf(first.content);
}

function titleOf(text) {
  const line = text.trim().split("\n", 1)[0].trim();
  return line.length > 60 ? `${line.slice(0, 60).replace(/\s+\S*$/, "")}…` : line;
}

/** {index, count} of a message among its siblings, from 0. */
export function place(conversation, message) {
  const { children } = conversation.nodes.get(message.parent);
  return { index: children.indexOf(message.id), count: children.length };
}

/** Shows the sibling `step` places further; returns it, or null at either end. */
export function turn(conversation, message, step) {
  const above = conversation.nodes.get(message.parent);
  const next = above.children[above.children.indexOf(message.id) + step];
  if (next === undefined) return null;
  above.chosen = next;
  return conversation.nodes.get(next);
}

/**
 * The messages to send for an answer at `message`: what stands above it. Answers that never came are left out and
 * neighbours of one role joined, because chat templates insist that roles alternate.
 */
export function prompt(conversation, message) {
  const above = [];
  for (let at = conversation.nodes.get(message.parent); at.id !== ROOT; at = conversation.nodes.get(at.parent)) above.unshift(at);
  const first = above.findIndex(({ id }) => id === conversation.from);
  if (first > 0) above.splice(0, first);
  const sent = conversation.settings.system.trim() ? [{ role: "system", content: conversation.settings.system }] : [];
  for (const { role, content } of above) {
    if (role === "assistant" && !content) continue;
    const last = sent.at(-1);
    if (last?.role === role) last.content += `\n\n${content}`;
    else sent.push({ role, content });
  }
  return sent;
}

/**
 * The id of the first message to send once the older half of those that are sent above `message` is left out: one of the
 * user's, and the last one where there is no other.
 */
export function olderHalf(conversation, message) {
  const above = path(conversation).slice(0, path(conversation).findIndex(({ id }) => id === message.id));
  const sent = above.slice(Math.max(above.findIndex(({ id }) => id === conversation.from), 0));
  const asked = sent.filter(({ role }) => role === "user");
  return (asked[Math.ceil(asked.length / 2)] ?? asked.at(-1))?.id ?? null;
}

/** The body of the request for an answer at `message`, or for the rest of the one that it holds where `goOn`. */
export function requestFor(conversation, message, model, goOn = false) {
  const { stop, probabilities, base } = conversation.settings;
  const given = NUMBERS.map((name) => [name, conversation.settings[name] ?? null]).filter(([, value]) => value !== null);
  const sent = [...prompt(conversation, message), ...(goOn ? [{ role: "assistant", content: message.content }] : [])];
  return {
    ...(model ? { model } : {}),
    // A base model knows no turns: it goes on with the text as it stands, to the end of the context unless bounded.
    ...(base ? { prompt: sent.filter(({ role }) => role !== "system").map(({ content }) => content).join(""), max_tokens: -1 } : { messages: sent }),
    ...(goOn && !base ? { continue_final_message: true, add_generation_prompt: false } : {}),
    ...Object.fromEntries(given),
    ...(stop.length ? { stop } : {}),
    ...formOf(conversation.settings),
    ...(probabilities && !base ? { logprobs: true, top_logprobs: 5 } : {}),
  };
}

function formOf({ form, schema }) {
  if (form === "json") return { response_format: { type: "json_object" } };
  if (form !== "schema" || !schema.trim()) return {};
  return { response_format: { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(schema) } } };
}

// -- files ------------------------------------------------------------------------------------------------------

export function toJson(conversations) {
  const plain = conversations.map((conversation) => ({ ...conversation, nodes: [...conversation.nodes.values()] }));
  return JSON.stringify({ format: FORMAT, version: 1, conversations: plain }, null, 1);
}

/** Conversations of an exported file under new ids. Throws an Error that says what is wrong with it. */
export function fromJson(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) throw new Error(`The file is no export of this page: its "format" is not "${FORMAT}".`);
  if (file.version !== 1) throw new Error(`The file has version ${file.version}; this page reads version 1.`);
  return file.conversations.map((value, index) => {
    try {
      return conversationFrom(value);
    } catch (error) {
      throw new Error(`Conversation ${index + 1} of the file: ${error.message}`);
    }
  });
}

const text = (value, fallback = "") => (typeof value === "string" ? value : fallback);
const number = (value, fallback = null) => (typeof value === "number" && Number.isFinite(value) ? value : fallback);

function conversationFrom(value) {
  if (!Array.isArray(value?.nodes)) throw new Error('"nodes" is missing.');
  const made = newConversation(settingsFrom(value.settings));
  Object.assign(made, {
    title: text(value.title), renamed: value.renamed === true, model: typeof value.model === "string" ? value.model : null,
    created: number(value.created, made.created), updated: number(value.updated, made.updated),
  });
  const ids = new Map([[ROOT, ROOT]]);
  for (const given of value.nodes) {
    if (given?.id === ROOT) continue;
    if (typeof given?.id !== "string" || ids.has(given.id)) throw new Error("a message has no id of its own.");
    // Parents stand before their children, so no circle can arise.
    if (!ids.has(given.parent)) throw new Error(`message ${given.id} comes before its parent or has none.`);
    if (given.role !== "user" && given.role !== "assistant") throw new Error(`message ${given.id} has the role ${given.role}.`);
    if (typeof given.content !== "string") throw new Error(`message ${given.id} has no text.`);
    const added = node(newId(), ids.get(given.parent), given.role, given.content);
    added.created = number(given.created, added.created);
    Object.assign(added, answerFrom(given));
    made.nodes.set(added.id, added);
    made.nodes.get(added.parent).children.push(added.id);
    ids.set(given.id, added.id);
  }
  for (const given of value.nodes) {
    const here = made.nodes.get(ids.get(given.id));
    const chosen = ids.get(given.chosen);
    here.chosen = here.children.includes(chosen) ? chosen : (here.children.at(-1) ?? null);
  }
  made.nodes.get(ROOT).chosen ??= made.nodes.get(ROOT).children.at(-1) ?? null;
  return made;
}

function settingsFrom(value = {}) {
  const numbers = NUMBERS.map((name) => [name, number(value?.[name])]);
  const stop = Array.isArray(value?.stop) ? value.stop.filter((word) => typeof word === "string") : [];
  return {
    system: text(value?.system), ...Object.fromEntries(numbers), stop,
    form: ["json", "schema"].includes(value?.form) ? value.form : "text", schema: text(value?.schema), base: value?.base === true,
    probabilities: value?.probabilities === true,
  };
}

function answerFrom({ tokens, stats, finish, error, edited }) {
  const kept = {};
  if (Array.isArray(tokens)) kept.tokens = tokens.filter(isToken);
  if (stats && typeof stats === "object") {
    const known = ["first", "seconds", "tokens", "prompt"].map((name) => [name, number(stats[name])]);
    kept.stats = Object.fromEntries(known.filter(([, value]) => value !== null));
  }
  if (typeof finish === "string") kept.finish = finish;
  if (typeof error?.message === "string") kept.error = { message: error.message };
  if (edited === true) kept.edited = true;
  return kept;
}

function isToken(token) {
  const pair = (value) => Array.isArray(value) && typeof value[0] === "string" && typeof value[1] === "number";
  return pair(token) && Array.isArray(token[2]) && token[2].every(pair);
}
