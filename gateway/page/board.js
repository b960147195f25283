// All threads: what is running, what waits, and what was last.

import { keepFresh } from "./changes.js";
import { make, makeStatus, describeAge, setText } from "./dom.js";

const COLUMNS = ["Thread", "Status", "Work", "Age", "Waiting", "Where"];

/** Shows it in `main` until `signal`. */
export function showBoard(main, api, { signal, tell }) {
  const body = make("tbody");
  const head = make("tr", {}, ...COLUMNS.map((name) => make("th", { scope: "col" }, name)));
  const none = make("p", {}, "There is no thread yet. ", make("code", {}, "runctl submit"),
    " makes one.");
  const table = make("table", {}, make("caption", {}, "Threads"), make("thead", {}, head), body);
  const rows = new Map();
  none.hidden = true;
  main.replaceChildren(make("h2", {}, "Threads"), none, table);
  document.title = "runctl";

  async function refresh() {
    const found = await api.get("/v1/threads?limit=200", signal);
    const order = { running: 0, queued: 1 };
    found.sort((a, b) => (order[a.status] ?? 2) - (order[b.status] ?? 2));
    none.hidden = found.length > 0;
    table.hidden = found.length === 0;
    const names = new Set(found.map((thread) => thread.thread));
    for (const [name, row] of rows) if (!names.has(name)) { row.element.remove(); rows.delete(name); }
    let at = body.firstElementChild;
    for (const thread of found) {
      if (!rows.has(thread.thread)) rows.set(thread.thread, new Row(thread.thread));
      const row = rows.get(thread.thread);
      row.update(thread);
      // A row that is in its place is not moved: it may have the focus.
      if (row.element === at) at = at.nextElementSibling;
      else body.insertBefore(row.element, at);
    }
  }

  keepFresh(api, { signal, refresh, tell });
}

class Row {
  element = make("tr");
  #status = "";
  #cells = COLUMNS.slice(1).map((name) => make("td", { "data-name": name }));

  constructor(thread) {
    const link = make("a", { href: `#/thread/${encodeURIComponent(thread)}` }, thread);
    this.element.append(make("th", { scope: "row" }, link), ...this.#cells);
  }

  update({ run, queued }) {
    const [status, work, age, waiting, where] = this.#cells;
    if (this.#status !== run.status) status.replaceChildren(makeStatus(run.status));
    this.#status = run.status;
    const what = run.command ?? run.prompt ?? "";
    setText(work, run.status_text ? `${run.status_text} (${what})` : what);
    setText(age, describeAge(run.ended_at ?? run.started_at ?? run.created_at));
    setText(waiting, queued > 0 ? `${queued}` : "");
    setText(where, run.executor ?? "");
  }
}
