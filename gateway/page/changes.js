// Says when lists may be out of date: at once as the gateway tells, and now and then anyway.

import { follow, sleep } from "./sse.js";

/** A run's end is in its output a moment before it is in the lists. */
const SETTLE = 1000;
/** Also where nothing was told: ages, and what a daemon did that was away. */
const ANYWAY = 10_000;

/** Calls `refresh()` until `signal`, one call at a time; `tell(up, why)` says how it went. */
export async function keepFresh(api, { signal, refresh, tell }) {
  let due = true;
  let wake = () => {};
  const soon = () => { due = true; wake(); };
  follow(api, "/v1/changes", {
    signal,
    getLast: () => "",
    take: () => { soon(); setTimeout(soon, SETTLE); return false; },
    tell: (up) => { if (up) soon(); },
  }).catch(() => {}); // the lists are asked for now and then
  while (!signal.aborted) {
    due = false;
    let pause = ANYWAY;
    try {
      await refresh(signal);
      tell(true);
    } catch (error) {
      if (signal.aborted) return;
      tell(false, error.status === undefined ? "the gateway does not answer" : error.message);
      pause = 1000;
    }
    await sleep(250, signal);
    if (!due && !signal.aborted) {
      const woken = new AbortController();
      wake = () => woken.abort();
      await sleep(pause, AbortSignal.any([signal, woken.signal]));
    }
  }
}
