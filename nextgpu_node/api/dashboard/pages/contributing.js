import { get, post, put } from "../api.js";
import { Action, Card, Chip, Command, Empty, useAsked } from "../parts.js";
import { html, useEffect, useState } from "../vendor/htm-preact.js";
import { ago, bytes, seconds, short } from "../words.js";

// Settings in the order in which an owner thinks of them; what is not named here comes last.
const GROUPS = [
  ["When to lend", [
    ["hours", "Hours"],
    ["only_when_idle", "Only while I am away"],
    ["idle_minutes", "Away after so many minutes"],
    ["on_battery", "Also on battery"],
    ["exclusive_apps", "Never beside these programs"],
  ]],
  ["How much to lend", [
    ["max_vram", "Memory of the card"],
    ["max_utilisation", "Use of the card, in percent"],
    ["max_temperature", "Pause above, in °C"],
    ["max_power", "Pause above, in watts"],
    ["max_memory", "Memory of one unit"],
    ["threads", "Processor threads of a unit"],
    ["max_concurrent_units", "Units at a time"],
    ["max_unit_seconds", "Longest unit, in seconds"],
    ["max_upload", "Upload a second"],
    ["max_download", "Download a second"],
  ]],
];
const NAMED = new Set(GROUPS.flatMap(([, settings]) => settings.map(([key]) => key)));

export function Contributing({ node, say, confirm }) {
  return html`
    <${Units} units=${node.units.filter((unit) => unit.role === "lending")} say=${say} confirm=${confirm} />
    <${Limits} say=${say} />
    <${History} />
  `;
}

function Units({ units, say, confirm }) {
  async function stop(unit) {
    const reply = await post(`/v1/units/${unit.unit_id}/cancel`);
    say(reply.cancelled ? "The unit was ended, its worker is gone." : "It has ended already.");
  }
  const ask = (unit) => confirm({
    title: "Stop this unit now?",
    text: "Its worker is killed and the memory is free at once. Whoever sent it is told, and goes on elsewhere.",
    confirm: "Stop now",
    run: () => stop(unit).catch((error) => say(error.message, "bad")),
  });
  return html`
    <${Card} title="Running here now">
      ${units.length === 0
        ? html`<${Empty}>No work unit of anybody is here now.<//>`
        : html`
          <ul class="rows">
            ${units.map((unit) => html`
              <li class="row" key=${unit.unit_id || unit.age_s}>
                <div class="row-main">
                  <span class="id">${unit.unit_id ? short(unit.unit_id) : "not named yet"}</span>
                  <${Chip} tone=${unit.state === "running" ? "good" : "plain"}>${unit.state}<//>
                </div>
                <div class="row-facts">
                  <span>${seconds(unit.age_s)}</span>
                  ${unit.memory_bytes > 0 && html`<span>${bytes(unit.memory_bytes)} of memory</span>`}
                  <span>${bytes(unit.input_bytes)} in, ${bytes(unit.output_bytes)} out, sealed</span>
                </div>
                ${unit.unit_id && html`<button type="button" class="button danger" onClick=${() => ask(unit)}>Stop now</button>`}
              </li>
            `)}
          </ul>
        `}
    <//>
  `;
}

function Limits({ say }) {
  const [reply, error, again] = useAsked(() => get("/v1/limits"));
  if (error?.status === 404) {
    return html`<${Card} title="Limits and schedule"><p>They are in the settings of the node:</p><${Command} text="nextgpu config show" /><//>`;
  }
  if (!reply) return html`<${Card} title="Limits and schedule"><${Empty}>${error?.message ?? "Asking the node …"}<//><//>`;
  const save = async (key, value) => {
    const saved = await put("/v1/limits", { changes: { [key]: value } });
    say(saved.saved ? "Saved." : `Holds until the node ends. ${saved.note}`, saved.saved ? "good" : "bad");
    again();
  };
  const found = new Map(reply.limits.map((limit) => [limit.key, limit]));
  const others = reply.limits.filter((limit) => !NAMED.has(limit.key)).map(({ key }) => [key, key.replaceAll("_", " ")]);
  const fields = (settings) => html`
    <div class="settings">
      ${settings.filter(([key]) => found.has(key)).map(([key, name]) => html`
        <${Setting} key=${key} limit=${found.get(key)} name=${name} save=${save} say=${say} />`)}
    </div>`;
  return html`
    ${GROUPS.map(([title, settings]) => html`<${Card} key=${title} title=${title}>${fields(settings)}<//>`)}
    <${Card} label="More settings">
      <details><summary>More settings</summary>${fields(others)}</details>
    <//>
  `;
}

function Setting({ limit, name, save, say }) {
  const [draft, setDraft] = useState(limit.value);
  const [wrong, setWrong] = useState("");
  useEffect(() => setDraft(limit.value), [limit.value]);
  const id = `limit-${limit.key}`;
  const changed = draft !== limit.value;
  async function store(value) {
    try {
      await save(limit.key, value);
      setWrong("");
    } catch (error) {
      setWrong(error.message);
      say(error.message, "bad");
    }
  }
  if (limit.value === "true" || limit.value === "false") {
    const on = limit.value === "true";
    return html`
      <div class="setting">
        <label for=${id}>${name}</label>
        <input id=${id} type="checkbox" class="check" checked=${on} onChange=${() => store(on ? "false" : "true")} />
      </div>
    `;
  }
  return html`
    <form class="setting" onSubmit=${(event) => { event.preventDefault(); store(draft); }}>
      <label for=${id}>${name}</label>
      <div class="setting-value">
        <input id=${id} type="text" value=${draft} placeholder=${limit.key === "hours" ? "always" : "none"} autocomplete="off" spellcheck=${false}
          aria-describedby="${id}-help" aria-invalid=${wrong ? "true" : "false"} onInput=${(event) => setDraft(event.target.value)} />
        ${changed && html`<button type="submit" class="button good">Save</button>`}
        <small id="${id}-help" class=${wrong ? "wrong" : "muted"}>${wrong || limit.expected}</small>
      </div>
    </form>
  `;
}

function History() {
  const [reply, error] = useAsked(() => get("/v1/history?limit=50"), 10000);
  if (error?.status === 404) return null;
  const units = reply?.units ?? [];
  return html`
    <${Card} title="What ran here" aside=${reply && html`<${Chip}>${reply.enabled ? `kept ${reply.keep_days} days` : "not recorded"}<//>`}>
      ${units.length === 0
        ? html`<${Empty}>${error?.message ?? (reply ? "Nothing yet." : "Asking the node …")}<//>`
        : html`
          <ul class="rows">
            ${units.map((unit) => html`
              <li class="row" key=${unit.unit_id}>
                <div class="row-main"><span class="id">${short(unit.unit_id)}</span>
                  <${Chip} tone=${unit.status === "done" ? "good" : "plain"}>${unit.status}<//>
                  ${unit.wiped && html`<${Chip}>wiped<//>`}</div>
                <div class="row-facts">
                  <span>${ago(unit.started_at_ms)}</span><span>${seconds(unit.wall_ms / 1000)} on ${unit.device}</span>
                  <span>${bytes(unit.peak_memory_bytes)} at most</span>
                </div>
              </li>
            `)}
          </ul>
        `}
      <p class="muted">Never what a unit held. <${Command} text="nextgpu history" /></p>
    <//>
  `;
}
