// Nodes and their cores: a field of cells that shows all of them at once, and rows that say it in words.

import { clean, count } from "./format.js";
import { Bar, Chip, More, Panel, STEP, Shape, html } from "./ui.js";

const CELLS_FROM = 17; // nodes from which on the cells are drawn: fewer are read faster as rows
const MAX_CELLS = 8192;
const [BIG, SMALL] = [18, 12]; // pixels of a cell with its gap
const BIG_UP_TO = 256; // nodes
const SHAPES = { torpid: "torpid", drained: "drained", "declared dead": "lost" };
const FIRST = 8; // rows at first, where there are cells

/** What is wrong with a node, worst first; "" for nothing. */
export function trouble(node) {
  if (node.lost !== undefined) return "lost";
  if (!node.online) return "offline";
  if (node.drained !== undefined) return "drained";
  return node.torpid ? "torpid" : "";
}

const ordered = (docs) => [...docs.values()].sort((a, b) => a.rank - b.rank);

export class NodesPanel extends Panel {
  constructor(props) {
    super(props);
    this.state = { filter: "", shown: null, width: 400 };
  }

  componentDidMount() {
    this.observer = new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width > 0 && width !== this.state.width) this.setState({ width });
    });
    this.observer.observe(this.frame);
  }

  componentWillUnmount() {
    this.observer.disconnect();
  }

  render({ docs, resources }, { filter, shown, width }) {
    const nodes = ordered(docs);
    const cells = nodes.length >= CELLS_FROM;
    const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
    const match = (node) => words.every((word) => `${node.rank} ${node.host} ${trouble(node)}`.toLowerCase().includes(word));
    const wanted = words.length > 0 ? nodes.filter(match) : worstFirst(nodes, cells);
    const row = (node) => html`<${Row} key=${node.rank} node=${node} onCard=${this.props.onCard} />`;
    const most = Math.min(shown ?? (cells ? FIRST : STEP), wanted.length);
    return html`<section class="panel nodes" aria-labelledby="nodes-title" ref=${(frame) => (this.frame = frame)}>
      <header><h2 id="nodes-title" tabindex="-1">Nodes</h2><${Summary} resources=${resources} />
        ${cells && html`<span class="tools"><input type="search" placeholder="rank, host or state" aria-label="Filter nodes"
          value=${filter} onInput=${(event) => this.setState({ filter: event.target.value, shown: null })} /></span>`}
      </header>
      ${cells && this.cells(nodes.slice(0, MAX_CELLS), width)}
      <table class="rows nodes-rows"><caption class="sr">Nodes and their cores</caption>
        <thead><tr><th>rank</th><th>host</th><th>cores in use</th><th>state</th></tr></thead>
        <tbody>${wanted.slice(0, most).map(row)}</tbody>
      </table>
      ${wanted.length === 0 && html`<p class="empty">${filter ? "No node is like that." : "No nodes yet."}</p>`}
      <${More} shown=${most} total=${wanted.length} onMore=${() => this.setState({ shown: most + 4 * STEP })} />
    </section>`;
  }

  cells(nodes, width) {
    const pitch = nodes.length <= BIG_UP_TO ? BIG : SMALL;
    const across = Math.max(4, Math.floor((width - 2) / pitch));
    const high = Math.ceil(nodes.length / across) * pitch;
    const at = (event) => {
      const box = event.currentTarget.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left) / pitch);
      return column < across ? nodes[Math.floor((event.clientY - box.top) / pitch) * across + column] : undefined;
    };
    const hover = (event) => {
      const node = at(event);
      const point = { getBoundingClientRect: () => new DOMRect(event.clientX, event.clientY - 6, 1, 18) };
      this.props.onCard(node === undefined ? null : node.rank, point);
    };
    return html`<svg class="cells" role="img" aria-label=${`${nodes.length} nodes; the rows below say the same`}
        width=${across * pitch} height=${high} onMouseMove=${hover} onMouseLeave=${() => this.props.onCard(null)}
        onClick=${(event) => at(event) && this.props.onReveal(at(event).rank)}>
      ${nodes.map((node, index) => html`<${Cell} key=${node.rank} node=${node} size=${pitch - 2}
        x=${(index % across) * pitch} y=${Math.floor(index / across) * pitch} />`)}
    </svg>`;
  }
}

/** Nodes with trouble before the others, where not all of them are seen at once. */
function worstFirst(nodes, cells) {
  return cells ? [...nodes.filter((node) => trouble(node)), ...nodes.filter((node) => !trouble(node))] : nodes;
}

class Cell extends Panel {
  render({ node, size, x, y }) {
    const bad = trouble(node);
    const part = node.cores > 0 ? node.cores_used / node.cores : 0;
    const level = Math.round(size * part);
    return html`<g class=${`cell ${bad ? `c-${bad}` : ""}`} transform=${`translate(${x} ${y})`}>
      <rect class="ground" width=${size} height=${size} rx="2" />
      ${level > 0 && html`<rect class="level" y=${size - level} width=${size} height=${level} rx="2" />`}
      ${bad && html`<path class="mark" d=${mark(bad, size)} />`}
    </g>`;
  }
}

/** A mark over a cell: a cross for lost, a bar for drained, a stroke for offline, a dot for torpid. */
function mark(bad, size) {
  const [low, high, half] = [2, size - 2, size / 2];
  if (bad === "lost") return `M${low} ${low}L${high} ${high}M${high} ${low}L${low} ${high}`;
  if (bad === "drained") return `M${low} ${half}H${high}`;
  if (bad === "torpid") return `M${half} ${low}V${half}`;
  return `M${low} ${high}L${high} ${low}`;
}

class Row extends Panel {
  render({ node, onCard }) {
    const bad = trouble(node);
    const enter = (event) => onCard(node.rank, event.currentTarget);
    return html`<tr data-rank=${node.rank} onMouseEnter=${enter} onMouseLeave=${() => onCard(null)}>
      <td class="num">${node.rank}</td>
      <td class="host"><bdi>${clean(node.host, 60)}</bdi></td>
      <td class="use"><${Bar} label=${`cores in use on rank ${node.rank}`}
          parts=${[{ part: node.cores_used / Math.max(1, node.cores), tone: "used" }]} />
        <span class="of">${node.cores_used}/${node.cores}</span>
        ${node.gpus > 0 && html`<span class="of">gpu ${node.gpus_used}/${node.gpus}</span>`}</td>
      <td class="state">${state(node, bad)}</td>
    </tr>`;
  }
}

function state(node, bad) {
  const reason = bad === "lost" ? node.lost : bad === "drained" ? node.drained : "";
  const word = bad === "lost" ? "declared dead" : bad || "online";
  return html`<${Shape} name=${bad || "full"} /> ${word}${reason && html`: <bdi>${clean(reason, 80)}</bdi>`}
    ${node.drained !== undefined && bad !== "drained" && html` <${Chip} tone="warn">drained<//>`}`;
}

const Summary = ({ resources }) => {
  if (resources === undefined) return null;
  const { nodes, online, torpid, drained, lost } = resources;
  const rest = [["torpid", torpid], ["drained", drained], ["declared dead", lost]].filter(([, number]) => number > 0);
  return html`<span class="tally"><span class="count"><b>${count(online)}</b> of ${count(nodes)} online</span>
    ${rest.map(([name, number]) => html`<span class="count" key=${name}>
      <${Shape} name=${SHAPES[name]} /><b>${count(number)}</b> ${name}</span>`)}
  </span>`;
};
