// What all panels are made of: templates, a component that is drawn only when its properties change, small parts.

import htm from "./vendor/htm.js";
import { Component, h, render } from "./vendor/preact.js";
import { clock, coarse, count, exact } from "./format.js";
import { CONDITIONS } from "./overlay.js";

export const html = htm.bind(h);
export { Component, render };

const differ = (one, other) => {
  const keys = Object.keys(other);
  return keys.length !== Object.keys(one).length || keys.some((key) => one[key] !== other[key]);
};

/** A component that is drawn again only where a property or its state is another than before. */
export class Panel extends Component {
  shouldComponentUpdate(props, state) {
    return differ(this.props, props) || differ(this.state, state);
  }
}

/** The shape of each condition, in a square of 12: not by colour alone. */
const SHAPES = {
  full: "M6 1a5 5 0 1 0 0 10a5 5 0 1 0 0-10z",
  torpid: "M6 1a5 5 0 1 0 0 10a5 5 0 1 0 0-10zM6 3a3 3 0 0 1 0 6z",
  partial: "M6 1L11.4 10.6H.6z",
  degraded: "M6 .4L11.6 6L6 11.6L.4 6z",
  lost: "M2.6 1L6 4.4L9.4 1L11 2.6L7.6 6L11 9.4L9.4 11L6 7.6L2.6 11L1 9.4L4.4 6L1 2.6z",
  offline: "M6 1a5 5 0 1 0 0 10a5 5 0 1 0 0-10zM6 2.8a3.2 3.2 0 1 1 0 6.4a3.2 3.2 0 1 1 0-6.4z",
  drained: "M1 1.4h10v2.4H1zM2.6 5.2h6.8v2H2.6zM4.6 8.6h2.8v2H4.6z",
};

/** A path of a shape, for use inside of an SVG. */
export const ShapePath = ({ name, x = 0, y = 0 }) =>
  html`<path class=${`shape c-${name}`} d=${SHAPES[name] ?? SHAPES.offline} transform=${`translate(${x} ${y})`}
    fill-rule="evenodd" />`;

/** A shape among text. */
export const Shape = ({ name }) =>
  html`<svg class="icon" viewBox="0 0 12 12" width="12" height="12" aria-hidden="true"><${ShapePath} name=${name} /></svg>`;

/** A tally as shapes with their numbers: all conditions, or those that there are. */
export const Tally = ({ tally, all }) => html`<span class="tally">
  ${CONDITIONS.filter((name) => tally[name] > 0 || (all && all.includes(name))).map(
    (name) => html`<span key=${name} class=${`count${tally[name] > 0 ? "" : " none"}`}>
      <${Shape} name=${name} /><b>${count(tally[name] ?? 0)}</b> ${name}</span>`,
  )}
</span>`;

/** A small word in a frame. */
export const Chip = ({ tone = "plain", title, children }) =>
  html`<span class=${`chip t-${tone}`} title=${title}>${children}</span>`;

/** A bar of parts, each {part: 0 to 1, tone}. */
export const Bar = ({ parts, label, value, tone = "" }) => html`<span class=${`bar ${tone}`} role="progressbar"
  aria-label=${label} aria-valuemin="0" aria-valuemax="100" aria-valuenow=${Math.round((value ?? parts[0].part) * 100)}>
  ${parts.map(({ part, tone: kind }) => html`<i class=${`t-${kind}`} style=${{ width: `${100 * part}%` }}></i>`)}
</span>`;

/** A time of the day, exact as its title. */
export const Time = ({ t, now }) => html`<time title=${exact(t)}>${clock(t, now)}</time>`;

/** How long ago. */
export const Ago = ({ t, now }) => html`<time title=${exact(t)}>${coarse(now - t)} ago</time>`;

/** A telling of words.js as a line of labels and texts. */
export const Parts = ({ parts }) => html`<span class="parts">
  ${parts.map(
    ([label, text, tone]) => html`<span class=${`part t-${tone}`}>${label && html`<i>${label}</i> `}<bdi>${text}</bdi></span>`,
  )}
</span>`;

/** The address of a job's page. */
export const jobHref = (id) => `#/job/${encodeURIComponent(id)}`;

/** Step by which lists grow, and the most rows that one draws. */
export const STEP = 25;
export const MOST = 1000;

/** A list's end: how many are not shown, and what shows more of them. */
export const More = ({ shown, total, onMore }) => {
  if (shown >= total) return null;
  const hidden = total - shown;
  const full = shown >= MOST;
  return html`<p class="more">${hidden.toLocaleString("en")} more
    ${full && " · narrow them down with the filter"}
    ${!full && html` <button onClick=${onMore}>Show ${Math.min(4 * STEP, hidden)} of them</button>`}</p>`;
};
