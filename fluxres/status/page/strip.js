// The instance in a few numbers: nodes, cores, jobs, and what has ended since rank 0 began.

import { clean, count, exact, coarse } from "./format.js";
import { Bar, Chip, Panel, html } from "./ui.js";

const Figure = ({ label, value, of, children }) => html`<div class="figure">
  <span class="label">${label}</span>
  <span class="value">${value}${of !== undefined && html`<small> / ${of}</small>`}</span>
  <span class="rest">${children}</span></div>`;

const some = (number, text, tone) => (number > 0 ? html` <${Chip} tone=${tone}>${count(number)} ${text}<//>` : null);

export class Strip extends Panel {
  render({ about, jobs, resources, now }) {
    const begun = about?.incarnations > 1 ? `begun ${about.incarnations} times` : "begun once";
    return html`<section class="strip" aria-label="In numbers">
      ${resources && this.resources(resources)}
      ${jobs && this.jobs(jobs)}
      ${about && html`<${Figure} label="rank 0 up" value=${coarse(now - about.started)}>
        <span title=${exact(about.started)}>${begun}</span>
        <span class="of"> ${clean(about.version, 30)}</span><//>`}
    </section>`;
  }

  resources({ nodes, online, torpid, drained, lost, cores, cores_used: used, cores_down: down, gpus, gpus_used: gpusUsed }) {
    const all = Math.max(1, cores);
    const parts = [{ part: used / all, tone: "used" }, { part: (down ?? 0) / all, tone: "down" }];
    return html`<${Figure} label="nodes online" value=${count(online)} of=${count(nodes)}>
        ${some(torpid, "torpid", "warn")}${some(drained, "drained", "warn")}${some(lost, "declared dead", "bad")}
        ${!torpid && !drained && !lost && html`<span class="of">${online === nodes ? "all well" : ""}</span>`}<//>
      <${Figure} label="cores in use" value=${count(used)} of=${count(cores)}>
        <${Bar} label="cores in use" parts=${parts} />${some(down, "down", "warn")}<//>
      ${gpus > 0 && html`<${Figure} label="gpus in use" value=${count(gpusUsed)} of=${count(gpus)}>
        <${Bar} label="gpus in use" parts=${[{ part: gpusUsed / gpus, tone: "used" }]} /><//>`}`;
  }

  jobs({ depend = 0, priority = 0, sched = 0, run = 0, cleanup = 0, completed = 0, failed = 0, canceled = 0, timeout = 0 }) {
    const waits = depend + priority + sched;
    const of = depend > 0 ? `${count(depend)} for dependencies` : waits > 0 ? "for resources" : "";
    return html`<${Figure} label="jobs running" value=${count(run + cleanup)}>
        ${cleanup > 0 && html`<span class="of">${count(cleanup)} cleaning up</span>`}<//>
      <${Figure} label="jobs waiting" value=${count(waits)}><span class="of">${of}</span><//>
      <${Figure} label="ended, since rank 0 began" value=${count(completed + failed + canceled + timeout)}>
        ${some(failed, "failed", "bad")}${some(timeout, "timed out", "bad")}${some(canceled, "canceled", "warn")}
        ${failed + timeout + canceled === 0 && completed > 0 && html`<span class="of">all completed</span>`}<//>`;
  }
}
