// Words for values: times, durations, sets of ranks, text that others wrote. Pure.
//
// Times are seconds since 1970, durations seconds. Sets of ranks are idsets of RFC 22 as text ("0-3,7"), kept as ranges,
// so that a large one costs no more than a small one.

export const MAX_TEXT = 300; // characters of a text by others that are shown
const MINUTE = 60;
const HOUR = 3600;
const DAY = 86400;

// Control characters, and those that turn the direction of text around: neither is let through.
const UNSAFE = /[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;

/** A text by others, safe to show on one line, at most `limit` characters long. */
export function clean(text, limit = MAX_TEXT) {
  const shown = String(text ?? "").slice(0, limit + 1).replace(UNSAFE, "\ufffd");
  return shown.length > limit ? `${shown.slice(0, limit)}…` : shown;
}

/** The name of an instance: an id that was drawn by its first eight characters, which people can tell apart. */
export function instanceName(name) {
  return /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/.test(name ?? "") ? name.slice(0, 8) : clean(name, 60);
}

const two = (number) => String(number).padStart(2, "0");

/** "0.31 s", "42.0 s", "3m 05s", "2h 07m", "4d 02h". */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const all = Math.max(0, seconds);
  if (all < 9.995) return `${all.toFixed(2)} s`;
  if (all < 59.95) return `${all.toFixed(1)} s`;
  return coarse(all);
}

/** As `duration`, in whole seconds: for what changes while one looks at it. */
export function coarse(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const all = Math.max(0, Math.floor(seconds));
  if (all < MINUTE) return `${all}s`;
  if (all < HOUR) return `${Math.floor(all / MINUTE)}m ${two(all % MINUTE)}s`;
  if (all < DAY) return `${Math.floor(all / HOUR)}h ${two(Math.floor((all % HOUR) / MINUTE))}m`;
  return `${Math.floor(all / DAY)}d ${two(Math.floor((all % DAY) / HOUR))}h`;
}

/** The time of day, with the date where it is not the day of `now`. */
export function clock(time, now) {
  if (!Number.isFinite(time)) return "–";
  const date = new Date(time * 1000);
  const hours = `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
  const today = new Date((now ?? time) * 1000);
  return date.toDateString() === today.toDateString() ? hours : `${day(date)} ${hours}`;
}

/** Date and time to the millisecond, for titles. */
export function exact(time) {
  if (!Number.isFinite(time)) return "";
  const date = new Date(time * 1000);
  const millis = String(date.getMilliseconds()).padStart(3, "0");
  return `${day(date)} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}.${millis}`;
}

const day = (date) => `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;

/** "1,024". */
export function count(number) {
  return Number.isFinite(number) ? String(number).replace(/\B(?=(\d{3})+(?!\d))/g, ",") : "–";
}

/** "1 job", "2 jobs". */
export function many(number, one, more = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : more}`;
}

/** The ranges [low, high] of an idset; what is no idset has none. */
export function ranges(text) {
  if (typeof text !== "string") return [];
  const found = [];
  for (const part of text.replace(/[[\]\s]/g, "").split(",")) {
    const match = /^(\d+)(?:-(\d+))?$/.exec(part);
    if (match) found.push([Number(match[1]), Number(match[2] ?? match[1])]);
  }
  return found;
}

/** How many ids an idset has. */
export function size(text) {
  return ranges(text).reduce((sum, [low, high]) => sum + high - low + 1, 0);
}

/** Whether an idset has `id`. */
export function has(text, id) {
  return ranges(text).some(([low, high]) => low <= id && id <= high);
}

/** The ids of either of two idsets, as an idset. */
export function union(one, other) {
  const all = [...ranges(one), ...ranges(other)].sort(([a], [b]) => a - b);
  const merged = [];
  for (const [low, high] of all) {
    const last = merged.at(-1);
    if (last !== undefined && low <= last[1] + 1) last[1] = Math.max(last[1], high);
    else merged.push([low, high]);
  }
  return merged.map(([low, high]) => (low === high ? `${low}` : `${low}-${high}`)).join(",");
}

/** "rank 3", "ranks 0-7"; "" for no ranks. */
export function ranks(text) {
  const number = size(text);
  return number === 0 ? "" : `${number === 1 ? "rank" : "ranks"} ${clean(text)}`;
}

/** An event's context as "key=value" words, nested values as JSON. */
export function context(values) {
  const word = (value) => (typeof value === "object" && value !== null ? JSON.stringify(value) : String(value));
  return clean(Object.entries(values ?? {}).map(([key, value]) => `${key}=${word(value)}`).join(" "));
}
