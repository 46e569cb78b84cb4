// The server's OpenAI routes, and /info for its limits. Addresses are relative to this file, so a proxy may add a prefix.

import { events } from "./sse.js";

const ROOT = new URL("../", import.meta.url);
const KEY = "llama2.key";

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status; // 0: no HTTP answer
    this.code = code;
    this.retryAfter = retryAfter; // seconds
  }
}

/** The key lives as long as the tab: sessionStorage is not shared and not kept. */
export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

function headers(more = {}) {
  const key = sessionStorage.getItem(KEY);
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

/** What an error body says, in any of the dialects: {error: {message}}, {error: "…"}, {detail: …}, {message}, plain text. */
function reason(body, status) {
  const { error, detail, message } = body ?? {};
  const found = error?.message ?? error ?? message ?? (typeof detail === "string" ? detail : detail && JSON.stringify(detail));
  return typeof found === "string" && found ? found : `The server answered with status ${status}.`;
}

async function failure(response) {
  const text = await response.text().catch(() => "");
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    body = text.length < 300 && !text.startsWith("<") ? { message: text } : null;
  }
  const seconds = Number(response.headers.get("Retry-After") ?? NaN);
  const retryAfter = Number.isFinite(seconds) ? seconds : null;
  return new ApiError(reason(body, response.status), { status: response.status, code: body?.error?.code ?? null, retryAfter });
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(new URL(path, ROOT), { ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

/** The models on offer: [{id, …}], the base first, adapters after it. */
export async function models() {
  const { data } = await (await request("v1/models")).json();
  return Array.isArray(data) ? data.filter((model) => typeof model?.id === "string") : [];
}

/** {max_total_tokens, …} of the server, or {} where it has no such route. */
export async function info() {
  try {
    return (await (await request("info")).json()) ?? {};
  } catch {
    return {};
  }
}

/**
 * Streams a chat, or with `prompt` in the place of `messages` a completion: yields chunks in a chat's form; throws ApiError,
 * also when the stream breaks off before its end.
 */
export async function* chat(body, signal) {
  const response = await request(body.messages ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let finished = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(reason(chunk, response.status), { status: chunk.error.http_status_code ?? 200, code: chunk.error.code });
      finished ||= Boolean(chunk.choices?.[0]?.finish_reason);
      for (const choice of chunk.choices ?? []) choice.delta ??= { content: choice.text ?? "" };
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    if (error instanceof SyntaxError) throw new ApiError("The server sent an event that is not JSON.");
    throw new ApiError("The connection broke off before the answer was finished.");
  }
  if (!finished) throw new ApiError("The connection closed before the answer was finished.");
}
