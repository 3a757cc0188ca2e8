// Jobs as lists that people read: running, queued, ended; filtered, ordered, cut; and how far a job is. Pure.

import { clean, has } from "./format.js";

export const GROUPS = ["running", "queued", "ended"];
const STATE_GROUP = {
  DEPEND: "queued", PRIORITY: "queued", SCHED: "queued", RUN: "running", CLEANUP: "running", INACTIVE: "ended",
};
const WAITS = { DEPEND: "for dependencies", PRIORITY: "for its priority", SCHED: "for resources" };
const SOON = 0.9; // of the time limit: from here on it is shown as nearly over

const byNumber = (key) => (a, b) => (b[key] ?? 0) - (a[key] ?? 0);
const byId = (a, b) => a.dec.length - b.dec.length || (a.dec < b.dec ? -1 : 1);
const ORDER = {
  running: (a, b) => byNumber("t_run")(a, b) || byId(b, a),
  queued: (a, b) => byNumber("priority")(a, b) || byId(a, b),
  ended: (a, b) => byNumber("t_inactive")(a, b) || byId(b, a),
};

/** All jobs by group, each in the order in which it is read. */
export function groups(jobs) {
  const found = { running: [], queued: [], ended: [] };
  for (const job of jobs.values()) found[STATE_GROUP[job.state] ?? "queued"].push(job);
  for (const name of GROUPS) found[name].sort(ORDER[name]);
  return found;
}

const words = new WeakMap(); // the text of a document that a filter looks at; documents are never changed

function text(job) {
  let found = words.get(job);
  if (found === undefined) {
    const { id, dec, name, username, userid, state, result, queue, nodelist, exception_type: type } = job;
    const parts = [id, dec, name, username, userid, state, result, queue, nodelist, type];
    found = parts.filter((part) => part !== undefined && part !== null).join(" ").toLowerCase();
    words.set(job, found);
  }
  return found;
}

/** The jobs that have each word of `filter`; "rank:3" is a word for those that have that rank. */
export function select(jobs, filter) {
  const wanted = filter.toLowerCase().split(/\s+/).filter((word) => word !== "");
  if (wanted.length === 0) return jobs;
  const match = (job, word) => {
    const rank = /^rank:(\d+)$/.exec(word);
    return rank ? has(job.ranks, Number(rank[1])) : text(job).includes(word);
  };
  return jobs.filter((job) => wanted.every((word) => match(job, word)));
}

/** How far a running job is at `now`: {elapsed, limit, left, part, soon}; no limit: `limit` is null. */
export function progress(job, now) {
  const start = job.t_run;
  const elapsed = Number.isFinite(start) ? Math.max(0, (job.t_cleanup ?? now) - start) : null;
  let limit = job.duration > 0 ? job.duration : null;
  // It counts from a moment before the start.
  if (job.expiration > 0 && Number.isFinite(start)) limit = Math.max(limit ?? 0, job.expiration - start);
  if (limit === null || elapsed === null) return { elapsed, limit: null, left: null, part: null, soon: false };
  const part = Math.min(1, elapsed / Math.max(limit, 0.001));
  return { elapsed, limit, left: Math.max(0, limit - elapsed), part, soon: part >= SOON };
}

/** Why a job does not run yet. */
export function waiting(job) {
  const known = job.dependencies?.length > 0 ? `for ${job.dependencies.map((each) => clean(each, 60)).join(", ")}` : null;
  const reason = job.annotations?.sched?.reason_pending ?? job.annotations?.sched?.reason;
  if (job.state === "DEPEND" && known) return known;
  if (job.urgency === 0 || job.priority === 0) return "held";
  return reason ? clean(reason, 80) : WAITS[job.state] ?? "";
}

/** How a job has ended: {kind, words}; kinds are "completed", "failed", "canceled", "timeout". */
export function outcome(job) {
  const kind = (job.result ?? "").toLowerCase();
  if (kind !== "failed") return { kind: kind || "ended", words: kind || "ended" };
  const code = job.returncode;
  if (code === undefined || code === null) return { kind, words: "failed" };
  // As shells have it: 128 and a number is a signal.
  return { kind, words: code > 128 ? `failed, signal ${code - 128}` : `failed, exit ${code}` };
}

/** Where a job runs: its hosts, each named once. */
export function hosts(nodelist) {
  if (!nodelist || nodelist.includes("[")) return nodelist ?? "";
  return [...new Set(nodelist.split(","))].join(",");
}

/** What a job has or wants: "2 nodes · 8 cores". */
export function extent(job) {
  const part = (number, one) => (number > 0 ? `${number} ${number === 1 ? one : `${one}s`}` : null);
  const parts = [part(job.nnodes, "node"), part(job.ncores, "core")];
  if (!parts[0] && !parts[1]) parts.push(part(job.ntasks, "task"));
  return parts.filter(Boolean).join(" · ") || "–";
}
