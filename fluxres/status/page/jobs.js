// The jobs: what runs and how far it is, what waits and for what, what has ended and how. Lists are cut, with counts.

import { clean, coarse, count, exact, many, ranks } from "./format.js";
import { extent, groups, hosts, outcome, progress, select, waiting } from "./jobsmodel.js";
import { Ago, Bar, Chip, MOST, More, Panel, STEP, html, jobHref } from "./ui.js";

const TITLES = { running: "Running", queued: "Queue", ended: "Ended" };
const NARROW = 640; // pixels
const STEP_NARROW = 8; // rows at first, where it is narrow
const RECENT = 256; // inactive jobs that the broker lists at most
const COLUMNS = ["id", "name", "user", "on", "time"];
const HEADS = {
  running: ["job", "name", "user", "on", "time"],
  queued: ["job", "name", "user", "wants", "waits"],
  ended: ["job", "name", "user", "ran", "end"],
};
const EMPTY = { running: "Nothing runs.", queued: "Nothing waits.", ended: "Nothing has ended yet." };

const atFirst = () => {
  const rows = innerWidth < NARROW ? STEP_NARROW : STEP;
  return { running: rows, queued: rows, ended: rows };
};

export class JobsPanel extends Panel {
  constructor(props) {
    super(props);
    this.state = { filter: "", shown: atFirst() };
  }

  render({ docs, now, counts, queue }, { filter, shown }) {
    // Sorting ten thousand jobs is not done again because a second has passed.
    if (this.sorted !== this.props.version) [this.sorted, this.all] = [this.props.version, groups(docs)];
    const type = (event) => this.setState({ filter: event.target.value, shown: atFirst() });
    const list = (name, row, extra) => this.list({ name, row, extra, filter, counts, most: shown[name] });
    return html`<section class="panel jobs" aria-labelledby="jobs-title">
      <header><h2 id="jobs-title" tabindex="-1">Jobs</h2><${JobCounts} counts=${counts} />
        <span class="tools"><input id="job-filter" type="search" value=${filter} onInput=${type}
          placeholder="name, user, state, rank:3 …" aria-label="Filter jobs" /></span></header>
      ${list("running", (job) => html`<${Running} key=${job.dec} job=${job} now=${now} />`)}
      ${list("queued", (job) => html`<${Queued} key=${job.dec} job=${job} age=${seldom(now)} />`,
        html`<${QueueState} queue=${queue} />`)}
      ${list("ended", (job) => html`<${Ended} key=${job.dec} job=${job} age=${seldom(now)} />`)}
    </section>`;
  }

  list({ name, row, extra, filter, counts, most }) {
    const all = this.all[name];
    const found = select(all, filter);
    const number = Math.min(most, found.length, MOST);
    const more = () => this.setState({ shown: { ...this.state.shown, [name]: most + 4 * STEP } });
    // Of those that have ended the broker lists the newest only.
    const cut = name === "ended" && all.length > 0 && (all.length >= RECENT || counts?.inactive > all.length);
    const total = `${cut ? "newest " : ""}${count(all.length)}`;
    const of = found.length === all.length ? total : `${count(found.length)} of ${total}`;
    return html`<section class=${`group g-${name}`} aria-labelledby=${`${name}-title`}>
      <h3 id=${`${name}-title`}>${TITLES[name]} <span class="of">${of}</span> ${extra}</h3>
      ${found.length === 0 && html`<p class="empty">${all.length > 0 ? "None is like that." : EMPTY[name]}</p>`}
      ${found.length > 0 && html`<table class=${`rows jobs-rows ${name}`}>
        <colgroup>${COLUMNS.map((column) => html`<col class=${column} />`)}</colgroup>
        <thead><tr>${HEADS[name].map((head) => html`<th>${head}</th>`)}</tr></thead>
        <tbody>${found.slice(0, number).map(row)}</tbody></table>`}
      <${More} shown=${number} total=${found.length} onMore=${more} />
    </section>`;
  }
}

/** The time that ages are told by: it changes so seldom that rows are rarely drawn for it. */
const seldom = (now) => Math.floor(now / 10) * 10;

const Name = ({ job }) => html`<td class="id"><a href=${jobHref(job.id)}>${job.id}</a></td>
  <td class="name" title=${clean(job.name)}><bdi>${clean(job.name, 60) || "–"}</bdi></td>
  <td class="user"><bdi>${clean(job.username ?? job.userid ?? "", 30)}</bdi></td>`;

