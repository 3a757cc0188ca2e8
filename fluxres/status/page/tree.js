// The overlay drawn as a tree, root at the left. Large trees start collapsed, with what is below in numbers and shapes.
//
// For the keyboard it is an ARIA tree: up and down go through what is shown, right opens or goes in, left closes or goes
// out, Home and End, Enter opens or closes, * opens all below.

import { hierarchy, tree } from "./vendor/d3-hierarchy.js";
import { clean, clock, count, many } from "./format.js";
import { CONDITIONS, ROWS, ancestors, build, condition, flat } from "./overlay.js";
import { openAtFirst, tallyWords, troubled, visible } from "./overlay.js";
import { Panel, ShapePath, Tally, html } from "./ui.js";

const ROW = 28; // pixels between nodes
const APART = 1.2; // rows between nodes of different parents
const HIGH = 22; // pixels, of a node
const [NARROW, WIDE] = [74, 210]; // pixels of a column, with its gap
const GAP = 24;
const LETTER = 7.2; // pixels, about
const MARGIN = 6;
const PHONE = 520; // pixels: a frame that is narrower than this starts with fewer leaves
const PHONE_ROWS = 8;
const MAX_OPEN = 3000; // nodes that "expand all" may draw

const keyOf = (item) => (item.more ? `${item.rank}+` : String(item.rank));

/** A host's name as far as it fits; its end tells hosts apart, its domain does not. */
function fitting(host, letters) {
  const name = clean(host).split(".")[0];
  if (name.length <= letters) return name;
  return letters < 4 ? "" : `…${name.slice(1 - letters)}`;
}

export class TreePanel extends Panel {
  constructor(props) {
    super(props);
    this.state = { width: 640, chosen: new Map(), pages: new Map(), trouble: false, focus: "0", refocus: false };
  }

