// The tree of brokers as a model: who is below whom, how many are in which state, what is shown. Pure.
//
// A node is {rank, doc, children, parent, depth, size, tally}: `size` counts it and all below, `tally` them by condition.
// A condition is the health status, or "torpid" for one that is full but slow to speak. What is shown of a tree is
// a second, smaller tree of {node, rank, shown, open, more}: collapsed nodes have no `shown`, a node with more children
// than a page has a last one, `more`, that stands for the rest.

export const CONDITIONS = ["full", "torpid", "partial", "degraded", "lost", "offline"];
export const PAGE = 32; // children of one node that are shown before "more"
export const ROWS = 40; // leaves that a tree starts with at most
const TROUBLED = new Set(["torpid", "degraded", "lost", "offline", "partial"]);

/** The condition that a broker is shown in. */
export function condition(doc) {
  if (doc.status === "full" && doc.torpid) return "torpid";
  return CONDITIONS.includes(doc.status) ? doc.status : "offline";
}

/** The tree of all documents, or null where there are none. What has no parent that is known hangs on the lowest rank. */
export function build(docs) {
  const nodes = new Map();
  for (const doc of docs.values()) nodes.set(doc.rank, { rank: doc.rank, doc, children: [], parent: null });
  if (nodes.size === 0) return null;
  const ordered = [...nodes.values()].sort((a, b) => a.rank - b.rank);
  const [root, ...others] = ordered;
  for (const node of others) {
    // A parent has a lower rank than its children, so this cannot make a circle.
    const parent = nodes.get(node.doc.parent);
    node.parent = parent !== undefined && parent.rank < node.rank ? parent : root;
    node.parent.children.push(node);
  }
  for (const node of ordered) node.depth = node.parent === null ? 0 : node.parent.depth + 1;
  for (const node of ordered.reverse()) summarise(node);
  return root;
}

function summarise(node) {
  node.size = 1;
  node.tally = { [condition(node.doc)]: 1 };
  for (const child of node.children) {
    node.size += child.size;
    for (const [name, number] of Object.entries(child.tally)) node.tally[name] = (node.tally[name] ?? 0) + number;
  }
}

/** The ranks that are open at first: whole levels, as long as no more than `rows` leaves come of it. */
export function openAtFirst(root, rows = ROWS) {
  const open = new Set();
  let level = [root];
  let leaves = 1;
  for (;;) {
    const inner = level.filter((node) => node.children.length > 0);
    const gained = inner.reduce((sum, node) => sum + Math.min(node.children.length, PAGE + 1) - 1, 0);
    const first = level[0] === root;
    if (inner.length === 0 || (!first && leaves + gained > rows)) return open;
    for (const node of inner) open.add(node.rank);
    leaves += gained;
    level = inner.flatMap((node) => node.children);
  }
}

/** What is shown: of the nodes that `open(rank)` is true for, the first `pages(rank)` pages of children that `wanted`. */
export function visible(root, open, pages = () => 1, wanted = () => true) {
  const show = (node) => {
    const children = node.children.filter(wanted);
    const isOpen = children.length > 0 && open(node.rank);
    const item = { node, rank: node.rank, open: isOpen, leaf: children.length === 0, shown: [], more: null };
    if (!isOpen) return item;
    const most = PAGE * pages(node.rank);
    // Where not all of them are shown, those with trouble are.
    if (children.length > most) children.sort((a, b) => troubled(b) - troubled(a) || a.rank - b.rank);
    item.shown = children.slice(0, most).map(show);
    const rest = children.slice(most);
    if (rest.length > 0) item.shown.push(remainder(node, rest));
    return item;
  };
  return show(root);
}

function remainder(node, rest) {
  const all = { rank: node.rank, doc: node.doc, children: rest };
  summarise(all);
  all.tally[condition(node.doc)] -= 1; // of the rest only, not of the node itself
  const more = { ranks: rest.length, size: all.size - 1, tally: all.tally };
  return { node, rank: node.rank, open: false, leaf: true, shown: [], more };
}

/** The shown items in the order in which they are read. */
export function flat(item) {
  return [item, ...item.shown.flatMap(flat)];
}

/** Whether something is wrong with a node or below it. */
export function troubled(node) {
  return Object.entries(node.tally).some(([name, number]) => number > 0 && TROUBLED.has(name));
}

/** "31 brokers below: 30 full, 1 lost". */
export function tallyWords(tally) {
  return CONDITIONS.filter((name) => tally[name] > 0).map((name) => `${tally[name]} ${name}`).join(", ");
}

/** The ranks from the root to `rank`, without itself. */
export function ancestors(node) {
  const above = [];
  for (let each = node.parent; each !== null; each = each.parent) above.push(each.rank);
  return above;
}
