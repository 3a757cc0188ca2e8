// A job's output eventlog (RFC 24) as lines that can be shown, a bounded number of them. Pure.
//
// A line is {stream, task, text, open}; `stream` is "stdout", "stderr" or "note" (what the shell says). `open` lines are
// not finished: more of them may come. Escape sequences of terminals are taken out, of a line that was written over
// (carriage return) its last text is shown. `take` tells which lines are new and which have changed.

import { clean } from "./format.js";

export const MAX_LINES = 5000; // kept of one job's output; the oldest are dropped first
export const MAX_LINE = 4096; // characters; a longer line is cut into several
const ESCAPES = /\u001b(?:\[[0-?]*[ -/]*[@-~]|\][^\u0007\u001b]*(?:\u0007|\u001b\\)?|[@-Z\\-_])/g;

export class OutputLines {
  constructor() {
    this.lines = [];
    this.dropped = 0;
    this.open = new Map(); // "stream task" -> its unfinished line
    this.decoders = new Map();
    this.tasks = new Set();
  }

  /** Take events; returns the lines that are new, and those that were there and have changed. */
  take(events) {
    this.fresh = [];
    this.changed = new Set();
    for (const event of events) this.event(event);
    const excess = this.lines.length - MAX_LINES;
    if (excess > 0) {
      this.lines.splice(0, excess);
      this.dropped += excess;
    }
    const fresh = new Set(this.fresh);
    return { fresh: this.fresh, changed: [...this.changed].filter((line) => !fresh.has(line)), dropped: this.dropped };
  }

  event({ name, context = {} }) {
    const task = clean(context.rank ?? "", 40);
    if (name === "data") this.data(context, task);
    else if (name === "redirect") {
      this.note(task, `${clean(context.stream, 20)} goes to ${clean(context.path ?? "another place")}`);
    } else if (name === "log") this.note(task, clean(`${context.component ?? "shell"}: ${context.message ?? ""}`, MAX_LINE));
  }

  data(context, task) {
    const stream = context.stream === "stderr" ? "stderr" : "stdout";
    const key = `${stream} ${task}`;
    this.tasks.add(task);
    let text = typeof context.data === "string" ? context.data : "";
    if (context.encoding === "base64") text = this.decode(key, text);
    const pieces = text.split("\n");
    pieces.forEach((piece, index) => {
      if (piece !== "") this.append(key, stream, task, piece);
      if (index < pieces.length - 1) this.finish(key, stream, task);
    });
    if (context.eof && this.open.has(key)) this.finish(key, stream, task);
  }

  append(key, stream, task, piece) {
    for (let rest = piece; rest !== ""; ) {
      const line = this.open.get(key) ?? this.begin(key, stream, task);
      const room = MAX_LINE - line.raw.length;
      line.raw += rest.slice(0, room);
      line.text = shown(line.raw);
      this.changed.add(line);
      rest = rest.slice(room);
      if (line.raw.length >= MAX_LINE) this.finish(key, stream, task);
    }
  }

  begin(key, stream, task) {
    const line = { stream, task, raw: "", text: "", open: true };
    this.open.set(key, line);
    this.lines.push(line);
    this.fresh.push(line);
    return line;
  }

  finish(key, stream, task) {
    const line = this.open.get(key) ?? this.begin(key, stream, task);
    line.open = false;
    line.raw = "";
    this.changed.add(line);
    this.open.delete(key);
  }

  note(task, text) {
    const line = { stream: "note", task, raw: "", text, open: false };
    this.lines.push(line);
    this.fresh.push(line);
  }

  decode(key, text) {
    if (!this.decoders.has(key)) this.decoders.set(key, new TextDecoder());
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    return this.decoders.get(key).decode(bytes, { stream: true });
  }
}

/** The text of a line as a terminal would leave it, as far as one line goes. */
export function shown(raw) {
  const plain = raw.replace(ESCAPES, "").replace(/\r+$/, "");
  const last = plain.slice(plain.lastIndexOf("\r") + 1);
  return last.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "\ufffd");
}