  componentDidMount() {
    this.observer = new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width > 0 && width !== this.state.width) this.setState({ width });
    });
    this.observer.observe(this.frame);
    this.props.hold(this);
  }

  componentWillUnmount() {
    this.observer.disconnect();
  }

  componentDidUpdate() {
    if (!this.state.refocus) return;
    this.frame.querySelector(`[data-key="${this.state.focus}"]`)?.focus();
    this.setState({ refocus: false });
  }

  /** Open the way to a rank and go there. */
  reveal(rank) {
    const node = this.find(rank);
    if (node === undefined) return;
    const chosen = new Map(this.state.chosen);
    const pages = new Map(this.state.pages);
    for (const above of ancestors(node)) {
      chosen.set(above, true);
      pages.set(above, Infinity);
    }
    this.setState({ chosen, pages, trouble: false, focus: String(rank), refocus: true });
  }

  find(rank) {
    const within = (node) => (node.rank === rank ? node : node.children.map(within).find(Boolean));
    return this.root === null ? undefined : within(this.root);
  }

  choose(changes) {
    const chosen = new Map(this.state.chosen);
    for (const [rank, open] of changes) chosen.set(rank, open);
    this.setState({ chosen });
  }

  all(open) {
    const ranks = this.root.size <= MAX_OPEN || !open ? flatRanks(this.root) : [];
    this.setState({ chosen: new Map(ranks.map((rank) => [rank, open || rank === this.root.rank])), pages: new Map() });
  }

  activate(item) {
    this.setState({ focus: keyOf(item) });
    if (item.more) {
      const pages = new Map(this.state.pages);
      pages.set(item.rank, (pages.get(item.rank) ?? 1) + 1);
      this.setState({ pages });
    } else if (!item.leaf) this.choose([[item.rank, !item.open]]);
  }

  key(event, item, items) {
    const at = items.indexOf(item);
    const above = items.find((each) => each.shown.includes(item));
    const go = (to) => to !== undefined && this.setState({ focus: keyOf(to), refocus: true });
    const handle = {
      ArrowDown: () => go(items[at + 1]),
      ArrowUp: () => go(items[at - 1]),
      Home: () => go(items[0]),
      End: () => go(items.at(-1)),
      ArrowRight: () => (item.open ? go(item.shown[0]) : item.leaf || this.choose([[item.rank, true]])),
      ArrowLeft: () => (item.open ? this.choose([[item.rank, false]]) : go(above)),
      Enter: () => this.activate(item),
      " ": () => this.activate(item),
      "*": () => this.choose(flatRanks(item.node).map((rank) => [rank, true])),
      Escape: () => this.props.onCard(null),
    }[event.key];
    if (handle === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    handle();
  }

  render({ docs, now }, { trouble, chosen, pages, width }) {
    this.root = build(docs);
    const heading = html`<h2 id="overlay-title">Overlay</h2>`;
    if (this.root === null) {
      return html`<section class="panel overlay" aria-labelledby="overlay-title">${heading}
        <div ref=${(frame) => (this.frame = frame)} class="empty">Nothing is known of the tree yet.</div></section>`;
    }
    const first = trouble ? new Set(flatRanks(this.root)) : openAtFirst(this.root, width < PHONE ? PHONE_ROWS : ROWS);
    const open = (rank) => chosen.get(rank) ?? first.has(rank);
    const wanted = trouble ? troubled : () => true;
    const shown = visible(this.root, open, (rank) => pages.get(rank) ?? 1, wanted);
    return html`<section class="panel overlay" aria-labelledby="overlay-title">
      <header>${heading}<${Tally} tally=${this.root.tally} all=${["full"]} />
        <span class="tools">
          <button aria-pressed=${trouble} disabled=${!trouble && !troubled(this.root)}
            onClick=${() => this.setState({ trouble: !trouble, chosen: new Map() })}>Trouble only</button>
          <button onClick=${() => this.all(true)}>Expand all</button>
          <button onClick=${() => this.all(false)}>Collapse</button>
        </span></header>
      <div class="scroll" ref=${(frame) => (this.frame = frame)}>${this.draw(shown, width, now)}</div>
    </section>`;
  }

  draw(shown, width, now) {
    const layout = tree().nodeSize([ROW, 1]).separation((a, b) => (a.parent === b.parent ? 1 : APART));
    const laid = layout(hierarchy(shown, (item) => item.shown));
    const nodes = laid.descendants();
    const depth = laid.height + 1;
    const column = Math.max(NARROW, Math.min(WIDE, Math.floor((width - 2 * MARGIN + GAP) / depth)));
    const [top, bottom] = nodes.reduce(([low, high], { x }) => [Math.min(low, x), Math.max(high, x)], [0, 0]);
    const last = nodes.reduce((most, node) => Math.max(most, node.y * column + boxOf(node.data, column)), 0);
    const size = { wide: last + 2 * MARGIN, high: bottom - top + HIGH + 2 * MARGIN };
    const place = (node) => ({ x: MARGIN + node.y * column, y: MARGIN + node.x - top });
    const items = flat(shown);
    const focus = items.some((item) => keyOf(item) === this.state.focus) ? this.state.focus : keyOf(shown);
    return html`<svg class="tree" role="tree" aria-label="Brokers" width=${size.wide} height=${size.high}
        viewBox=${`0 0 ${size.wide} ${size.high}`}>
      <g aria-hidden="true">${laid.links().map(
        ({ source, target }) => link(place(source), place(target), boxOf(source.data, column), target.data),
      )}</g>
      ${nodes.map((node) => this.node(node, place(node), boxOf(node.data, column), focus, items, now))}
    </svg>`;
  }

  node({ data: item, depth, parent }, { x, y }, box, focus, items, now) {
    const { node, more } = item;
    const name = more ? "more" : condition(node.doc);
    const siblings = parent?.data.shown ?? [item];
    const events = {
      onClick: () => this.activate(item),
      onKeyDown: (event) => this.key(event, item, items),
      onFocus: (event) => {
        if (!more) this.props.onCard(node.rank, event.currentTarget);
        this.setState({ focus: keyOf(item) });
      },
      onBlur: () => this.props.onCard(null),
      onMouseEnter: (event) => more || this.props.onCard(node.rank, event.currentTarget),
      onMouseLeave: () => this.props.onCard(null),
    };
    return html`<g key=${keyOf(item)} data-key=${keyOf(item)} data-rank=${more ? undefined : item.rank}
        data-condition=${name} class=${`node n-${name}${item.leaf ? "" : " inner"}`} role="treeitem"
        aria-level=${depth + 1} aria-setsize=${siblings.length} aria-posinset=${siblings.indexOf(item) + 1}
        aria-expanded=${item.leaf ? undefined : String(item.open)} aria-label=${spoken(item, now)}
        tabindex=${keyOf(item) === focus ? 0 : -1} transform=${`translate(${x} ${y})`} ...${events}>
      <rect class="box" width=${box} height=${HIGH} rx="5" />
      ${more ? html`<text class="rank" x="10" y="15">+${count(more.size)} more</text>` : label(item, box)}
      ${(more || (!item.open && !item.leaf)) && summary(more ? more.tally : below(node), box)}
    </g>`;
  }
}

