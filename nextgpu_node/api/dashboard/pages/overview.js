import { post, put } from "../api.js";
import { Action, Card, Chip, Copy, Empty, Facts } from "../parts.js";
import { Plot } from "../plot.js";
import { html, useState } from "../vendor/htm-preact.js";
import { bytes, plural, seconds, sharingWords, short } from "../words.js";

export function Overview({ node, say }) {
  const { status, sharing, gpus } = node;
  const hasGpu = gpus.some((gpu) => gpu.kind !== "cpu");
  return html`
    <${Share} sharing=${sharing} device=${hasGpu ? "your GPU" : "your processor"} say=${say} refresh=${node.setSharing} />
    ${gpus.length > 0 && !hasGpu && html`
      <p class="notice" role="note">There is no GPU here that this node can use, so it lends the processor (cpu), and says so to everybody.</p>
    `}
    <div class="grid">
      ${gpus.map((gpu) => html`<${Device} key=${gpu.label} gpu=${gpu} history=${node.history[gpu.label]} alone=${hasGpu && gpu.kind === "cpu"} />`)}
    </div>
    ${status ? html`<${Node} status=${status} />` : html`<${Empty}>Asking the node …<//>`}
  `;
}

function Share({ sharing, device, say, refresh }) {
  const [waiting, setWaiting] = useState(false);
  const words = sharingWords(sharing, device);
  const on = sharing?.enabled ?? false;

  async function change(ask, done) {
    setWaiting(true);
    try {
      refresh(await ask());
      say(done);
    } catch (error) {
      say(error.message, "bad");
    } finally {
      setWaiting(false);
    }
  }

  const toggle = () =>
    change(() => put("/v1/sharing", { enabled: !on }), on ? "Sharing is off." : "Sharing is on.");
  // What the owner ordered can be taken back here; a rule ends when its cause does.
  const ordered = words.state === "draining" || (words.state === "paused" && sharing.cause === "owner");

  return html`
    <section class="share ${words.state}" aria-label="Sharing">
      <div class="share-words">
        <h2>${words.headline}</h2>
        <p id="why">${words.line}</p>
        ${on && (ordered || words.state === "lending") && html`
          <div class="buttons">
            ${ordered
              ? html`<${Action} run=${() => change(() => post("/v1/sharing/resume"), "Sharing goes on.")}>Resume<//>`
              : html`
                <${Action} run=${() => change(() => post("/v1/sharing/pause", { seconds: 3600 }), "Paused for an hour.")}>Pause for an hour<//>
                <${Action} run=${() => change(() => post("/v1/sharing/drain"), "Finishing what runs.")}>Finish and stop<//>
              `}
          </div>
        `}
      </div>
      <button type="button" class="switch" role="switch" aria-checked=${on ? "true" : "false"} aria-label="Share this machine"
        aria-describedby="why" disabled=${waiting || !sharing} onClick=${toggle}><span class="knob"></span></button>
    </section>
  `;
}

function Device({ gpu, history, alone }) {
  const used = gpu.memory_total_bytes - gpu.memory_free_bytes;
  const percent = (share) => (share === null ? null : `${Math.round(share * 100)} %`);
  const figures = [
    ["Utilisation", percent(gpu.utilisation), history?.utilisation, 1],
    ["Memory", `${bytes(used)}`, history?.memory, 1, `of ${bytes(gpu.memory_total_bytes)}`],
    ["Temperature", gpu.temperature_c === null ? null : `${Math.round(gpu.temperature_c)} °C`, history?.temperature, 100],
    ["Power", gpu.power_w === null ? null : `${Math.round(gpu.power_w)} W`, history?.power, undefined],
  ];
  const told = figures.filter(([, value]) => value !== null);
  const untold = figures.filter(([, value]) => value === null).map(([name]) => name.toLowerCase());
  return html`
    <div class="device"><${Card} title=${gpu.name} label="Device ${gpu.label}" aside=${html`<span class="chips">
        <${Chip}>${gpu.kind === "cpu" ? "cpu" : gpu.label}<//>
        ${gpu.lent && html`<${Chip} tone="good">shared<//>`}
        ${alone && html`<${Chip}>not lent<//>`}
      </span>`}>
      ${gpu.reason && html`<p class="why">${gpu.reason}</p>`}
      <div class="figures">
        ${told.map(([name, value, points, top, more]) => html`
          <div class="figure" key=${name}>
            <div class="figure-name">${name}</div>
            <div class="figure-value">${value}${more && html` <small>${more}</small>`}</div>
            ${points && html`<${Plot} points=${points} top=${top} label="${name} over the last five minutes, now ${value}" />`}
          </div>
        `)}
      </div>
      ${untold.length > 0 && html`<p class="muted">This device does not report its ${untold.join(" and ")}.</p>`}
      ${gpu.foreign?.length > 0 && html`
        <p class="muted">Others use it: ${gpu.foreign.map((one) => `${one.name} (${bytes(one.memory_bytes)})`).join(", ")}</p>
      `}
    <//></div>
  `;
}

function Node({ status }) {
  const facts = [
    ["Peer ID", html`<span class="id" title=${status.peer_id}>${short(status.peer_id)}</span><${Copy} text=${status.peer_id} what="the peer ID" />`],
    ["Connected", plural(status.connected_peers, "peer")],
    ["Running for", seconds(status.uptime_s)],
    ["Sandbox", status.isolation_tier === "none" ? "starts with sharing" : `tier ${status.isolation_tier}, ${plural(status.isolation.length, "layer")}`],
    ["Runtime", status.runtime || "not loaded"],
    ["Memory of the node", bytes(status.rss_bytes)],
  ];
  return html`<${Card} title="This node"><${Facts} facts=${facts} /><//>`;
}
