// Elements, made without HTML: whatever a run wrote is text.

/** An element `name` with `attributes` (`class`, `href`, ...) and children, strings or nodes. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const GLYPHS = {
  queued: "○", running: "▶", succeeded: "✓", failed: "✗", aborted: "■", dead: "✝",
};

/** A status as a glyph and a word: colour is never alone. */
export function makeStatus(status) {
  const glyph = make("span", { "aria-hidden": "true" }, GLYPHS[status] ?? "·");
  return make("span", { class: `status ${status in GLYPHS ? status : ""}` }, glyph, ` ${status}`);
}

/** How long ago an RFC 3339 time was, in one unit. */
export function describeAge(stamp, now = Date.now()) {
  const seconds = Math.max(0, Math.round((now - Date.parse(stamp)) / 1000));
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

/** Sets `text` where it is another one: screen readers hear of each change. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
