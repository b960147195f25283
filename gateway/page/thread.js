// A thread's conversation: its runs, the first at the top, live.

import { keepFresh } from "./changes.js";
import { make, setText } from "./dom.js";
import { RunView, Slots } from "./run_view.js";

/** Runs of a page, and how many of those that are over are shown open at first. */
const PAGE = 20;
const OPEN = 3;
/** Streams at once: browsers have six connections to a host, and the lists need two. */
const STREAMS = 4;

/** Shows it in `main` until `signal`. `ask(row)` resolves to whether to abort a run. */
export function showThread(main, api, thread, { signal, tell, say, ask }) {
  const path = `/v1/threads/${encodeURIComponent(thread)}/runs`;
  const older = make("button", {}, "Show earlier runs");
  const list = make("div", { class: "runs" });
  const none = make("p", {}, "There is no run yet. It is shown here when it begins.");
  const slots = new Slots(STREAMS);
  const views = new Map();
  let wanted = PAGE;
  let stale = () => {};
  older.hidden = none.hidden = true;
  main.replaceChildren(make("h2", {}, thread), older, none, list);
  document.title = `${thread} · runctl`;

  async function abort(row) {
    if (!(await ask(row))) return;
    try {
      await api.post(`/v1/runs/${encodeURIComponent(row.run)}/abort`);
      say(`Run ${row.run} was aborted.`);
    } catch (error) {
      say(`It was not aborted: ${error.message}`);
      tell(false, error.message);
    }
  }

  const actions = { slots, abort, say, tell: () => {}, ended: () => stale() };

  async function refresh() {
    const { rows, more } = await readRuns(api, path, wanted, signal);
    none.hidden = rows.length > 0;
    older.hidden = !more;
    const first = views.size === 0;
    let at = list.firstElementChild;
    for (const [n, row] of rows.reverse().entries()) {
      let view = views.get(row.run);
      if (view === undefined) {
        view = new RunView(api, row, actions);
        views.set(row.run, view);
        view.element.open = view.live || (first && n >= rows.length - OPEN);
      } else view.update(row);
      if (view.element === at) at = at.nextElementSibling;
      else list.insertBefore(view.element, at);
    }
  }

  older.addEventListener("click", () => { wanted += PAGE; refresh().catch(() => {}); });
  signal.addEventListener("abort", () => views.forEach((view) => view.close()));
  stale = () => setTimeout(() => { if (!signal.aborted) refresh().catch(() => {}); }, 500);
  keepFresh(api, { signal, refresh, tell });
}

/** The latest `wanted` runs, the latest first; whether there are `more`. */
async function readRuns(api, path, wanted, signal) {
  try {
    const response = await api.request(`${path}?limit=${Math.min(wanted, 500)}`, { signal });
    return { rows: await response.json(), more: response.headers.has("Link") && wanted < 500 };
  } catch (error) {
    if (error.status === 404) return { rows: [], more: false };
    throw error;
  }
}
