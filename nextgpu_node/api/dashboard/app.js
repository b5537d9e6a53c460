// The dashboard: one page, five views, everything from the node that served it.

import { follow, takeToken } from "./api.js";
import { Confirm, Icon } from "./parts.js";
import { Contributing } from "./pages/contributing.js";
import { Jobs } from "./pages/jobs.js";
import { Overview } from "./pages/overview.js";
import { Peers } from "./pages/peers.js";
import { Privacy } from "./pages/privacy.js";
import { WINDOW_S } from "./plot.js";
import { html, render, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { sharingWords } from "./words.js";

const PAGES = [
  // address, title, name where there is little room
  ["overview", "Overview", "Overview", Overview],
  ["contributing", "Contributing", "Lending", Contributing],
  ["jobs", "Jobs", "Jobs", Jobs],
  ["peers", "Peers", "Peers", Peers],
  ["privacy", "Data & privacy", "Privacy", Privacy],
];
const SAID_MS = 5000;

function App() {
  const [page, setPage] = useState(pageOfAddress());
  const [said, setSaid] = useState(null);
  const [asked, setAsked] = useState(null);
  const node = useNode();
  const heading = useRef();
  const opened = useRef(false);

  useEffect(() => {
    const move = () => setPage(pageOfAddress());
    addEventListener("hashchange", move);
    return () => removeEventListener("hashchange", move);
  }, []);
  const [name, title, , View] = PAGES.find(([one]) => one === page);
  useEffect(() => {
    document.title = `${title} · NextGPU`;
    // Whoever cannot see the page change hears its name.
    if (opened.current) heading.current.focus();
    opened.current = true;
    scrollTo(0, 0);
  }, [page]);
  useEffect(() => {
    if (!said) return undefined;
    const timer = setTimeout(() => setSaid(null), SAID_MS);
    return () => clearTimeout(timer);
  }, [said]);
  const say = (text, tone = "good") => setSaid({ text, tone });

  if (node.locked) return html`<${Locked} />`;
  return html`
    <a class="skip" href="#content" onClick=${(event) => { event.preventDefault(); heading.current.focus(); }}>Skip to the content</a>
    <div class="frame">
      <nav aria-label="Pages">
        <div class="brand"><img src="/icon.svg" alt="" width="28" height="28" /><span>NextGPU</span></div>
        <ul>
          ${PAGES.map(([one, label, brief]) => html`
            <li key=${one}>
              <a href="#/${one}" aria-current=${one === name ? "page" : undefined}>
                <${Icon} name=${one} /><span class="wide">${label}</span><span class="narrow">${brief}</span>
              </a>
            </li>
          `)}
        </ul>
        <${Pulse} node=${node} />
      </nav>
      <main id="content">
        <h1 tabindex="-1" ref=${heading}>${title}</h1>
        ${!node.answers && node.status && html`<p class="notice bad" role="alert">The node does not answer. What is shown here is old.</p>`}
        <${View} node=${node} say=${say} confirm=${setAsked} />
      </main>
    </div>
    <div class="said" role="status" aria-live="polite">${said && html`<p class=${said.tone}>${said.text}</p>`}</div>
    <${Confirm} asked=${asked} close=${() => setAsked(null)} />
  `;
}

const Pulse = ({ node }) => html`
  <div class="pulse">
    <span class="dot ${node.answers ? sharingWords(node.sharing, "").state : "gone"}"></span>
    <span>${node.answers ? sharingWords(node.sharing, "").headline : "No answer"}</span>
    ${node.status && html`<small>version ${node.status.version}</small>`}
  </div>
`;

const Locked = () => html`
  <main class="locked">
    <img src="/icon.svg" alt="" width="48" height="48" />
    <h1>This page needs its key</h1>
    <p>The key is kept in the memory of one tab, and nowhere else. Open the dashboard again with:</p>
    <p><code>nextgpu web</code></p>
  </main>
`;

function pageOfAddress() {
  const wanted = location.hash.replace(/^#\//, "");
  return PAGES.some(([name]) => name === wanted) ? wanted : "overview";
}

// What the node tells by itself, and the figures of the last minutes.
function useNode() {
  const [state, setState] = useState({
    status: null, sharing: null, units: [], gpus: [], history: {}, answers: false, locked: !hasKey,
  });
  const change = (part) => setState((old) => ({ ...old, ...(typeof part === "function" ? part(old) : part) }));
  useEffect(() => {
    if (!hasKey) return;
    follow(
      (event) => change((old) => taken(old, event)),
      (answers, status) => change({ answers, locked: status === 401 }),
    );
  }, []);
  return { ...state, setSharing: (sharing) => change({ sharing }) };
}

function taken(old, event) {
  switch (event.event) {
    case "node.status": return { status: event.status };
    case "sharing.changed": return { sharing: event.sharing };
    case "units.changed": return { units: event.units.units };
    case "devices.sampled": return { gpus: event.gpus.gpus, history: grown(old.history, event) };
    default: return {};
  }
}

function grown(history, event) {
  const at_s = event.at_ms / 1000;
  const more = {};
  for (const gpu of event.gpus.gpus) {
    const before = history[gpu.label] ?? {};
    const used = 1 - gpu.memory_free_bytes / gpu.memory_total_bytes;
    more[gpu.label] = {
      utilisation: appended(before.utilisation, at_s, gpu.utilisation),
      memory: appended(before.memory, at_s, used),
      temperature: appended(before.temperature, at_s, gpu.temperature_c),
      power: appended(before.power, at_s, gpu.power_w),
    };
  }
  return more;
}

function appended([times, values] = [[], []], at_s, value) {
  const first = times.findIndex((time) => time > at_s - WINDOW_S);
  const from = first < 0 ? times.length : first;
  return [[...times.slice(from), at_s], [...values.slice(from), value]];
}

const hasKey = takeToken();
const place = document.getElementById("app");
place.replaceChildren();
render(html`<${App} />`, place);
