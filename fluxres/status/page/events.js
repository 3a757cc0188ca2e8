// What happened lately, newest first. Recoveries stand out as what they are; the rest is one line each.

import { clean } from "./format.js";
import { byEventKey } from "./picture.js";
import { More, Panel, Parts, STEP, Time, html } from "./ui.js";
import { gather, recovery, tell } from "./words.js";

const FIRST = 15;

/** A recovery as a frame of its own: one that is over, or, with `now`, one under way. */
export const RecoveryFrame = ({ doc, t, now, head }) => {
  const { tone, title, parts } = recovery(doc, now);
  const part = ([label, text, kind]) => html`<div class=${`t-${kind}${label === "why" ? " why" : ""}`}>
    <dt>${label}</dt><dd><bdi>${text}</bdi></dd></div>`;
  return html`<div class=${`recovery t-${tone}`}>
    <p class="title"><b>${title}</b>${t && html` <span class="of">${head ?? "at"} <${Time} t=${t} now=${now} /></span>`}</p>
    <dl>${parts.map(part)}</dl>
  </div>`;
};

export class EventsPanel extends Panel {
  constructor(props) {
    super(props);
    this.state = { shown: FIRST, tab: "events" };
  }

  render({ docs, log, minute }, { shown, tab }) {
    const button = (name, text) => html`<button role="tab" aria-selected=${tab === name} aria-controls="events-body"
      onClick=${() => this.setState({ tab: name })}>${text}</button>`;
    const hasLog = log.size > 0;
    const tabs = () => html`<span class="tools tabs" role="tablist">
      ${button("events", "Events")}${button("log", "Log of rank 0")}</span>`;
    return html`<section class="panel events" aria-labelledby="events-title">
      <header><h2 id="events-title" tabindex="-1">Recent events</h2>${hasLog && tabs()}</header>
      <div id="events-body" role=${hasLog ? "tabpanel" : undefined}>
        ${tab === "log" && hasLog ? html`<${Log} docs=${log} />` : this.list(docs, shown, minute)}</div>
    </section>`;
  }

  list(docs, shown, now) {
    const events = gather([...docs].sort(([a], [b]) => byEventKey(a, b))).reverse();
    if (events.length === 0) return html`<p class="empty">Nothing has happened yet.</p>`;
    const most = Math.min(shown, events.length);
    const item = ([key, event]) => html`<${Item} key=${key} event=${event} now=${now} />`;
    return html`<ol class="feed">${events.slice(0, most).map(item)}</ol>
      <${More} shown=${most} total=${events.length} onMore=${() => this.setState({ shown: most + 4 * STEP })} />`;
  }
}

class Item extends Panel {
  shouldComponentUpdate({ event, now }) {
    const was = this.props.event; // a gathered one is made anew each time
    return now !== this.props.now || event.t !== was.t || event.context?.idset !== was.context?.idset;
  }

  render({ event, now }) {
    if (event.name === "recovery") {
      const doc = event.context ?? {};
      return html`<li class="e-recovery"><${RecoveryFrame} doc=${doc} t=${event.t} now=${now} head="by" /></li>`;
    }
    const { tone, title, parts } = tell(event);
    return html`<li class=${`line t-${tone}`}><span class="when"><${Time} t=${event.t} now=${now} /></span>
      <span class="what"><b>${title}</b> <${Parts} parts=${parts} /></span></li>`;
  }
}

class Log extends Panel {
  shouldComponentUpdate(props) {
    return props.docs !== this.props.docs || props.docs.size !== this.size;
  }

  render({ docs }) {
    this.size = docs.size;
    const lines = [...docs].sort(([a], [b]) => b - a);
    return html`<pre class="log" tabindex="0" aria-label="Log of rank 0, newest first">${lines.map(
      ([key, doc]) => html`<span key=${key}>${clean(doc.line, 500)}\n</span>`,
    )}</pre>`;
  }
}
