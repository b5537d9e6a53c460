// What every page is made of.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";

const PATHS = {
  overview: "M3 12h4l3 8 4-16 3 8h4",
  contributing: "M12 3v12m0-12l-4 4m4-4l4 4M4 15v4a2 2 0 002 2h12a2 2 0 002-2v-4",
  jobs: "M4 6h16M4 12h16M4 18h10",
  peers: "M12 8a3 3 0 100-6 3 3 0 000 6zM5 22a3 3 0 100-6 3 3 0 000 6zM19 22a3 3 0 100-6 3 3 0 000 6zM12 8v5m0 0l-5.5 4M12 13l5.5 4",
  privacy: "M12 3l8 3v6c0 5-3.5 8-8 9-4.5-1-8-4-8-9V6l8-3z",
  copy: "M9 9h10v11H9zM5 15V4h10",
};

export const Icon = ({ name }) => html`
  <svg class="icon" viewBox="0 0 24 24" aria-hidden="true" focusable="false"><path d=${PATHS[name]} /></svg>
`;

export const Card = ({ title, aside, children, label }) => html`
  <section class="card" aria-label=${label ?? title}>
    ${title && html`<header class="card-head"><h2>${title}</h2>${aside}</header>`}
    ${children}
  </section>
`;

export const Empty = ({ children }) => html`<p class="empty">${children}</p>`;

export const Chip = ({ tone = "plain", children }) => html`<span class="chip ${tone}">${children}</span>`;

export const Facts = ({ facts, wide }) => html`
  <dl class="facts ${wide ? "wide" : ""}">
    ${facts.filter(Boolean).map(([name, value]) => html`<div key=${name}><dt>${name}</dt><dd>${value}</dd></div>`)}
  </dl>
`;

// A button that waits for what it started, and cannot be pressed twice.
export function Action({ run, tone = "", label, children }) {
  const [busy, setBusy] = useState(false);
  const alive = useRef(true);
  useEffect(() => () => { alive.current = false; }, []);
  async function press() {
    setBusy(true);
    try {
      await run();
    } finally {
      if (alive.current) setBusy(false);
    }
  }
  return html`<button type="button" class="button ${tone}" disabled=${busy} aria-label=${label} onClick=${press}>${children}</button>`;
}

export function Copy({ text, what }) {
  const [done, setDone] = useState(false);
  async function copy() {
    try {
      await navigator.clipboard.writeText(text);
      setDone(true);
      setTimeout(() => setDone(false), 1500);
    } catch {
      setDone(false);
    }
  }
  return html`<button type="button" class="copy" aria-label="Copy ${what}" onClick=${copy}>
    ${done ? html`<span class="copied">Copied</span>` : html`<${Icon} name="copy" />`}
  </button>`;
}

// Words between backticks are what one types.
export const Text = ({ text }) => text.split("`").map((part, k) => (k % 2 ? html`<code key=${k}>${part}</code>` : part));

export const Command = ({ text }) => html`
  <span class="command"><code>${text}</code><${Copy} text=${text} what="the command" /></span>
`;

// Asks before what cannot be taken back.  `asked` is null or {title, text, confirm, run}.
export function Confirm({ asked, close }) {
  const dialog = useRef();
  useEffect(() => {
    if (asked && !dialog.current.open) dialog.current.showModal();
    if (!asked && dialog.current.open) dialog.current.close();
  }, [asked]);
  return html`
    <dialog ref=${dialog} onClose=${close} aria-labelledby="confirm-title">
      ${asked && html`
        <h2 id="confirm-title">${asked.title}</h2>
        <p>${asked.text}</p>
        <div class="buttons end">
          <button type="button" class="button" onClick=${close}>Keep it</button>
          <${Action} tone="danger" run=${async () => { await asked.run(); close(); }}>${asked.confirm}<//>
        </div>
      `}
    </dialog>
  `;
}

// Asks the node for `load` now, and again every so often; [value, error, again].
export function useAsked(load, every_ms = 0, depends = []) {
  const [value, setValue] = useState(null);
  const [error, setError] = useState(null);
  const again = useRef(() => {});
  useEffect(() => {
    let alive = true;
    let timer = 0;
    async function run() {
      clearTimeout(timer);
      try {
        const found = await load();
        if (alive) { setValue(found); setError(null); }
      } catch (failure) {
        if (alive) setError(failure);
      }
      if (alive && every_ms) timer = setTimeout(run, every_ms);
    }
    again.current = run;
    run();
    return () => { alive = false; clearTimeout(timer); };
  }, depends);
  return [value, error, () => again.current()];
}
