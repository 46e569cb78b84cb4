// Server-sent events over fetch: EventSource can neither POST nor send a key.

/** The `data` of each event of a byte stream, in order. Comments (pings) and other fields carry nothing for us. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break; // an event without its blank line is incomplete and is dropped, as the standard says
      rest += value;
      // A "\r" at the very end may be the first half of "\r\n": it waits for the next piece.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line === "data" || line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the caller stopped early, or the connection is gone already
  }
}
