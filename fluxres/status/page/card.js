// Details of one rank, next to where it is drawn: for the pointer and for the focus. The tree's labels say the same.

import { clean, coarse, count, has, many } from "./format.js";
import { build, condition, tallyWords } from "./overlay.js";
import { Bar, Panel, Shape, Time, html } from "./ui.js";

const WIDTH = 290; // pixels
const NEAR = 6;
const ROOM = 190; // pixels that a card is high, about
const JOBS = 4; // that are named

const MEANS = {
  full: "all below is there",
  torpid: "has not spoken for a while",
  partial: "something below is not there",
  degraded: "something below is lost",
  lost: "its connection broke",
  offline: "is not there",
};

/** Where the card goes: below what it tells of, above where there is no room. */
export function placeCard(target) {
  const box = target.getBoundingClientRect();
  const left = Math.max(NEAR, Math.min(box.left, innerWidth - WIDTH - NEAR));
  const under = box.bottom + ROOM < innerHeight;
  const beside = under ? { top: `${box.bottom + NEAR}px` } : { bottom: `${innerHeight - box.top + NEAR}px` };
  return { left: `${left}px`, ...beside };
}

export class RankCard extends Panel {
  render({ rank, place, picture, now }) {
    const doc = picture.doc("overlay", String(rank));
    const node = picture.doc("resources", String(rank));
    if (doc === undefined && node === undefined) return null;
    return html`<aside class="card" style=${place} aria-hidden="true">
      <h3>rank ${rank} <bdi>${clean(doc?.host ?? node?.host ?? "", 80)}</bdi></h3>
      <dl>
        ${doc && this.health(doc, picture, now)}
        ${node && resources(node)}
        ${this.jobs(rank, picture)}
      </dl>
    </aside>`;
  }

  health(doc, picture, now) {
    const name = condition(doc);
    const root = build(picture.docs("overlay"));
    const all = [];
    const walk = (each) => (each.rank === doc.rank ? all.push(each) : each.children.forEach(walk));
    walk(root);
    const inner = all[0]?.children.length > 0;
    const means = inner || name !== "full" ? MEANS[name] : "joined";
    const since = () => html`<dt>since</dt><dd><${Time} t=${doc.since} now=${now} /> · ${coarse(now - doc.since)}</dd>`;
    return html`<dt>health</dt><dd><${Shape} name=${name} /> <b>${name}</b>, ${means}</dd>
      ${doc.since && since()}
      ${doc.ghost && html`<dt>unseen</dt><dd>somebody above it is lost: nobody can say more</dd>`}
      ${doc.error && html`<dt>error</dt><dd><bdi>${clean(doc.error)}</bdi></dd>`}
      ${doc.parent !== null && doc.parent !== undefined && html`<dt>parent</dt><dd>rank ${doc.parent}</dd>`}
      ${inner && html`<dt>subtree</dt><dd>${many(all[0].size, "broker")}: ${tallyWords(all[0].tally)}</dd>`}`;
  }

  jobs(rank, picture) {
    const found = [...picture.docs("jobs").values()].filter((job) => job.state === "RUN" && has(job.ranks, rank));
    if (found.length === 0) return null;
    const named = found.slice(0, JOBS).map((job) => `${job.id} ${clean(job.name, 20)}`);
    const rest = found.length > JOBS ? ` and ${found.length - JOBS} more` : "";
    return html`<dt>jobs</dt><dd><bdi>${named.join(", ")}</bdi>${rest}</dd>`;
  }
}

function resources(node) {
  return html`<dt>cores</dt>
    <dd><${Bar} label="cores in use" parts=${[{ part: node.cores_used / Math.max(1, node.cores), tone: "used" }]} />
      ${" "}${count(node.cores_used)} of ${count(node.cores)} in use</dd>
    ${node.gpus > 0 && html`<dt>gpus</dt><dd>${node.gpus_used} of ${node.gpus} in use</dd>`}
    ${node.drained !== undefined && html`<dt>drained</dt><dd><bdi>${clean(node.drained) || "no reason given"}</bdi></dd>`}
    ${node.lost !== undefined && html`<dt>declared dead</dt><dd><bdi>${clean(node.lost)}</bdi></dd>`}
    ${node.properties?.length > 0 && html`<dt>has</dt><dd><bdi>${clean(node.properties.join(", "))}</bdi></dd>`}`;
}
