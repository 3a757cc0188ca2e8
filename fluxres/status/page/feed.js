// The connection to the broker: subscribes, applies what comes, and comes back by itself when the broker was away.
//
// States (`connection.phase`):
//   connecting  nothing has been seen yet
//   live        the picture is complete, and news arrive
//   away        the broker cannot be reached, or says nothing; the picture is the last one; another try comes `retryAt`
//   token       it wants a token; waits for `authorize`
//   refused     it does not let us read (`why`); tries again as in `away`, since that may change
// `connection.shutdown` is true from a broker's word that it is shut down until there is a picture again: what later
// tries meet says less than that.
// Each try asks /api/access first, since a WebSocket does not tell why it is refused. A reader that returns names the
// position it has: it gets what it missed, or a new snapshot and a word why. Silence for longer than SILENCE is a loss.
// Messages: docs/status-messages.md.

import { delay } from "./backoff.js";
import { Picture, absence } from "./picture.js";

export const PROTOCOL = "fluxres.status.v1";
export const BEARER = "fluxres.bearer.";
export const TOPICS = ["instance", "overlay", "resources", "jobs", "events"];
const VERSION = 1;
const MAIN = 1; // the id of the subscription to TOPICS
const LOG = 2; // that to rank 0's log, which is for the instance owner
const FIRST_FOLLOW = 3;
const SILENCE = 40; // seconds; the broker says something every 15
const ACCESS_TIMEOUT = 8000; // milliseconds
const OPEN_TIMEOUT = 10; // seconds
const MAX_WHY = 300; // characters of what the broker says
const GOING_AWAY = 1001; // closes a WebSocket (RFC 6455 §7.4.1): with SHUT_DOWN, by a broker that ends in order
const RESTART = 1012;
const SHUT_DOWN = "the broker is shut down";
const TOKEN_KEY = "fluxres.token";

const seconds = () => Date.now() / 1000;

