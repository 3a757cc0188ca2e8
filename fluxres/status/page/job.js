// A job's page: what it is, how far it is, its eventlogs as a timeline, its output followed live.

import { clean, coarse, duration, exact, many, ranks } from "./format.js";
import { extent, hosts, progress, waiting } from "./jobsmodel.js";
import { Marks, Outcome } from "./jobs.js";
import { OutputView } from "./output.js";
import { MAX_EVENTS, describe, merge, phases } from "./timeline.js";
import { Bar, Chip, Component, Panel, Time, html } from "./ui.js";

const MAIN = "eventlog";
const EXEC = "guest.exec.eventlog";
const OUTPUT = "guest.output";
const LONG = new Set(["directory", "exception"]); // facts that need room

export class JobPage extends Component {
  constructor(props) {
    super(props);
    this.hold = (output) => (this.output = output);
    this.state = { logs: { [MAIN]: [], [EXEC]: [] }, error: null, ended: false };
  }

  componentDidMount() {
    const [take, over] = [(path, events) => this.take(path, events), (why, bad) => this.over(why, bad)];
    this.stop = this.props.feed.follow(this.props.id, take, over);
  }

  componentWillUnmount() {
    this.stop();
  }

  take(path, events) {
    if (this.state.error !== null) this.setState({ error: null }); // it is followed again
    if (path === OUTPUT) this.output.take(events);
    // Several messages may come before the next drawing: each builds on the last.
    else if (this.state.logs[path] !== undefined) {
      const more = (logs) => ({ ...logs, [path]: [...logs[path], ...events].slice(-MAX_EVENTS) });
      this.setState(({ logs }) => ({ logs: more(logs) }));
    }
  }

  over(why, bad) {
    this.setState(bad ? { error: why } : { ended: true });
  }

  render({ id, feed, now }, { logs, error, ended }) {
    const job = find(feed.picture.docs("jobs"), id);
    const [main, exec] = [logs[MAIN], logs[EXEC]];
    const nothing = error !== null && main.length === 0 && exec.length === 0; // no such job, say
    const done = ended || main.some(({ name }) => name === "clean");
    return html`<div class="job-page">
      <${Facts} id=${id} job=${job} main=${main} now=${now} error=${error} />
      ${!nothing && html`<${Timeline} main=${main} exec=${exec} now=${done ? null : Math.floor(now)} />`}
      <${OutputView} ended=${done} hidden=${nothing} hold=${this.hold} />
    </div>`;
  }
}

function find(jobs, id) {
  for (const job of jobs.values()) if (job.id === id || job.dec === id) return job;
  return undefined;
}

class Facts extends Panel {
  render({ id, job, main, now, error }) {
    const unlisted = `It is not among the jobs that are listed now${main.length > 0 ? ": what follows is its eventlog" : ""}.`;
    return html`<section class="panel facts" aria-labelledby="job-title">
      <header><a class="back" href="#/">← All</a><h1 id="job-title" tabindex="-1">${clean(id, 40)}</h1>
        <bdi class="name">${clean(job?.name, 80)}</bdi>
        ${job && (job.state === "INACTIVE" ? html`<${Outcome} job=${job} />` : html`<${Chip} tone="good">${job.state}<//>`)}
        ${job && job.state !== "INACTIVE" && html`<${Marks} job=${job} />`}</header>
      ${error && html`<p class="alert t-bad" role="alert">${clean(error)}</p>`}
      ${job === undefined && !error && html`<p class="of">${unlisted}</p>`}
      ${job && html`${this.time(job, now)}<dl class="facts-list">${this.facts(job, now)}</dl>`}
    </section>`;
  }

  time(job, now) {
    const { elapsed, limit, left, part, soon } = progress(job, now);
    if (job.state !== "RUN" || elapsed === null) return null;
    const ran = html`<b>${coarse(elapsed)}</b>`;
    if (limit === null) return html`<p class="limit"><span>has run for ${ran}, without a time limit</span></p>`;
    const until = html`<${Time} t=${job.expiration || now + left} now=${now} />`;
    return html`<p class="limit"><${Bar} tone="tall" label="time used" parts=${[{ part, tone: soon ? "soon" : "time" }]} />
      <span>${ran} of ${coarse(limit)} · ${coarse(left)} left, until ${until}</span></p>`;
  }

  facts(job, now) {
    const rows = [
      ["user", clean(job.username ?? job.userid)],
      ["has", job.ranks ? extent(job) : null],
      ["wants", job.ranks ? null : extent(job)],
      ["ranks", job.ranks && ranks(job.ranks)],
      ["nodes", clean(hosts(job.nodelist))],
      ["tasks", job.ntasks],
      ["waits", job.state !== "RUN" && job.state !== "INACTIVE" && job.state !== "CLEANUP" && waiting(job)],
      ["queue", clean(job.queue)],
      ["urgency", job.urgency],
      ["submitted", job.t_submit && html`<${Time} t=${job.t_submit} now=${now} />`],
      ["began", job.t_run && html`<${Time} t=${job.t_run} now=${now} />`],
      ["ended", job.t_inactive && html`<${Time} t=${job.t_inactive} now=${now} />`],
      ["directory", clean(job.cwd)],
      ["exception", job.exception_occurred && `${clean(job.exception_type, 40)}: ${clean(job.exception_note)}`],
      ["jobid", job.dec],
    ];
    return rows.filter(([, value]) => value !== undefined && value !== null && value !== "" && value !== false)
      .map(([name, value]) => html`<div key=${name} class=${LONG.has(name) ? "long" : undefined}>
        <dt>${name}</dt><dd><bdi>${value}</bdi></dd></div>`);
  }
}

class Timeline extends Panel {
  render({ main, exec, now }) {
    const all = merge(main, exec);
    const zero = all[0]?.event.timestamp ?? 0;
    return html`<section class="panel timeline" aria-labelledby="timeline-title">
      <header><h2 id="timeline-title">Timeline</h2>
        <span class="tally"><span class="count">${many(all.length, "event")}</span></span></header>
      ${all.length === 0 ? html`<p class="empty">No events yet.</p>` : html`<${Phases} phases=${phases(main)} now=${now} />`}
      <ol class="log-events">${all.map(({ lane, event }, index) => {
        const { tone, text } = describe(event);
        return html`<li key=${index} class=${`lane-${lane} t-${tone}`} data-event=${event.name}>
          <time title=${exact(event.timestamp)}>+${duration(event.timestamp - zero)}</time>
          <i class="dot" aria-hidden="true"></i>
          <span><b>${clean(event.name, 60)}</b> <bdi class="of">${text}</bdi></span></li>`;
      })}</ol>
    </section>`;
  }
}

/** The phases as a bar, each as long as it took, and in words. */
const Phases = ({ phases: all, now }) => {
  const long = ({ begin, end }) => Math.max(0, (end ?? Math.max(now ?? begin, begin)) - begin);
  const total = all.reduce((sum, phase) => sum + long(phase), 0);
  const shown = all.filter((phase) => long(phase) > 0.001 * total || phase.end === null);
  return html`<div class="phases" aria-hidden="true">${all.map((phase) => html`<i key=${phase.state} class=${`p-${phase.state}`}
      style=${{ flexGrow: String(Math.max(0.001, long(phase) / (total || 1))) }}></i>`)}</div>
    <p class="phase-words">${shown.map((phase) => html`<span key=${phase.state}>
      <i class=${`swatch p-${phase.state}`}></i>
      ${phase.called} <b>${phase.end === null ? coarse(long(phase)) : duration(long(phase))}</b></span>`)}</p>`;
};
