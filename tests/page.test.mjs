// The page's logic: colours, what of a run's events is valid, frames that come in pieces.
import assert from "node:assert/strict";
import { test } from "node:test";
import { Ansi, findColour } from "../gateway/page/ansi.js";
import { RunEvents, readBytes } from "../gateway/page/events.js";
import { EventParser } from "../gateway/page/sse.js";

function paint(...parts) {
  const ansi = new Ansi();
  return parts.flatMap((part) => ansi.feed(part)).map((x) => ({ ...x }));
}

test("colours, however the text is cut", () => {
  const text = "a\x1b[1;31mb\x1b[38;5;196mc\x1b[48;2;1;2;3md\x1b[0me\x1b]0;title\x07f\x1b[2Jg\r\nh";
  const join = (pieces) => pieces.reduce((all, x) => {
    const last = all.at(-1);
    if (x.text && last?.text && JSON.stringify(last.style) === JSON.stringify(x.style)) {
      last.text += x.text;
    } else all.push({ ...x });
    return all;
  }, []);
  const whole = join(paint(text));
  assert.deepEqual(whole, [
    { text: "a", style: {} }, { text: "b", style: { bold: true, fg: 1 } },
    { text: "c", style: { bold: true, fg: 196 } },
    { text: "d", style: { bold: true, fg: 196, bg: "#010203" } },
    { text: "efg", style: {} }, { newline: true }, { text: "h", style: {} },
  ]);
  for (let at = 1; at < text.length; at += 1) {
    assert.deepEqual(join(paint(text.slice(0, at), text.slice(at))), whole, `cut at ${at}`);
  }
  assert.deepEqual(join(paint(...text)), whole);
});

test("a line that is written again, and controls that are left out", () => {
  assert.deepEqual(paint("1%\r2%\x1b[2K\x00\x9b\x07"), [
    { text: "1%", style: {} }, { restart: true }, { text: "2%", style: {} }, { erase: true },
  ]);
  assert.equal(paint(`\x1b]${"x".repeat(5000)}`).length > 0, true);
  assert.equal(findColour(196), "#ff0000");
  assert.equal(findColour(255), "#eeeeee");
  assert.equal(findColour(3), null);
});

const chunk = (attempt, seq) => ({ type: "chunk", attempt, seq, stream: "stdout", data: `${seq}` });

test("each valid chunk once", () => {
  const run = new RunEvents();
  assert.equal(run.take({ type: "reset", attempt: 1 }, "1.0"), "nothing");
  for (const seq of [1, 2, 3]) assert.equal(run.take(chunk(1, seq), `1.${seq}`), "append");
  assert.equal(run.take(chunk(1, 3), "1.3"), "nothing");
  assert.equal(run.take({ type: "continue", attempt: 2, after: 2 }, "2.2"), "replace");
  assert.deepEqual(run.entries.map((x) => x.seq), [1, 2]);
  assert.equal(run.take(chunk(1, 4), ""), "nothing");
  assert.equal(run.take(chunk(2, 3), "2.3"), "append");
  assert.equal(run.take({ type: "gap", from: 4, to: 6 }), "append");
  assert.equal(run.take(chunk(2, 7), "2.7"), "append");
  assert.equal(run.last, "2.7");
  assert.equal(run.take({ type: "reset", attempt: 3 }, "3.0"), "replace");
  assert.deepEqual(run.entries, []);
  assert.equal(run.take({ type: "end", attempt: 3, status: "succeeded" }, "3.end"), "end");
  assert.equal(run.take({ type: "new" }), "nothing");
});

test("bytes that are not UTF-8", () => {
  assert.deepEqual([...readBytes({ data: "Yf8=", encoding: "base64" })], [97, 255]);
});

test("frames, however they are cut", () => {
  const text = ':\n\nid: 1.1\nevent: chunk\ndata: {"a": "b: c"}\n\nretry: 500\n\nid: 1.2\ndata: x';
  const wanted = [{ id: "1.1", event: "chunk", data: '{"a": "b: c"}' }, { retry: 500 }];
  for (let at = 0; at <= text.length; at += 1) {
    const parser = new EventParser();
    assert.deepEqual([...parser.feed(text.slice(0, at)), ...parser.feed(text.slice(at))], wanted);
  }
});
