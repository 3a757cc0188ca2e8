// What events mean, in words: recoveries above all, and what happens to ranks. Pure.
//
// A telling is {tone, title, parts}: tones are "bad", "warn", "good", "plain"; `parts` are [label, text, tone] triples.

import { clean, context as contextWords, count, duration, many, ranks, size, union } from "./format.js";

const NOUNS = {
  online: ["good", (r) => `${r} came online`],
  offline: ["warn", (r) => `${r} went offline`],
  torpid: ["warn", (r) => `${r} fell silent (torpid)`],
  lively: ["good", (r) => `${r} spoke again`],
  drain: ["warn", (r) => `${r} drained`],
  undrain: ["good", (r) => `${r} undrained`],
  lost: ["bad", (r) => `${r} lost`],
};

const TOGETHER = 10; // seconds in which the same happens to several ranks
const GATHERED = new Set(["online", "offline", "torpid", "lively", "resource-define"]);

/**
 * [key, event] pairs, oldest first, with what happened to many ranks at about one time as one event, where it was first.
 * Nothing is gathered across an event of another kind than GATHERED.
 */
export function gather(events) {
  const found = [];
  let open = new Map();
  for (const [key, event] of events) {
    const group = open.get(event.name);
    if (!GATHERED.has(event.name)) open = new Map();
    else if (group !== undefined && event.t - group[1].t < TOGETHER) {
      const { context } = group[1];
      group[1] = { ...group[1], context: { ...context, idset: union(context?.idset, event.context?.idset) } };
      continue;
    }
    const pair = [key, event];
    found.push(pair);
    if (GATHERED.has(event.name)) open.set(event.name, pair);
  }
  return found;
}

/** A telling of one event of the instance. */
export function tell(event) {
  const { name, context = {} } = event;
  if (name === "recovery") return recovery(context);
  const known = NOUNS[name];
  const who = ranks(context.idset ?? context.ranks);
  if (known !== undefined && who) {
    const why = context.reason ?? context.why;
    return { tone: known[0], title: known[1](who), parts: why ? [["", clean(why), "plain"]] : [] };
  }
  if (name === "restart") {
    const online = ranks(context.online);
    return { tone: "warn", title: "rank 0 started anew", parts: online ? [["online", online, "plain"]] : [] };
  }
  if (name === "resource-define") {
    return { tone: "plain", title: `resources of ${who || "all ranks"} were defined`, parts: [] };
  }
  return { tone: "plain", title: clean(name, 60), parts: rest(context) };
}

const rest = (context) => {
  const text = contextWords(context);
  return text ? [["", text, "plain"]] : [];
};

/** A telling of a recovery that is over, or, without `seconds`, of one under way (`now`: for how long). */
export function recovery(doc, now) {
  const over = doc.seconds !== undefined && doc.seconds !== null;
  const parts = [...whoParts(doc)];
  parts.push(over ? ["took", duration(doc.seconds), "plain"] : ["so far", duration(now - doc.began), "plain"]);
  parts.push(...awayParts(doc));
  parts.push(...jobParts(doc, over));
  if (doc.why) parts.push(["why", clean(doc.why), "plain"]);
  const givenUp = over && size(doc.restarted) + size(doc.panicked) === 0; // nothing came back until its limit
  const whole = over && !givenUp && !size(doc.away) && !doc.detached;
  const title = `${givenUp ? "Given up:" : over ? "Recovered:" : "Recovering:"} ${ranks(doc.ranks) || "no ranks"}`;
  return { tone: doc.lost > 0 ? "bad" : whole ? "good" : "warn", title, parts };
}

function whoParts(doc) {
  const parts = [];
  const [restarted, panicked] = [ranks(doc.restarted), ranks(doc.panicked)];
  const processes = (idset) => (size(idset) === 1 ? "process" : "processes");
  if (restarted) parts.push(["restarted", `${restarted} (new ${processes(doc.restarted)})`, "plain"]);
  if (panicked) parts.push(["panicked, rejoined", `${panicked} (same ${processes(doc.panicked)})`, "plain"]);
  return parts;
}

/** What is not back yet; of a recovery that is over: what it was ended without. */
function awayParts(doc) {
  const parts = [];
  const away = ranks(doc.away);
  if (away) parts.push(["still away", away, "warn"]);
  if (doc.detached > 0) parts.push(["detached", `${many(doc.detached, "shell")} running with no broker`, "warn"]);
  return parts;
}

function jobParts(doc, over) {
  const { running = 0, rediscovered = 0, finished = 0, lost = 0, pending = 0 } = doc;
  const parts = [];
  if (running > 0 || rediscovered > 0) {
    const all = rediscovered === running;
    const tone = all ? "good" : rediscovered + finished < running ? "warn" : "plain";
    const of = `${all ? (running === 1 ? "the" : "all") : `${count(rediscovered)} of`} ${many(running, "job")}`;
    parts.push(["rediscovered", of, over ? tone : "plain"]);
  }
  if (finished > 0) parts.push(["finished meanwhile", many(finished, "job"), "plain"]);
  if (pending > 0) parts.push(["waited", many(pending, "pending job"), "plain"]);
  if (lost > 0) parts.push(["lost", many(lost, "job"), "bad"]);
  else if (over) parts.push(["lost", "none", "good"]);
  return parts;
}
