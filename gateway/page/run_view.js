// One run: what was asked, what it has written, how it ended; followed while it is open.

import { make, makeStatus, describeAge, setText } from "./dom.js";
import { RunEvents, describeEnd, describeGap, readBytes } from "./events.js";
import { follow } from "./sse.js";
import { TextView } from "./text_view.js";

const LIVE = new Set(["queued", "running"]);
const PROMPTED = "Thoughts and remarks";

export class RunView {
  element = make("details", { class: "run" });
  #api;
  #actions;
  #row;
  #events = new RunEvents();
  #title = make("span", { class: "what" });
  #status = make("span");
  #age = make("span", { class: "age" });
  #asked = make("div", { class: "asked" });
  #output = make("div", { class: "output" });
  #remark = make("p", { class: "remark" });
  #abort = make("button", { class: "danger" }, "Abort");
  #blocks = [];
  #stop = null;

  /** `actions`: `slots`, `abort(run)`, `tell(connected, why)`, `say(text)` and `ended()`. */
  constructor(api, row, actions) {
    this.#api = api;
    this.#actions = actions;
    this.#row = row;
    const summary = make("summary", {}, this.#status, " ", this.#title, " ", this.#age);
    this.element.id = `run-${row.run}`;
    this.element.append(summary, this.#asked, this.#output, this.#remark, this.#abort);
    this.#abort.addEventListener("click", () => this.#actions.abort(this.#row));
    this.element.addEventListener("toggle", () => this.#toggle());
    this.update(row);
  }

  get live() {
    return LIVE.has(this.#row.status) && this.#events.end === null;
  }

  /** What the list says of it. */
  update(row) {
    this.#row = row;
    const status = this.#events.end?.status ?? row.status;
    if (this.#status.textContent.trim().split(" ").at(-1) !== status) {
      this.#status.replaceChildren(makeStatus(status));
    }
    const work = row.prompt ?? row.command ?? row.run;
    setText(this.#title, row.status_text ? `${row.status_text} (${work})` : work);
    setText(this.#age, `${describeAge(row.created_at)} ago`);
    this.#abort.hidden = !this.live;
    this.#abort.setAttribute("aria-label", `Abort run ${row.run}`);
  }

  close() {
    this.#stop?.abort();
    this.#stop = null;
  }

  #toggle() {
    if (!this.element.open) return this.close();
    if (this.#stop === null) {
      this.#stop = new AbortController();
      this.#follow(this.#stop.signal);
    }
    return undefined;
  }

  async #follow(signal) {
    if (this.#row.prompt !== null && this.#asked.childElementCount === 0) this.#showPrompt(signal);
    if (this.#events.end !== null) return;
    const leave = await this.#actions.slots.enter(signal, () => this.#say("Waiting for others."));
    try {
      this.#say("");
      await follow(this.#api, `/v1/runs/${encodeURIComponent(this.#row.run)}/events`, {
        signal,
        getLast: () => this.#events.last,
        take: (events) => this.#take(events),
        tell: (up) => this.#tell(up),
      });
    } catch (error) {
      if (!signal.aborted) this.#say(error.message);
    } finally {
      leave();
    }
  }

  #tell(up) {
    if (this.#events.end === null) this.#say(up ? "" : "Waiting: the connection broke.");
    this.#actions.tell(up);
  }

  /** Whole, where the list has its beginning. */
  async #showPrompt(signal) {
    try {
      const shown = await this.#api.get(`/v1/runs/${encodeURIComponent(this.#row.run)}`, signal);
      if (this.#asked.childElementCount === 0) {
        this.#asked.replaceChildren(make("h3", {}, "Asked"), make("p", {}, shown.prompt ?? ""));
      }
    } catch {
      // its title says how it begins
    }
  }

  #take(events) {
    for (const { id, data } of events) {
      const event = JSON.parse(data);
      const before = this.#events.attempt;
      const what = this.#events.take(event, id);
      if (event.type !== "chunk" && this.#events.attempt > Math.max(before, 1)) {
        this.#say(`It was interrupted: this is attempt ${this.#events.attempt}.`);
      }
      if (what === "replace") {
        this.#blocks = [];
        this.#output.replaceChildren();
        this.#events.entries.forEach((entry) => this.#show(entry));
      } else if (what === "append") this.#show(event);
      else if (what === "end") this.#end(event);
    }
    return this.#events.end !== null;
  }

  #end(end) {
    this.#say(describeEnd(end));
    this.update(this.#row);
    this.#actions.say(describeEnd(end));
    this.#actions.ended();
  }

  #show(entry) {
    if (entry.type === "gap") {
      this.#blocks.push({ stream: "gap" });
      this.#output.append(make("p", { class: "remark" }, describeGap(entry)));
      return;
    }
    let block = this.#blocks.at(-1);
    if (block?.stream !== entry.stream) {
      block = this.#makeBlock(entry.stream);
      this.#blocks.push(block);
    }
    block.view.write(readBytes(entry));
  }

  /** What somebody was asked is answered in the text; what is beside that is folded. */
  #makeBlock(stream) {
    const known = this.#blocks.findLast((x) => x.stream === stream);
    const view = known && this.#row.prompt !== null && stream === "stderr" ? known.view
      : new TextView(stream === "stderr" ? "errors" : "output");
    if (known?.view === view) return { stream, view };
    if (stream !== "stderr") this.#output.append(view.element);
    else if (this.#row.prompt !== null) {
      this.#output.append(
        make("details", { class: "aside" }, make("summary", {}, PROMPTED), view.element));
    } else {
      this.#output.append(
        make("div", { class: "stderr" }, make("span", { class: "label" }, "stderr"), view.element));
    }
    return { stream, view };
  }

  #say(text) {
    setText(this.#remark, text);
  }
}

/** Browsers have few connections to a host: at most `count` are in here at once. */
export class Slots {
  #free;
  #waiting = [];

  constructor(count) {
    this.#free = count;
  }

  /** Resolves to what gives the place back. `wait` is called where there is none. */
  async enter(signal, wait) {
    if (this.#free > 0) this.#free -= 1;
    else {
      wait();
      await new Promise((resolve) => this.#waiting.push(resolve));
    }
    let left = false;
    return () => {
      if (left) return;
      left = true;
      const next = this.#waiting.shift();
      if (next === undefined) this.#free += 1;
      else next();
    };
  }
}
