// Which view is shown, where the focus goes, and what is said to everybody.

import { Api } from "./api.js";
import { showBoard } from "./board.js";
import { setText } from "./dom.js";
import { showThread } from "./thread.js";

const find = (id) => document.getElementById(id);
const main = find("main");
let shown = null;

const api = new Api(async (problem) => {
  const dialog = find("ask-token");
  const input = find("token");
  setText(find("token-problem"), `${problem}. The token is kept until this tab is closed.`);
  do {
    input.value = "";
    if (!dialog.open) dialog.showModal();
    await closing(dialog);
  } while (input.value === "");
  const token = input.value.trim();
  input.value = "";
  return token;
});

function closing(dialog) {
  return new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
}

async function askAbort(row) {
  const dialog = find("ask-abort");
  setText(find("abort-what"), row.command ?? row.prompt ?? row.run);
  dialog.returnValue = "";
  dialog.showModal();
  await closing(dialog);
  return dialog.returnValue === "abort";
}

function tell(up, why) {
  const state = find("state");
  state.classList.toggle("waiting", !up);
  setText(state, up ? "Live." : `Waiting: ${why}. It goes on by itself.`);
}

function say(text) {
  setText(find("told"), text);
}

function show() {
  shown?.abort();
  const moved = shown !== null;
  shown = new AbortController();
  const { signal } = shown;
  const named = /^#\/thread\/(.+)$/.exec(location.hash);
  const ours = (up, why) => { if (!signal.aborted) tell(up, why); };
  try {
    if (named === null) showBoard(main, api, { signal, tell: ours });
    else {
      const thread = decodeURIComponent(named[1]);
      showThread(main, api, thread, { signal, tell: ours, say, ask: askAbort });
    }
  } catch (error) {
    if (!(error instanceof URIError)) throw error;
    location.hash = "#/";
  }
  if (moved) main.focus();
}

find("open").addEventListener("submit", (event) => {
  event.preventDefault();
  const thread = find("thread").value;
  if (thread.trim() !== "") location.hash = `#/thread/${encodeURIComponent(thread)}`;
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the view
  main.focus();
});
window.addEventListener("hashchange", show);
show();
