// What is known of the instance: documents by topic and key, made of a snapshot and the deltas after it. Pure.
//
// The messages are those of docs/status-messages.md. A delta applies to exactly the position it names; anything else is
// a gap, and the answer to that is a new snapshot. Documents are replaced, never changed, so a copy of a topic's map
// is a picture of that moment.

const EMPTY = new Map();

/** The documents of one subscription, the position they are of, and a version of each topic that grows as it changes. */
export class Picture {
  constructor() {
    this.topics = new Map();
    this.versions = {};
    this.position = null;
    this.why = null;
    this.parts = null;
  }

  /** The documents of a topic: a Map from key to document. */
  docs(topic) {
    return this.topics.get(topic) ?? EMPTY;
  }

  /** One document, or undefined. */
  doc(topic, key) {
    return this.docs(topic).get(key);
  }

  /** How often a topic has changed so far. */
  version(topic) {
    return this.versions[topic] ?? 0;
  }

  /** Take a part of a snapshot; true with its last one, when it replaces all there was. */
  snapshot(message) {
    if (message.part === 0) this.parts = new Map();
    else if (this.parts === null) return false; // of one that was interrupted
    for (const [topic, docs] of Object.entries(message.docs)) {
      const known = this.parts.get(topic) ?? new Map();
      for (const [key, doc] of Object.entries(docs)) known.set(key, doc);
      this.parts.set(topic, known);
    }
    if (message.more) return false;
    for (const topic of new Set([...this.topics.keys(), ...this.parts.keys()])) this.touch(topic);
    this.topics = this.parts;
    this.parts = null;
    this.position = message.position;
    this.why = message.why;
    return true;
  }

  /**
   * Take a delta, or a part of one; false where it does not apply to this picture. The position of all parts but the last
   * is still the one before: where the rest does not come, it is told again from there, and what is here is told twice.
   */
  delta(message) {
    const [epoch, seq] = this.position ?? [null, null];
    if (this.parts !== null || epoch !== message.position[0] || seq !== message.prev) return false;
    for (const [topic, keys] of Object.entries(message.delete ?? {})) {
      for (const key of keys) this.changing(topic).delete(key);
    }
    for (const [topic, docs] of Object.entries(message.set ?? {})) {
      for (const [key, doc] of Object.entries(docs)) this.changing(topic).set(key, doc);
    }
    this.position = message.position;
    return true;
  }

  /** Forget what came of a snapshot that was cut off. */
  interrupted() {
    this.parts = null;
  }

  /** What `digest` needs of this moment; `news` is when the broker said the last of it, by its clock. */
  memory(news) {
    return {
      news,
      jobs: new Map(this.docs("jobs")),
      about: this.doc("instance", "about"),
      lastEvent: newest([...this.docs("events").keys()]),
    };
  }

  touch(topic) {
    this.versions[topic] = this.version(topic) + 1;
  }

  changing(topic) {
    this.touch(topic);
    if (!this.topics.has(topic)) this.topics.set(topic, new Map());
    return this.topics.get(topic);
  }
}

/** Compare keys of the topic `events`, "SEQ.INDEX", as the pairs of numbers that they are. */
export function byEventKey(one, other) {
  const [a, b] = [one.split("."), other.split(".")];
  return a[0] - b[0] || (a[1] ?? 0) - (b[1] ?? 0);
}

const newest = (keys) => keys.reduce((last, key) => (last === null || byEventKey(key, last) > 0 ? key : last), null);

/** The events after `key` (all of them after null), oldest first: [key, event] pairs. */
export function eventsAfter(events, key) {
  return [...events].filter(([at]) => key === null || byEventKey(at, key) > 0).sort(([a], [b]) => byEventKey(a, b));
}

/** What became of jobs between a memory and now: how many ended, how, are new, go on, and are gone without a word. */
export function digest(before, picture) {
  const jobs = picture.docs("jobs");
  const found = { submitted: 0, ended: 0, failed: 0, running: 0, unlisted: 0 };
  for (const [key, was] of before.jobs) {
    const is = jobs.get(key);
    if (was.state === "INACTIVE") continue;
    // Only so many inactive jobs are listed: one that is not has ended and has been pushed out by later ones.
    if (is === undefined) found.unlisted += 1;
    else if (is.state === "INACTIVE") {
      found.ended += 1;
      if (is.result !== "COMPLETED") found.failed += 1;
    } else if (was.state === "RUN" && is.state === "RUN") found.running += 1;
  }
  // What is not known is new only by its time: a broker that begins anew may list other inactive jobs than it did.
  for (const [key, job] of jobs) if (!before.jobs.has(key) && job.t_submit > before.news) found.submitted += 1;
  const about = picture.doc("instance", "about");
  const renewed = before.about !== undefined && about !== undefined && before.about.uuid !== about.uuid;
  return { ...found, renewed, incarnations: about?.incarnations };
}

/**
 * An absence that is over, from `memory.lostAt` to `backAt`, together with `before`, the one (or null) that the reader has
 * not dismissed yet: `away` is for how long there was no news, without the time between, `found` since the first loss.
 */
export function absence(before, memory, picture, backAt, why) {
  const first = before ?? { before: memory, lostAt: memory.lostAt, away: 0, times: 0 };
  return {
    before: first.before,
    lostAt: first.lostAt,
    backAt,
    away: first.away + Math.max(0, backAt - memory.lostAt),
    times: first.times + 1,
    why: first.why === "behind" ? first.why : why, // what is not known will not be
    found: digest(first.before, picture),
    after: first.before.lastEvent,
  };
}
