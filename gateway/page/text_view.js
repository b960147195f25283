// A stream of a terminal's text as elements: lines, coloured, and only so many of them.

import { Ansi, findColour } from "./ansi.js";
import { make } from "./dom.js";

/** More lines than this are not kept: the first ones go. */
const MOST_LINES = 5000;

export class TextView {
  element = make("pre", { tabindex: "0" });
  #ansi = new Ansi();
  #decoder = new TextDecoder();
  #line = null;
  #restart = false;
  #dropped = 0;
  #note = null;

  constructor(label) {
    this.element.setAttribute("aria-label", label);
    this.element.setAttribute("role", "group");
  }

  /** Bytes of the stream, which may end within a character. */
  write(bytes) {
    for (const piece of this.#ansi.feed(this.#decoder.decode(bytes, { stream: true }))) {
      if (piece.newline) {
        this.#open().append("\n");
        this.#line = null;
        this.#restart = false;
      } else if (piece.restart) this.#restart = true;
      else if (piece.erase) this.#open().replaceChildren();
      else this.#put(piece);
    }
    this.#bound();
  }

  get text() {
    return this.element.textContent;
  }

  #put({ text, style }) {
    const line = this.#open();
    if (this.#restart) {
      line.replaceChildren();
      this.#restart = false;
    }
    if (Object.keys(style).length === 0) line.append(text);
    else line.append(dress(text, style));
  }

  #open() {
    if (this.#line === null) {
      this.#line = make("span", { class: "line" });
      this.element.append(this.#line);
    }
    return this.#line;
  }

  #bound() {
    const first = this.#note === null ? 0 : 1;
    while (this.element.childElementCount - first > MOST_LINES) {
      this.element.children[first].remove();
      this.#dropped += 1;
    }
    if (this.#dropped > 0) {
      if (this.#note === null) {
        this.#note = make("span", { class: "remark" });
        this.element.prepend(this.#note);
      }
      this.#note.textContent = `(${this.#dropped} lines before this are not shown)\n`;
    }
  }
}

function dress(text, style) {
  const flags = ["bold", "dim", "italic", "underline", "strike"].filter((name) => style[name]);
  const [fg, bg] = style.inverse ? [style.bg ?? "back", style.fg ?? "front"]
    : [style.fg, style.bg];
  const span = make("span", {}, text);
  span.classList.add("styled", ...flags);
  paint(span, "fg", fg);
  paint(span, "bg", bg);
  return span;
}

function paint(span, place, colour) {
  if (colour === undefined) return;
  const exact = typeof colour === "string" && !colour.startsWith("#") ? null : findColour(colour);
  if (exact === null) span.classList.add(`${place}-${colour}`);
  else span.style.setProperty(place === "fg" ? "color" : "background-color", exact);
}
