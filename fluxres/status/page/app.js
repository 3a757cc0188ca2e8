// The page as a whole: one feed, one picture, two views (`#/` all, `#/job/ID` one job), and the keys.
//
// Whatever the feed brings is drawn at most once a frame and FASTEST times a second, and once a second for what tells
// of time. A hidden tab is not drawn.

import { Away, Meanwhile, TokenForm, UnderWay, connectionWords } from "./banners.js";
import { RankCard, placeCard } from "./card.js";
import { EventsPanel } from "./events.js";
import { Feed } from "./feed.js";
import { clean, coarse, count, instanceName } from "./format.js";
import { Help } from "./help.js";
import { JobPage } from "./job.js";
import { JobsPanel } from "./jobs.js";
import { NodesPanel } from "./nodes.js";
import { Strip } from "./strip.js";
import { TreePanel } from "./tree.js";
import { Component, html, render } from "./ui.js";

const FASTEST = 8; // drawings a second
const seconds = () => Date.now() / 1000;

function route() {
  const match = /^#\/job\/([^/]+)$/.exec(location.hash);
  if (match === null) return null;
  try {
    return decodeURIComponent(match[1]);
  } catch {
    return match[1];
  }
}

class App extends Component {
  constructor(props) {
    super(props);
    this.feed = new Feed(() => this.schedule());
    this.state = { job: route(), card: null, help: false, tick: 0, theme: document.documentElement.dataset.theme };
    this.drawn = 0;
    this.due = null;
    this.show = (rank, target) => this.setState({ card: rank === null ? null : { rank, place: placeCard(target) } });
    this.hold = (tree) => (this.tree = tree);
    this.reveal = (rank) => this.tree?.reveal(rank);
  }

  componentDidMount() {
    addEventListener("hashchange", () => this.go(route()));
    addEventListener("keydown", (event) => this.key(event));
    addEventListener("scroll", () => this.state.card && this.setState({ card: null }), true);
    setInterval(() => this.schedule(), 1000);
    this.feed.start();
  }

  componentDidUpdate() {
    const name = instanceName(this.feed.hello?.instance);
    const away = this.feed.connection.phase === "live" || this.feed.connection.phase === "connecting" ? "" : "⚠ ";
    const job = this.state.job ? `${clean(this.state.job, 40)} · ` : "";
    document.title = `${away}${job}${name ? `${name} · ` : ""}fluxres`;
  }

  schedule() {
    if (this.due !== null) return;
    const wait = Math.max(0, this.drawn + 1000 / FASTEST - performance.now());
    this.due = setTimeout(() => requestAnimationFrame(() => {
      this.due = null;
      this.drawn = performance.now();
      this.setState({ tick: this.state.tick + 1 });
    }), wait);
  }

  /** Show a job, or all; back from a job to where its link is. */
  go(job) {
    const left = this.state.job;
    this.setState({ job, card: null }, () => {
      const link = `[data-job="${CSS.escape(left ?? "")}"] a`;
      const there = document.querySelector(job ? "#job-title" : link);
      if (job || there === null) scrollTo(0, 0);
      (there ?? document.getElementById("main")).focus();
    });
  }

