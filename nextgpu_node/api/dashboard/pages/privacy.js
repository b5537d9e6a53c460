import { get, post } from "../api.js";
import { Action, Card, Chip, Command, Empty, Text, useAsked } from "../parts.js";
import { html } from "../vendor/htm-preact.js";
import { ago, bytes, plural, sentence } from "../words.js";

export function Privacy({ say, confirm }) {
  return html`<${Promised} /><${Data} say=${say} confirm=${confirm} /><${Audit} say=${say} />`;
}

const Promised = () => html`
  <p class="notice" role="note">Work units are sealed to the worker process that runs them, and our software keeps nothing of
  them. The owner of the other machine could run a modified node: for secrets, choose peers that you trust.</p>
`;

function Data({ say, confirm }) {
  const [reply, error, again] = useAsked(() => get("/v1/data"), 15000);
  const kinds = reply?.kinds ?? [];
  const ask = (kind) => confirm({
    title: `Delete ${kind.what}?`,
    text: `${plural(kind.files, "file")}, ${bytes(kind.size_bytes)}, in ${kind.place}. This can not be taken back.`,
    confirm: "Delete",
    run: async () => {
      try {
        await post(`/v1/data/${kind.kind}/delete`);
        say(`Deleted: ${kind.what}.`);
        again();
      } catch (failure) {
        say(failure.message, "bad");
      }
    },
  });
  return html`
    <${Card} title="What is on this machine">
      ${kinds.length === 0 ? html`<${Empty}>${error?.message ?? "Asking the node …"}<//>` : html`
        <ul class="rows">
          ${kinds.map((kind) => html`
            <li class="row" key=${kind.kind}>
              <div class="row-main"><b>${kind.what}</b>
                ${kind.files ? html`<${Chip}>${plural(kind.files, "file")}, ${bytes(kind.size_bytes)}<//>` : html`<${Chip}>nothing<//>`}</div>
              <div class="row-text"><${Text} text=${sentence(kind.why)} /></div>
              <div class="row-facts"><span>Kept: <${Text} text=${kind.kept} /></span></div>
              ${kind.files > 0 && kind.deleting === "allowed" && html`
                <button type="button" class="button danger" aria-label="Delete ${kind.what}" onClick=${() => ask(kind)}>Delete</button>`}
              ${kind.files > 0 && kind.deleting === "refused" && html`<span class="muted hint">in use while the node runs</span>`}
            </li>
          `)}
        </ul>
      `}
      <div class="commands"><${Command} text="nextgpu data export --all -o my-data.tar" /><${Command} text="nextgpu data delete --all" /></div>
    <//>
  `;
}

function Audit({ say }) {
  const [reply, error, again] = useAsked(() => get("/v1/audit"), 3000);
  const running = reply?.state === "running";
  const report = reply?.report;
  async function start() {
    try {
      await post("/v1/audit");
      say("The audit has begun. It takes about a minute.");
      again();
    } catch (failure) {
      say(failure.message, "bad");
    }
  }
  return html`
    <${Card} title="Privacy audit" aside=${running ? html`<${Chip} tone="busy">running<//>` : html`<${Action} run=${start} tone="good">Run the audit<//>`}>
      <p>Two nodes of its own send a marked work unit through the real path, end it in seven ways, and search memory, files,
        shared memory, logs, swap and core dumps for what is left.</p>
      ${error && html`<${Empty}>${error.message}<//>`}
      ${running && html`<progress aria-label="The audit is running"></progress>`}
      ${reply?.state === "failed" && html`<p class="wrong" role="alert">It could not be done: ${reply.why}</p>`}
      ${report && html`<${Report} report=${report} began_at_ms=${reply.began_at_ms} />`}
    <//>
  `;
}

function Report({ report, began_at_ms }) {
  const verdict = report.found > 0
    ? html`<p class="verdict bad" role="alert"><b>${plural(report.found, "mark")} found.</b> Plaintext of a work unit was left behind: please report this.</p>`
    : html`<p class="verdict good"><b>${report.ok ? "Nothing was found." : "Nothing was found, but not everything could be tried."}</b> Sandbox tier ${report.isolation_tier}, ${ago(began_at_ms)}.</p>`;
  return html`
    ${verdict}
    <div class="chips" role="list" aria-label="Ways in which units ended">
      ${report.exits.map((one) => html`<span role="listitem" key=${one.unit}><${Chip} tone=${one.ended === one.wanted ? "good" : "bad"}>${one.unit}<//></span>`)}
    </div>
    <ul class="rows tight">
      ${report.places.map((place) => html`
        <li class="row" key=${place.place}>
          <div class="row-main"><span>${place.place}</span>
            ${place.found > 0 ? html`<${Chip} tone="bad">${place.found} found<//>`
              : place.not_searched ? html`<${Chip} tone="warn">not searched<//>` : html`<${Chip} tone="good">clean<//>`}</div>
          <div class="row-facts"><span>${place.not_searched || (place.searched_bytes ? bytes(place.searched_bytes) : "nothing is there")}</span></div>
        </li>
      `)}
    </ul>
  `;
}
