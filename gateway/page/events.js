// What of a run's events is valid: each chunk once, in order.

/**
 * `take` an event and learn what to do with what is shown: "append" (`event` alone is new),
 * "replace" (show `entries` anew), "end", or "nothing". `entries` are the chunks and gaps that are
 * valid; `last` is the id to come back with; `end` is the run's end.
 */
export class RunEvents {
  entries = [];
  attempt = 0;
  last = "";
  end = null;
  #seen = 0;

  take(event, id = "") {
    const done = this.#take(event);
    if (id !== "") this.last = id;
    return done;
  }

  #take(event) {
    switch (event.type) {
      case "reset":
        return this.#begin(event.attempt, 0);
      case "continue":
        return this.#begin(event.attempt, event.after);
      case "chunk":
        if (event.attempt !== this.attempt || event.seq <= this.#seen) return "nothing";
        this.#seen = event.seq;
        this.entries.push(event);
        return "append";
      case "gap":
        if (event.to <= this.#seen) return "nothing";
        this.#seen = event.to;
        this.entries.push(event);
        return "append";
      case "end":
        this.end = event;
        return "end";
      default:
        return "nothing"; // of a later version
    }
  }

  #begin(attempt, after) {
    if (attempt < this.attempt) return "nothing";
    const valid = this.entries.filter((x) => (x.type === "gap" ? x.from : x.seq) <= after);
    const void_ = valid.length < this.entries.length;
    this.entries = valid;
    this.attempt = attempt;
    this.#seen = Math.min(this.#seen, after);
    return void_ ? "replace" : "nothing";
  }
}

/** A chunk's bytes. */
export function readBytes(chunk) {
  if (chunk.encoding !== "base64") return new TextEncoder().encode(chunk.data);
  return Uint8Array.from(atob(chunk.data), (x) => x.charCodeAt(0));
}

/** How a run ended, in words. */
export function describeEnd(end) {
  const code = end.exit_code === null || end.exit_code === undefined ? ""
    : `, exit code ${end.exit_code}`;
  const error = end.error ? `: ${end.error}` : "";
  const note = end.note ? ` (${end.note})` : "";
  return `The run has ended: ${end.status}${code}${error}${note}.`;
}

/** A gap, in words. */
export function describeGap(gap) {
  return gap.from === gap.to ? `Chunk ${gap.from} is not stored any more.`
    : `Chunks ${gap.from} to ${gap.to} are not stored any more.`;
}
