// How long to wait before the next try: exponential, with jitter, bounded. Pure.

export const BASE = 0.4; // seconds
export const CAP = 6; // seconds
export const LEAST = 0.15; // seconds

/** Seconds before try number `attempt` (1, 2, …); `chance` is in [0, 1): many pages do not come back at one moment. */
export function delay(attempt, chance) {
  const most = Math.min(CAP, BASE * 2 ** Math.min(attempt - 1, 16));
  return LEAST + chance * (most - LEAST);
}
