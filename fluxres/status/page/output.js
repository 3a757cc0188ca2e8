// A job's output, followed as it comes. It scrolls along until the reader scrolls up, and again when they ask for it.
//
// Lines are put into the page directly, not through templates: thousands of them are not compared with each other each
// time that one is added. All of it is text nodes.

import { count } from "./format.js";
import { OutputLines } from "./outputlines.js";
import { Component, html } from "./ui.js";

const NEAR = 24; // pixels from the end that still count as being there
const SIGN = { stdout: "", stderr: "err", note: "shell" };

export class OutputView extends Component {
  constructor(props) {
    super(props);
    this.state = { following: true, empty: true, dropped: 0 };
    this.model = new OutputLines();
    this.elements = new Map();
  }

  componentDidMount() {
    this.last = 0;
    this.props.hold(this);
  }

  componentDidUpdate() {
    if (this.state.following) this.toEnd(); // it may have had no size until now
  }

  /** Take events of `guest.output`. */
  take(events) {
    const { fresh, changed, dropped } = this.model.take(events);
    for (const line of changed) this.elements.get(line)?.lastChild.replaceChildren(line.text);
    const first = this.model.lines.length - fresh.length;
    const added = document.createDocumentFragment();
    for (const line of first < 0 ? this.model.lines : fresh) added.append(this.element(line));
    this.box.append(added);
    this.forget();
    if (this.state.following) this.toEnd();
    if (this.state.empty || dropped !== this.state.dropped) this.setState({ empty: this.model.lines.length === 0, dropped });
    this.box.classList.toggle("several", this.model.tasks.size > 1);
  }

  forget() {
    const kept = new Set(this.model.lines);
    if (this.elements.size <= kept.size) return;
    for (const [line, element] of this.elements) {
      if (kept.has(line)) continue;
      element.remove();
      this.elements.delete(line);
    }
  }

  element(line) {
    const row = document.createElement("div");
    row.className = `out o-${line.stream}`;
    const part = (name, text) => {
      const span = document.createElement("span");
      span.className = name;
      span.append(text);
      row.append(span);
    };
    part("task", line.task);
    part("sign", SIGN[line.stream]);
    part("text", line.text);
    this.elements.set(line, row);
    return row;
  }

  toEnd() {
    this.box.scrollTop = this.box.scrollHeight;
  }

  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.box;
    const up = scrollTop < this.last;
    this.last = scrollTop;
    const following = scrollHeight - scrollTop - clientHeight < NEAR || (this.state.following && !up);
    if (following !== this.state.following) this.setState({ following });
  }

  follow() {
    this.setState({ following: true });
    this.toEnd();
  }

  /** `hidden`: there is nothing to follow, though there may be later. */
  render({ ended, hidden }, { following, empty, dropped }) {
    const state = ended ? "complete" : following ? "following" : "not following";
    return html`<section class="panel output" aria-labelledby="output-title" hidden=${hidden}>
      <header><h2 id="output-title">Output</h2>
        <span class="tally">${dropped > 0 && html`<span class="count">${count(dropped)} earlier lines are not kept</span>`}
          <span class="count" data-following=${following}>${state}</span></span>
        ${!following && html`<span class="tools"><button onClick=${() => this.follow()}>↓ To the end</button></span>`}</header>
      ${empty && html`<p class="empty">${ended ? "It wrote nothing." : "Nothing has been written yet."}</p>`}
      <div class="console" tabindex="0" role="log" aria-live="off" aria-label="Output of the job" hidden=${empty}
        ref=${(box) => (this.box = box)} onScroll=${() => this.scrolled()}></div>
    </section>`;
  }
}
