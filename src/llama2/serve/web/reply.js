// One answer under way: reads the stream into its message, with times, token probabilities and the way it ended.

import { chat } from "./api.js";

/**
 * Fills `message` from the stream of `body`, or goes on with what it holds where `goOn`; `changed()` is called at every
 * piece. Ends without throwing: `finish` is "stop", "length", … as the server says, "stopped" after `signal`, and "error"
 * with `message.error` after a failure.
 */
export async function reply(message, body, { goOn, signal, changed }) {
  if (!goOn) Object.assign(message, { content: "", tokens: undefined, stats: undefined });
  Object.assign(message, { finish: null, error: undefined });
  const clock = new Clock(message);
  try {
    for await (const chunk of chat(body, signal)) {
      clock.usage(chunk.usage);
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      const text = choice.delta?.content ?? "";
      const tokens = choice.logprobs?.content?.map(compact) ?? [];
      message.content += text;
      if (tokens.length) (message.tokens ??= []).push(...tokens);
      if (text || tokens.length) clock.tick(tokens.length);
      if (choice.finish_reason) message.finish = choice.finish_reason;
      changed();
    }
  } catch (error) {
    message.finish = error.name === "AbortError" ? "stopped" : "error";
    if (message.finish === "error") {
      const { message: text, status = 0, code = null, retryAfter = null } = error;
      message.error = { message: text, status, code, retryAfter };
    }
  }
  clock.end();
  changed();
}

/** [text, log probability, alternatives [[text, log probability], …]]: arrays, because every token of every answer is kept. */
function compact({ token, logprob, top_logprobs: top }) {
  return [token, logprob, (top ?? []).map((other) => [other.token, other.logprob])];
}

/** stats = {first: s to the first piece, seconds: s from first to last piece, tokens, prompt: tokens of the prompt}. */
class Clock {
  constructor(message) {
    this.message = message;
    this.started = performance.now();
    this.counted = 0;
    this.before = message.stats ?? { tokens: 0, seconds: 0 }; // of the part that is gone on with
  }

  tick(tokens) {
    const now = performance.now();
    this.firstAt ??= now;
    // A piece is one token unless the server says how many it holds.
    this.counted += tokens || 1;
    this.message.stats = {
      first: this.before.first ?? (this.firstAt - this.started) / 1000,
      seconds: this.before.seconds + (now - this.firstAt) / 1000,
      tokens: this.before.tokens + this.counted,
    };
  }

  usage(usage) {
    if (usage) this.known = usage;
  }

  end() {
    if (!this.message.stats || !this.known) return;
    this.message.stats.tokens = this.before.tokens + (this.known.completion_tokens ?? this.counted);
    this.message.stats.prompt = this.known.prompt_tokens - this.before.tokens;
  }
}

/** Tokens after the first over the time they took; null while there is too little of either to say. */
export function rate({ tokens, seconds } = {}) {
  return tokens > 1 && seconds > 0.02 ? (tokens - 1) / seconds : null;
}

/** exp of the mean surprise: how many equally likely tokens the model hesitated between. */
export function perplexity(tokens) {
  const sum = tokens.reduce((total, [, logprob]) => total + logprob, 0);
  return Math.exp(-sum / tokens.length);
}
