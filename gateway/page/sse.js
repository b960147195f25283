// Server-sent events, read from a fetch: unlike EventSource it can show a token in a header.

/** `feed` it text as it comes: returns the complete events `{id, event, data}`, and hints when to
 * come back as `{retry}`. What has no end when the connection breaks is dropped. */
export class EventParser {
  #held = "";
  #fields = {};

  feed(text) {
    const lines = (this.#held + text).split("\n");
    this.#held = lines.pop();
    const found = [];
    for (const line of lines) {
      if (line === "") {
        if ("data" in this.#fields) found.push(this.#fields);
        else if ("retry" in this.#fields) found.push({ retry: Number(this.#fields.retry) });
        this.#fields = {};
      } else if (!line.startsWith(":")) {
        const at = line.indexOf(":");
        this.#fields[line.slice(0, at)] = line.slice(at + 1).replace(/^ /, "");
      }
    }
    return found;
  }
}

/** The gateway says something each 20 s: a connection that is silent for longer is dead. */
const SILENCE = 30_000;
const PAUSES = [250, 500, 1000, 2000, 4000];

/**
 * Follows `path` until the end, coming back whenever the connection breaks. `getLast`: the id to
 * show. `take` gets lists of events, and returns true once it has the last one. `tell` is called
 * with true when connected, and with false while it waits. Throws a Problem that waiting does not
 * mend, and AbortError.
 */
export async function follow(api, path, { signal, getLast, take, tell }) {
  let failures = 0;
  while (!signal.aborted) {
    let pause = PAUSES[Math.min(failures, PAUSES.length - 1)];
    try {
      const came = await read(api, path, { signal, getLast, take, tell });
      if (came.ended) return;
      failures = came.some ? 0 : failures + 1;
      pause = came.retry ?? pause;
    } catch (error) {
      if (signal.aborted || error.final) throw error;
      failures += 1;
    }
    tell(false);
    await sleep(pause * (0.75 + Math.random() / 2), signal);
  }
}

async function read(api, path, { signal, getLast, take, tell }) {
  const silent = new AbortController();
  const either = AbortSignal.any([signal, silent.signal]);
  let timer = setTimeout(() => silent.abort(), SILENCE);
  const came = { ended: false, some: false, retry: undefined };
  try {
    const last = getLast();
    const headers = last === "" ? {} : { "Last-Event-ID": last };
    const response = await api.request(path, { signal: either, headers });
    if (response.status === 204) return { ...came, ended: true };
    tell(true);
    const parser = new EventParser();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return came;
      clearTimeout(timer);
      timer = setTimeout(() => silent.abort(), SILENCE);
      const found = parser.feed(value);
      came.retry = found.find((x) => "retry" in x)?.retry ?? came.retry;
      const events = found.filter((x) => "data" in x);
      came.some ||= events.length > 0;
      if (events.length > 0 && take(events)) return { ...came, ended: true };
    }
  } finally {
    clearTimeout(timer);
  }
}

export function sleep(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}