/** Base64url without padding of a token, as the subprotocol has it. */
export function encodeToken(token) {
  const bytes = new TextEncoder().encode(token);
  const text = btoa(String.fromCharCode(...bytes));
  return text.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** The one connection of the page. `changed` is called after each change, of the connection or of what it brought. */
export class Feed {
  constructor(changed) {
    this.changed = changed;
    this.picture = new Picture();
    this.log = new Picture();
    this.logDenied = false;
    this.connection = { phase: "connecting", since: seconds(), attempt: 0, retryAt: null, why: "" };
    this.hello = null;
    this.absence = null; // what happened while we were away: see `absence` of picture.js
    this.offset = 0; // the broker's clock minus ours, seconds
    this.lastNews = null;
    this.memory = null;
    this.socket = null;
    this.timer = null;
    this.heard = 0;
    this.follows = new Map();
    this.nextId = FIRST_FOLLOW;
  }

  /** Connect, and stay so. */
  start() {
    this.attempt();
    setInterval(() => this.listen(), 1000);
    addEventListener("online", () => this.retryNow());
    document.addEventListener("visibilitychange", () => document.hidden || this.retryNow());
  }

  /** The time at the broker; while it is away, that of its last news. */
  now() {
    return this.connection.phase === "live" || this.lastNews === null ? seconds() + this.offset : this.lastNews;
  }

  /** Use this token from now on, as long as the tab lives. */
  authorize(token) {
    sessionStorage.setItem(TOKEN_KEY, token);
    this.retryNow();
  }

  /** Try again at once, where a try is due later. */
  retryNow() {
    if (this.connection.phase === "live" || this.socket !== null || this.trying) return;
    clearTimeout(this.timer);
    this.attempt();
  }

  /** Follow a job: `take(path, events)` for its events, `ended(why)` in the end. Returns what stops it. */
  follow(job, take, ended) {
    const id = this.nextId++;
    this.follows.set(id, { job, take, ended, positions: {} });
    if (this.connection.phase === "live") this.send({ type: "follow", id, job });
    return () => {
      if (this.follows.delete(id)) this.send({ type: "unsubscribe", id });
    };
  }

  /** What happened while the broker was away has been read. */
  dismiss() {
    this.absence = null;
    this.changed();
  }

  // --- trying

  async attempt() {
    this.trying = true;
    const { attempt } = this.connection;
    Object.assign(this.connection, { attempt: attempt + 1, retryAt: null });
    this.changed();
    const token = sessionStorage.getItem(TOKEN_KEY);
    try {
      const answer = await fetch("/api/access", {
        cache: "no-store",
        headers: token ? { Authorization: `Bearer ${token}` } : {},
        signal: AbortSignal.timeout(ACCESS_TIMEOUT),
      });
      if (answer.status === 401) this.wantToken(token !== null);
      else if (answer.status === 403) this.lost((await this.said(answer)).why ?? "access is refused", "refused");
      else if (answer.ok) this.open(token);
      else this.lost(`the broker answered ${answer.status} ${answer.statusText}`);
    } catch {
      this.lost("the broker cannot be reached");
    } finally {
      this.trying = false;
    }
  }

  async said(answer) {
    try {
      return await answer.json();
    } catch {
      return {};
    }
  }

  wantToken(refused) {
    sessionStorage.removeItem(TOKEN_KEY);
    const why = refused ? "this token was refused" : "";
    this.connection = { phase: "token", since: seconds(), attempt: 0, retryAt: null, why };
    this.changed();
  }

  open(token) {
    const url = new URL("/ws", location.href);
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(url, token ? [PROTOCOL, BEARER + encodeToken(token)] : [PROTOCOL]);
    this.socket = socket;
    this.heard = seconds();
    socket.onmessage = (event) => this.socket === socket && this.receive(event.data);
    socket.onclose = (event) => this.socket === socket && this.closed(event);
  }

  closed(event) {
    this.socket = null;
    if (event.code === RESTART) this.lost("the broker is beginning anew");
    else if (event.code === GOING_AWAY && event.reason === SHUT_DOWN) {
      this.connection.shutdown = true;
      this.lost(event.reason);
    } else if (event.reason) this.lost(event.reason.slice(0, MAX_WHY));
    else this.unready();
  }

  /** The socket is gone and nobody said why: the broker may know. */
  async unready() {
    this.lost("the connection is lost");
    try {
      const answer = await fetch("/readyz", { cache: "no-store", signal: AbortSignal.timeout(ACCESS_TIMEOUT) });
      const text = (await answer.text()).trim().slice(0, MAX_WHY);
      if (!answer.ok && text && this.connection.phase === "away") this.connection.why = `not ready: ${text}`;
    } catch {
      if (this.connection.phase === "away") this.connection.why = "the broker cannot be reached";
    }
    this.changed();
  }

  /** Not, or no longer, connected: keep the picture and try again later. */
  lost(why, phase = "away") {
    const was = this.connection;
    const never = this.picture.position === null;
    if (was.phase === "live") this.memory = { ...this.picture.memory(this.lastNews), lostAt: seconds() };
    this.drop();
    const since = was.phase === phase ? was.since : seconds();
    const attempt = was.phase === "live" ? 0 : was.attempt;
    const wait = delay(attempt + 1, Math.random());
    this.connection = { phase, since, attempt, retryAt: seconds() + wait, why, never, shutdown: was.shutdown };
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.attempt(), wait * 1000);
    this.changed();
  }

  drop() {
    const { socket } = this;
    this.socket = null;
    this.picture.interrupted();
    this.log.interrupted();
    if (socket !== null) socket.close();
  }

  listen() {
    const silent = seconds() - this.heard;
    if (this.socket === null) return;
    if (silent > SILENCE) this.lost(`the broker has said nothing for ${Math.round(silent)} seconds`);
    else if (this.socket.readyState === WebSocket.CONNECTING && silent > OPEN_TIMEOUT) this.lost("no answer");
  }

  // --- messages

  send(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  receive(text) {
    this.heard = seconds();
    const message = JSON.parse(text);
    if (message.now !== undefined) this.offset = message.now - seconds();
    if (message.now !== undefined) this.lastNews = message.now;
    switch (message.type) {
      case "hello": return this.greeted(message);
      case "snapshot": return this.told(message);
      case "delta": return this.changedBy(message);
      case "job": return this.followed(message);
      case "ended": return this.ended(message);
      case "error": return this.refused(message);
      default: return undefined; // of a later version, which says no more than we need
    }
  }

  greeted(message) {
    if (message.version !== VERSION) {
      this.lost(`this page is of another version than the broker: reload it`, "refused");
      return;
    }
    this.hello = message;
    this.subscribe(MAIN, TOPICS, this.picture);
    if (!this.logDenied) this.subscribe(LOG, ["log"], this.log);
    for (const [id, { job, positions }] of this.follows) {
      const position = Object.keys(positions).length > 0 ? { position: positions } : {};
      this.send({ type: "follow", id, job, ...position });
    }
  }

  subscribe(id, topics, picture) {
    const position = picture.position === null ? {} : { position: picture.position };
    this.send({ type: "subscribe", id, topics, ...position });
  }

  told(message) {
    const picture = message.id === MAIN ? this.picture : this.log;
    if (picture.snapshot(message) && message.id === MAIN) this.complete(message.why);
    else if (!message.more) this.changed();
  }

  changedBy(message) {
    const picture = message.id === MAIN ? this.picture : this.log;
    if (picture.delta(message)) {
      if (message.more) return;
      if (message.id === MAIN) this.complete(null);
      else this.changed();
      return;
    }
    picture.position = null; // a gap: what we have is not what it applies to
    this.lost("what the broker said does not follow from what it said before");
  }

  /** The picture is whole, and of now. */
  complete(why) {
    if (this.connection.phase !== "live") {
      this.connection = { phase: "live", since: seconds(), attempt: 0, retryAt: null, why: why ?? "" };
      this.returned(why);
    }
    this.changed();
  }

  returned(why) {
    const { memory } = this;
    this.memory = null;
    if (memory === null) return;
    this.absence = absence(this.absence, memory, this.picture, seconds(), why);
  }

  followed(message) {
    const follow = this.follows.get(message.id);
    if (follow === undefined) return;
    follow.positions[message.path] = message.position;
    follow.take(message.path, message.events);
  }

  ended(message) {
    const follow = this.follows.get(message.id);
    if (follow !== undefined) follow.ended(message.why ?? "");
    else if (message.id === MAIN) this.lost(message.why || "the broker has ended the subscription");
  }

  refused(message) {
    const follow = this.follows.get(message.id);
    if (follow !== undefined) follow.ended(message.error, true);
    else if (message.id === LOG) this.logDenied = true;
    else this.lost(message.error);
    this.changed();
  }
}