class Running extends Panel {
  render({ job, now }) {
    const { elapsed, limit, part, soon } = progress(job, now);
    const where = job.nodelist ? clean(hosts(job.nodelist), 60) : ranks(job.ranks);
    const time = elapsed === null ? "starting" : coarse(elapsed);
    return html`<tr data-job=${job.id}><${Name} job=${job} />
      <td class="on" title=${ranks(job.ranks)}><bdi>${where || "–"}</bdi>
        ${" "}<span class="of">${many(job.ncores ?? 0, "core")}</span></td>
      <td class="time">
        ${limit === null
          ? html`<span class="of">${time}, no limit</span>`
          : html`<${Bar} label=${`time of ${job.id}`} parts=${[{ part, tone: soon ? "soon" : "time" }]} />
            <span class="of" title=${exact(job.expiration)}>${time} of ${coarse(limit)}</span>`}
        <${Marks} job=${job} />
      </td></tr>`;
  }
}

/** What is unusual about a job that is active. */
export const Marks = ({ job }) => html`
  ${job.state === "CLEANUP" && html` <${Chip}>cleaning up<//>`}
  ${job.detached && html` <${Chip} tone="warn" title="its shells run on; no broker reads them right now">
    detached: ${ranks(job.detached)}<//>`}
  ${job.restarts > 0 && html` <${Chip} tone="good" title="rank 0 started anew so often while the job was active">
    survived ${many(job.restarts, "restart")}<//>`}
  ${job.exception_occurred && html` <${Chip} title=${clean(job.exception_note)}
    tone=${job.exception_severity === 0 ? "bad" : "warn"}>${clean(job.exception_type, 30)}<//>`}`;

class Queued extends Panel {
  render({ job, age }) {
    const why = waiting(job);
    const rank = `priority ${job.priority ?? "–"}, urgency ${job.urgency ?? "–"}`;
    return html`<tr data-job=${job.id}><${Name} job=${job} />
      <td class="on">${extent(job)}${job.duration > 0 && html` <span class="of">for ${coarse(job.duration)}</span>`}</td>
      <td class="time"><span title=${rank}><bdi>${why}</bdi>
        ${job.t_submit && html` <span class="of">${coarse(age - job.t_submit)}</span>`}</span>
        ${" "}<${Marks} job=${job} /></td></tr>`;
  }
}

const MARK = { completed: "✓", failed: "✕", canceled: "⊘", timeout: "◷", ended: "·" };
const TONE = { completed: "good", failed: "bad", canceled: "warn", timeout: "bad", ended: "plain" };

/** How a job has ended, as a chip. */
export const Outcome = ({ job }) => {
  const { kind, words } = outcome(job);
  return html`<${Chip} tone=${TONE[kind] ?? "plain"}>${MARK[kind] ?? "·"} ${words}<//>`;
};

class Ended extends Panel {
  render({ job, age }) {
    const ran = job.t_run ? coarse((job.t_cleanup ?? job.t_inactive) - job.t_run) : "never ran";
    return html`<tr data-job=${job.id}><${Name} job=${job} />
      <td class="on"><span class="of">${ran}${job.t_run && html` on ${extent(job)}`}</span></td>
      <td class="time"><${Outcome} job=${job} />
        ${job.t_inactive && html` <span class="of"><${Ago} t=${job.t_inactive} now=${Math.max(age, job.t_inactive)} /></span>`}
        ${job.exception_note && html`<span class="note"><bdi>${clean(job.exception_note, 120)}</bdi></span>`}</td></tr>`;
  }
}

const JobCounts = ({ counts }) => {
  if (counts === undefined) return null;
  const waits = (counts.depend ?? 0) + (counts.priority ?? 0) + (counts.sched ?? 0);
  const parts = [["running", (counts.run ?? 0) + (counts.cleanup ?? 0)], ["waiting", waits]];
  const ended = ["completed", "failed", "canceled", "timeout"].filter((name) => counts[name] > 0);
  return html`<span class="tally">
    ${parts.map(([name, number]) => html`<span class="count"><b>${count(number)}</b> ${name}</span>`)}
    ${ended.map((name) => html`<span class=${`count k-${name}`}>${MARK[name]} <b>${count(counts[name])}</b> ${name}</span>`)}
  </span>`;
};

const QueueState = ({ queue }) => {
  if (queue === undefined) return null;
  const reason = queue.reason ? `: ${clean(queue.reason, 120)}` : "";
  return html`
    ${queue.enabled === false && html`<${Chip} tone="warn">submission is disabled${reason}<//>`}
    ${queue.started === false && html`<${Chip} tone="warn">stopped${reason}<//>`}`;
};