/** What stands at the right of a node: how many are below, or that they are shown. */
const badgeOf = ({ node, open, leaf }) => (leaf ? "" : open ? "−" : `+${count(node.size - 1)}`);

/** How wide a node is: its column, and more where what it has to say is longer. */
function boxOf(item, column) {
  const words = item.more ? `+${count(item.more.size)} more` : `${item.node.rank}${badgeOf(item)}`;
  return Math.max(column - GAP, Math.ceil((item.leaf ? 36 : 41) + words.length * 8));
}

function label(item, box) {
  const { node } = item;
  const rank = String(node.rank);
  const badge = badgeOf(item);
  const from = 26 + rank.length * 7.6 + 6;
  const letters = Math.floor((box - from - badge.length * 7.5 - 16) / LETTER);
  return html`<${ShapePath} name=${condition(node.doc)} x=${7} y=${5} />
    <text class="rank" x="26" y="15">${rank}</text>
    <text class="host" x=${from} y="15">${fitting(node.doc.host ?? "", letters)}</text>
    ${badge && html`<text class="badge" x=${box - 8} y="15" text-anchor="end">${badge}</text>`}`;
}

/** The tally of what is below a node. */
function below(node) {
  const tally = { ...node.tally };
  tally[condition(node.doc)] -= 1;
  return tally;
}

/** A line along the lower edge: how many below are in which condition. */
function summary(tally, box) {
  const all = CONDITIONS.reduce((sum, name) => sum + (tally[name] ?? 0), 0);
  let at = 6;
  return CONDITIONS.filter((name) => tally[name] > 0).map((name) => {
    const wide = Math.max(2, ((box - 12) * tally[name]) / all);
    const part = html`<rect class=${`sum c-${name}`} x=${at} y=${HIGH - 3} width=${wide} height="3" />`;
    at += wide;
    return part;
  });
}

function link(from, to, box, { node, more }) {
  const [x1, y1, x2, y2] = [from.x + box, from.y + HIGH / 2, to.x, to.y + HIGH / 2];
  const middle = (x1 + x2) / 2;
  const name = more ? "full" : condition(node.doc);
  return html`<path class=${`link l-${name}`} d=${`M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`} />`;
}

function spoken({ node, leaf, more }, now) {
  if (more) return `${many(more.size, "more broker")}: ${tallyWords(more.tally)}`;
  const { rank, doc } = node;
  const host = doc.host ? `, ${clean(doc.host)}` : "";
  const since = doc.since ? ` since ${clock(doc.since, now)}` : "";
  const under = leaf ? "" : `, ${many(node.size - 1, "broker")} below: ${tallyWords(below(node))}`;
  return `rank ${rank}${host}, ${condition(doc)}${since}${under}`;
}

const flatRanks = (node) => [node.rank, ...node.children.flatMap(flatRanks)];
