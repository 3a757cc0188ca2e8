// A job's eventlogs as a timeline: its phases (RFC 21) and all its events in the order of their time. Pure.

import { clean, context as contextWords, ranks } from "./format.js";

export const MAX_EVENTS = 2000; // of one job that are kept; the oldest are dropped first
const NEXT = {
  submit: "DEPEND", validate: "DEPEND", depend: "PRIORITY", priority: "SCHED", alloc: "RUN", finish: "CLEANUP",
  clean: "INACTIVE",
};
const ORDER = ["DEPEND", "PRIORITY", "SCHED", "RUN", "CLEANUP", "INACTIVE"];
const CALLED = {
  DEPEND: "dependencies", PRIORITY: "priority", SCHED: "waiting", RUN: "running", CLEANUP: "cleaning up",
};
const STEPS = new Set(["start", "alloc", "clean", "shell.start"]);

/** The phases that a main eventlog tells: [{state, called, begin, end}], the last one without an end where it goes on. */
export function phases(events) {
  const found = [];
  const enter = (state, time) => {
    const last = found.at(-1);
    if (last !== undefined && ORDER.indexOf(state) <= ORDER.indexOf(last.state)) return;
    if (last !== undefined) last.end = time;
    found.push({ state, called: CALLED[state] ?? "ended", begin: time, end: null });
  };
  for (const event of events) {
    if (event.name === "exception" && event.context?.severity === 0) enter("CLEANUP", event.timestamp);
    else if (NEXT[event.name] !== undefined) enter(NEXT[event.name], event.timestamp);
  }
  return found.filter(({ state }) => state !== "INACTIVE");
}

/** Both eventlogs as one list of {lane, event}, by time; of equal times the main eventlog's come first. */
export function merge(main, exec) {
  const all = [...main.map((event) => ({ lane: "main", event })), ...exec.map((event) => ({ lane: "exec", event }))];
  return all.sort((a, b) => a.event.timestamp - b.event.timestamp);
}

/** How an event is shown: {tone, text}. */
export function describe(event) {
  const context = event.context ?? {};
  switch (event.name) {
    case "exception": {
      const fatal = context.severity === 0;
      const note = context.note ? `: ${clean(context.note)}` : "";
      return { tone: fatal ? "bad" : "warn", text: `${clean(context.type, 60)}${note} (severity ${context.severity})` };
    }
    case "finish":
    case "complete":
      return { tone: context.status === 0 ? "good" : "bad", text: waitWords(context.status) };
    case "flux-restart":
      return { tone: "warn", text: "rank 0 started anew and took the job up again" };
    case "release":
      return { tone: "plain", text: `${ranks(context.ranks) || clean(context.ranks)}${context.final ? ", the last" : ""}` };
    default:
      return { tone: STEPS.has(event.name) ? "step" : "plain", text: contextWords(context) };
  }
}

/** A wait status in words. */
export function waitWords(status) {
  if (!Number.isInteger(status)) return clean(status);
  const signal = status & 0x7f;
  return signal !== 0 ? `killed by signal ${signal}` : `exit code ${status >> 8}`;
}
