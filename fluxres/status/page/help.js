// The keys, and what the shapes mean.

import { CONDITIONS } from "./overlay.js";
import { Component, Shape, html } from "./ui.js";

const KEYS = [
  ["?", "this"], ["/", "filter the jobs"], ["o", "to the overlay"], ["n", "to the nodes"], ["j", "to the jobs"],
  ["e", "to the events"], ["d", "dark or light"], ["Esc", "back"],
  ["↑ ↓ ← →", "in the tree: up, down, out or close, in or open"], ["*", "in the tree: open all below"],
];
const MEANINGS = {
  full: "it and all below are there",
  torpid: "has not spoken for a while",
  partial: "something below is not there",
  degraded: "something below is lost",
  lost: "its connection broke",
  offline: "is not there: never was, or left in good order",
  drained: "gets no new jobs",
};

export class Help extends Component {
  componentDidMount() {
    this.before = document.activeElement;
    this.dialog.showModal();
  }

  componentWillUnmount() {
    this.before?.focus?.();
  }

  render({ close }) {
    return html`<dialog class="help" aria-labelledby="help-title" ref=${(dialog) => (this.dialog = dialog)} onClose=${close}>
      <h2 id="help-title">Keys</h2>
      <dl>${KEYS.map(([key, text]) => html`<div><dt><kbd>${key}</kbd></dt><dd>${text}</dd></div>`)}</dl>
      <h2>Shapes</h2>
      <dl>${[...CONDITIONS, "drained"].map((name) => html`<div>
        <dt><${Shape} name=${name} /></dt><dd><b>${name}</b>: ${MEANINGS[name]}</dd></div>`)}</dl>
      <form method="dialog"><button>Close</button></form>
    </dialog>`;
  }
}