  key(event) {
    const typing = event.target.closest?.("input, textarea, select");
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Escape") {
      if (typing) event.target.blur();
      else if (this.state.help) this.setState({ help: false });
      else if (this.state.card) this.setState({ card: null });
      else if (this.state.job) location.hash = "#/";
      return;
    }
    if (typing) return;
    const focus = (selector) => document.querySelector(selector)?.focus();
    const act = {
      "?": () => this.setState({ help: !this.state.help }),
      "/": () => focus("#job-filter"),
      d: () => this.theme(),
      o: () => focus('.tree [tabindex="0"]'),
      n: () => focus("#nodes-title"),
      j: () => focus("#jobs-title"),
      e: () => focus("#events-title"),
    }[event.key];
    if (act === undefined) return;
    event.preventDefault();
    act();
  }

  skip(event) {
    event.preventDefault(); // the hash is where we are
    document.getElementById("main").focus();
  }

  theme() {
    this.setState({ theme: window.fluxresTheme() });
  }

  render(_, { job, card, help, theme }) {
    const { feed } = this;
    const { connection, picture } = feed;
    const stale = connection.phase !== "live" && picture.position !== null;
    const now = feed.now();
    return html`
      <a class="skip" href="#main" onClick=${this.skip}>Skip to the content</a>
      <${Head} feed=${feed} theme=${theme} now=${now} onTheme=${() => this.theme()}
        onHelp=${() => this.setState({ help: true })} />
      <p class="sr" role="status" aria-live="polite">${clean(`Connection: ${connectionWords(connection)}`)}</p>
      <${Away} connection=${connection} rank=${feed.hello?.rank} time=${seconds()} retry=${() => feed.retryNow()} />
      ${connection.phase === "token" &&
      html`<${TokenForm} why=${connection.why} authorize=${(token) => feed.authorize(token)} />`}
      <${UnderWay} doc=${picture.doc("instance", "recovery")} now=${now} />
      <${Meanwhile} absence=${feed.absence} picture=${picture} now=${now} dismiss=${() => feed.dismiss()} />
      <main id="main" tabindex="-1" class=${stale ? "stale" : ""} aria-busy=${picture.position === null}>
        ${job ? html`<${JobPage} key=${job} id=${job} feed=${feed} now=${now} />` : this.overview(now)}
      </main>
      ${card && !job && html`<${RankCard} rank=${card.rank} place=${card.place} picture=${picture} now=${now} />`}
      ${help && html`<${Help} close=${() => this.setState({ help: false })} />`}`;
  }

  overview(now) {
    const { picture, log } = this.feed;
    if (picture.position === null) {
      return this.feed.connection.phase === "connecting" ? html`<p class="empty waiting">Asking the broker…</p>` : null;
    }
    const instance = (key) => picture.doc("instance", key);
    const minute = Math.floor(now / 60) * 60;
    return html`<${Strip} about=${instance("about")} jobs=${instance("jobs")} resources=${instance("resources")}
        now=${Math.floor(now)} />
      <div class="columns">
        <div class="column">
          <${TreePanel} docs=${picture.docs("overlay")} version=${picture.version("overlay")} now=${minute}
            onCard=${this.show} hold=${this.hold} />
          <${NodesPanel} docs=${picture.docs("resources")} version=${picture.version("resources")}
            resources=${instance("resources")} onCard=${this.show} onReveal=${this.reveal} />
          <${JobsPanel} docs=${picture.docs("jobs")} version=${picture.version("jobs")} now=${Math.floor(now)}
            counts=${instance("jobs")} queue=${instance("queue")} />
        </div>
        <${EventsPanel} docs=${picture.docs("events")} version=${picture.version("events")} log=${log.docs("log")}
          logVersion=${log.version("log")} minute=${minute} />
      </div>`;
  }
}

const Head = ({ feed, theme, now, onTheme, onHelp }) => {
  const { hello, connection, picture } = feed;
  const about = picture.doc("instance", "about");
  const version = hello?.software && `version ${clean(hello.software, 40).replace(/^fluxres /, "")}`;
  const facts = [version, about?.host && clean(about.host, 60)];
  const toTop = (event) => {
    event.preventDefault();
    scrollTo(0, 0);
  };
  return html`<header class="head">
    <a class="brand" href="#/"><img src="/static/icon.svg" alt="" width="22" height="22" />fluxres</a>
    <b class="instance" title=${clean(hello?.instance, 60)}><bdi>${instanceName(hello?.instance)}</bdi></b>
    <span class="of facts">${hello && `${count(hello.size)} brokers · `}${facts.filter(Boolean).join(" · ")}${
      about?.started && ` · up ${coarse(now - about.started)}`}</span>
    ${feed.absence !== null && html`<a class="chip t-warn" href="#meanwhile" onClick=${toTop}>what happened meanwhile ↑</a>`}
    <span class=${`connection s-${connection.phase}`} data-connection=${connection.phase}>
      <i aria-hidden="true"></i>${connectionWords(connection)}</span>
    <span class="tools"><button onClick=${onTheme} aria-label=${`Change to ${theme === "dark" ? "light" : "dark"} colours`}
        title="Dark or light (d)">${theme === "dark" ? "☀" : "☾"}</button>
      <button onClick=${onHelp} aria-label="Keys and shapes" title="Keys and shapes (?)">?</button></span>
  </header>`;
};

render(html`<${App} />`, document.getElementById("app"));
