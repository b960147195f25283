// A terminal's text as pieces of styled text. What moves a cursor elsewhere is left out.

const PLAIN = Object.freeze({});
const FLAGS = { 1: "bold", 2: "dim", 3: "italic", 4: "underline", 7: "inverse", 9: "strike" };
const OFF = { 22: ["bold", "dim"], 23: ["italic"], 24: ["underline"], 27: ["inverse"],
  29: ["strike"] };
// Control sequences, strings (OSC, DCS and others) up to their end, and other escapes.
const ESCAPE =
  /\x1b\[([0-?]*)[ -/]*([@-~])|\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)|\x1b[ -/]*[0-OQ-WYZ\\`-~]/y;
const UNFINISHED = /^\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b\x9c]*\x1b?|[ -/]*)$/;
/** A string without an end is not waited for longer than this, in characters. */
const MOST_HELD = 4096;

/**
 * Feed it text as it comes: `feed` returns pieces `{text, style}`; `{newline: true}`;
 * `{restart: true}` where the line is written again from its beginning; `{erase: true}` where it is
 * erased. `style` has `bold` and so on, and `fg` and `bg`: a number to 255, or "#rrggbb".
 */
export class Ansi {
  #held = "";
  #style = PLAIN;

  feed(more) {
    const text = this.#held + more;
    this.#held = "";
    const pieces = [];
    let at = 0;
    while (at < text.length) {
      const code = text.charCodeAt(at);
      if (code === 27) {
        ESCAPE.lastIndex = at;
        const found = ESCAPE.exec(text);
        if (found === null) {
          const rest = text.slice(at);
          if (rest.length < MOST_HELD && UNFINISHED.test(rest)) {
            this.#held = rest;
            return pieces;
          }
          at += 1;
          continue;
        }
        at += found[0].length;
        if (found[2] === "m") this.#style = restyle(this.#style, found[1]);
        else if (found[2] === "K" && found[1] === "2") pieces.push({ erase: true });
      } else if (code === 10) {
        pieces.push({ newline: true });
        at += 1;
      } else if (code === 13) {
        if (at + 1 === text.length) {
          this.#held = "\r";
          return pieces;
        }
        if (text.charCodeAt(at + 1) !== 10) pieces.push({ restart: true });
        at += 1;
      } else {
        let end = at;
        while (end < text.length && !isControl(text.charCodeAt(end))) end += 1;
        if (end > at) pieces.push({ text: text.slice(at, end), style: this.#style });
        at = Math.max(end, at + (end === at ? 1 : 0));
      }
    }
    return pieces;
  }
}

function isControl(code) {
  return (code < 32 && code !== 9) || (code >= 127 && code < 160);
}

function restyle(style, parameters) {
  const codes = parameters.replaceAll(":", ";").split(";").map(Number);
  let made = { ...style };
  for (let n = 0; n < codes.length; n += 1) {
    const code = codes[n];
    if (code === 0) made = {};
    else if (code in FLAGS) made[FLAGS[code]] = true;
    else if (code in OFF) for (const name of OFF[code]) delete made[name];
    else if (code >= 30 && code <= 37) made.fg = code - 30;
    else if (code >= 90 && code <= 97) made.fg = code - 82;
    else if (code >= 40 && code <= 47) made.bg = code - 40;
    else if (code >= 100 && code <= 107) made.bg = code - 92;
    else if (code === 39) delete made.fg;
    else if (code === 49) delete made.bg;
    else if (code === 38 || code === 48) {
      const name = code === 38 ? "fg" : "bg";
      if (codes[n + 1] === 5 && codes[n + 2] <= 255) {
        made[name] = codes[n + 2];
        n += 2;
      } else if (codes[n + 1] === 2 && n + 4 < codes.length) {
        made[name] = makeHex(codes.slice(n + 2, n + 5));
        n += 4;
      } else break;
    }
  }
  return Object.freeze(made);
}

function makeHex(parts) {
  return `#${parts.map((x) => Math.min(255, x || 0).toString(16).padStart(2, "0")).join("")}`;
}

const STEPS = [0, 95, 135, 175, 215, 255];

/** "#rrggbb" of a colour; null of one of the first 16, which the style sheet has. */
export function findColour(colour) {
  if (typeof colour === "string") return colour;
  if (colour < 16) return null;
  if (colour >= 232) return makeHex(Array(3).fill(8 + 10 * (colour - 232)));
  const n = colour - 16;
  return makeHex([STEPS[Math.floor(n / 36)], STEPS[Math.floor(n / 6) % 6], STEPS[n % 6]]);
}
