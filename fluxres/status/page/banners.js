// What stands above everything else: that the broker is away, that a recovery is under way, what happened meanwhile.

import { clock, coarse, count, duration, many } from "./format.js";
import { RecoveryFrame } from "./events.js";
import { eventsAfter } from "./picture.js";
import { Component, html } from "./ui.js";
import { gather, tell } from "./words.js";

const MAX_EVENTS = 6; // of those that happened meanwhile, in words

/** The connection in words, for the header and for those who listen to the page. */
export function connectionWords({ phase, since }) {
  return {
    live: "live",
    connecting: "connecting…",
    away: `away since ${clock(since)}`,
    token: "a token is needed",
    refused: "not allowed",
  }[phase];
}

/** The broker is away, or does not let us in. Those who listen hear it once, from the page's live region. */
export const Away = ({ connection, rank, time, retry }) => {
  const { phase, since, retryAt, attempt, never } = connection;
  if (phase !== "away" && phase !== "refused") return null;
  const wait = retryAt === null ? "trying now" : `trying again in ${Math.max(0, Math.ceil(retryAt - time))} s`;
  const title = phase === "refused" ? "This page may not watch the instance" : "The broker is away";
  const shutdown = connection.shutdown && phase === "away";
  const why = shutdown ? `rank ${rank ?? 0}'s broker was shut down` : connection.why;
  const jobs = shutdown ? "in a durable instance running jobs run on" : "jobs run on without it";
  return html`<div class="banner t-bad" data-banner="away">
    <p><b>${title}</b> since <b>${clock(since, time)}</b> (${coarse(time - since)}): ${why}.
      ${!never && phase === "away" && html` What you see is the last picture; ${jobs}.`}</p>
    <p class="of">${wait}${attempt > 1 && `, ${many(attempt, "try", "tries")} so far`}
      ${retryAt !== null && html` <button onClick=${retry}>Try now</button>`}</p>
  </div>`;
};

/** A recovery that is under way. */
export const UnderWay = ({ doc, now }) =>
  doc === undefined ? null : html`<div class="banner" data-banner="recovering">
    <${RecoveryFrame} doc=${doc} t=${doc.began} now=${now} head="since" /></div>`;

/** What happened while nobody told us: until the reader dismisses it. */
export const Meanwhile = ({ absence, picture, now, dismiss }) => {
  if (absence === null) return null;
  const { found, after, why } = absence;
  const events = gather(eventsAfter(picture.docs("events"), after)).map(([, event]) => event);
  const recoveries = events.filter(({ name }) => name === "recovery");
  const others = events.filter(({ name }) => name !== "recovery");
  const left = others.length - MAX_EVENTS;
  return html`<div class="banner t-plain" data-banner="meanwhile">
    <p class="title">${awayWords(absence, now)}${restartWords(found, why)}
      <button class="close" aria-label="Dismiss what happened meanwhile" onClick=${dismiss}>✕</button></p>
    ${recoveries.map((event) => html`<${RecoveryFrame} doc=${event.context} t=${event.t} now=${now} head="by" />`)}
    <ul>
      <li>${jobWords(found)}</li>
      ${others.slice(0, MAX_EVENTS).map(
        (event) => html`<li class="of">${clock(event.t, now)} <bdi>${tell(event).title}</bdi></li>`,
      )}
      ${left > 0 && html`<li class="of">and ${many(left, "other event")}, all below</li>`}
    </ul>
  </div>`;
};

/** For how long, and until when: once, or several times of which none has been dismissed. */
function awayWords({ lostAt, backAt, away, times }, now) {
  const until = html`<b>${clock(backAt, now)}</b>`;
  if (times === 1) return html`<b>Back after ${duration(away)}.</b> Away from <b>${clock(lostAt, now)}</b> to ${until}`;
  const often = times === 2 ? "twice" : many(times, "time");
  return html`<b>Away ${often}, ${duration(away)} together</b>, the last until ${until}`;
}

function restartWords({ renewed, incarnations }, why) {
  if (renewed) return `: rank 0 began anew${incarnations > 0 ? `, its ${ordinal(incarnations)} beginning` : ""}.`;
  if (why === "behind") return ": what happened meanwhile is not known any more, and this is a new picture.";
  return ": the connection was lost, the broker was not.";
}

function ordinal(number) {
  const last = number % 100 > 10 && number % 100 < 14 ? 0 : number % 10;
  return `${count(number)}${{ 1: "st", 2: "nd", 3: "rd" }[last] ?? "th"}`;
}

function jobWords({ submitted, ended, failed, running, unlisted }) {
  const parts = [`${many(running, "job")} ran on through it`, `${count(submitted)} submitted`];
  parts.push(`${count(ended)} ended${failed > 0 ? ` (${count(failed)} of them not well)` : ""}`);
  if (unlisted > 0) parts.push(`${count(unlisted)} ended longer ago than the list goes back`);
  return `${parts.join(", ")}.`;
}

/** Asks for the token that the broker wants. */
export class TokenForm extends Component {
  componentDidMount() {
    this.input.focus();
  }

  submit(event) {
    event.preventDefault();
    const token = this.input.value.trim();
    if (token !== "") this.props.authorize(token);
  }

  render({ why }) {
    return html`<form class="panel token" onSubmit=${(event) => this.submit(event)}>
      <h2>This broker wants a token</h2>
      <p>It is in the file that <code>token-file</code> in <code>[status]</code> names.
        ${" "}It is kept until this tab is closed.</p>
      <div role="alert">${why && html`<p class="alert t-bad">${why}</p>`}</div>
      <p><label for="token">Token</label>
        ${" "}<input id="token" type="password" autocomplete="off" ref=${(input) => (this.input = input)} />
        <button type="submit">Use it</button></p>
    </form>`;
  }
}
