import { get, post } from "../api.js";
import { Card, Chip, Command, Copy, Empty, Facts, useAsked } from "../parts.js";
import { html, useState } from "../vendor/htm-preact.js";
import { ago, bytes, clock, plural, seconds, short } from "../words.js";

const TONES = { done: "good", running: "busy", failed: "bad", cancelled: "plain", interrupted: "warn" };
const ENDED = ["done", "failed", "cancelled"];

export function Jobs({ say, confirm }) {
  const [reply, error, again] = useAsked(() => get("/v1/jobs"), 2000);
  const [chosen, setChosen] = useState("");
  const jobs = reply?.jobs ?? [];
  const id = chosen || jobs[0]?.job_id || "";
  return html`
    ${reply?.transfers.length > 0 && html`<${Transfers} units=${reply.transfers} />`}
    ${jobs.length === 0
      ? html`<${Card} title="Your jobs"><${Empty}>${error?.message ?? (reply ? "You have no jobs. These make some:" : "Asking the node …")}<//>
          ${reply && html`<div class="commands"><${Command} text="nextgpu run PROGRAM --input x.safetensors --output y.safetensors" />
          <${Command} text="nextgpu map PROGRAM --inputs DIR --outputs DIR" /></div>`}<//>`
      : html`
        <div class="split">
          <${Card} title="Your jobs">
            <ul class="rows choices">
              ${jobs.map((job) => html`
                <li key=${job.job_id}>
                  <button type="button" class="choice" aria-current=${job.job_id === id ? "true" : "false"} onClick=${() => setChosen(job.job_id)}>
                    <span class="row-main"><span class="id">${job.job_id}</span><${Chip} tone=${TONES[job.status] ?? "plain"}>${job.status}<//></span>
                    <progress max=${job.shards || 1} value=${job.done} aria-label="${job.done} of ${job.shards} done"></progress>
                    <span class="row-facts"><span>${job.kind}, ${job.done} of ${plural(job.shards, "part")}${job.failed ? `, ${job.failed} failed` : ""}</span>
                      <span>${ago(job.created_ms)}</span></span>
                  </button>
                </li>
              `)}
            </ul>
          <//>
          ${id && html`<${Detail} key=${id} id=${id} say=${say} confirm=${confirm} again=${again} />`}
        </div>
      `}
  `;
}

// A peer's name is 52 letters long, and each line has one.
const brief = (text) => text.replace(/\b12D3KooW\w{44}\b/g, short).replaceAll("peer_id", "peer");

const Transfers = ({ units }) => html`
  <${Card} title="On other machines now">
    <ul class="rows">
      ${units.map((unit) => html`
        <li class="row" key=${unit.unit_id}>
          <div class="row-main"><span class="id">${short(unit.unit_id) || "connecting"}</span><${Chip} tone="busy">${unit.state}<//></div>
          <div class="row-facts"><span>${seconds(unit.age_s)}</span><span>${bytes(unit.input_bytes)} sent</span><span>${bytes(unit.output_bytes)} back</span></div>
        </li>
      `)}
    </ul>
  <//>
`;

function Detail({ id, say, confirm, again }) {
  const [reply, error] = useAsked(() => get(`/v1/jobs/${id}`), 2000, [id]);
  if (!reply) return html`<${Card} title="Job ${id}"><${Empty}>${error?.message ?? "Asking the node …"}<//><//>`;
  const { job, lines, results } = reply;
  const cancel = () => confirm({
    title: `Cancel job ${id}?`,
    text: "Its units on other machines end. What is done so far is kept, and `nextgpu retry` goes on from there.",
    confirm: "Cancel the job",
    run: async () => {
      try {
        const { cancelled } = await post(`/v1/jobs/${id}/cancel`);
        say(cancelled ? "The job was cancelled." : "Nobody works at it now.");
        again();
      } catch (failure) {
        say(failure.message, "bad");
      }
    },
  });
  const facts = [
    ["Status", `${job.status}${job.why ? `: ${job.why}` : ""}`],
    ["Parts", `${job.done} of ${job.shards} done${job.failed ? `, ${job.failed} failed` : ""}`],
    ["Begun", ago(job.created_ms)],
  ];
  const directory = [
    ["Directory", html`<span class="path">${reply.directory}</span><${Copy} text=${reply.directory} what="the directory" />`],
  ];
  return html`
    <${Card} title="Job ${id}" aside=${!ENDED.includes(job.status) && html`<button type="button" class="button danger" onClick=${cancel}>Cancel</button>`}>
      <${Facts} facts=${facts} /><${Facts} wide=${true} facts=${directory} />
      <h3>Results</h3>
      ${results.length === 0 ? html`<${Empty}>None.<//>` : html`
        <ul class="rows tight">
          ${results.map((one) => html`
            <li class="row" key=${one.name + one.place}>
              <div class="row-main"><span class="path" title=${one.place}>${one.name || one.place}</span>
                ${one.size_bytes >= 0 ? html`<${Chip} tone="good">${bytes(one.size_bytes)}<//>` : html`<${Chip}>not yet<//>`}</div>
              ${one.size_bytes >= 0 && html`<${Copy} text=${one.place} what="where ${one.name || "it"} is" />`}
            </li>
          `)}
        </ul>
      `}
      <h3>Log</h3>
      ${lines.length === 0 ? html`<${Empty}>Nothing has happened yet.<//>` : html`
        <ol class="log" tabindex="0" aria-label="The last events of the job">
          ${lines.map((line, number) => html`<li key=${number}><time>${clock(line.at_ms)}</time> <b>${line.event.replace(/[._]/g, " ")}</b> ${brief(line.text)}</li>`)}
        </ol>
      `}
      <p class="muted">Results stay in your own files: the node tells where they are, and never reads them.</p>
    <//>
  `;
}
