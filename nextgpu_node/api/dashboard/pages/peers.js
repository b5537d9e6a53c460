import { get } from "../api.js";
import { Action, Card, Chip, Copy, Empty, useAsked } from "../parts.js";
import { html } from "../vendor/htm-preact.js";
import { bytes, plural, short } from "../words.js";

export function Peers() {
  const [reply, error, again] = useAsked(() => get("/v1/peers?limit=100"));
  const peers = reply?.peers ?? [];
  return html`
    <${Card} title="Who lends now" aside=${html`<${Action} run=${again}>Ask again<//>`}>
      ${peers.length === 0
        ? html`<${Empty}>${error?.message ?? (reply ? `Nobody lends now (${plural(reply.candidates, "candidate")} in the network).` : "Asking the network, which takes a few seconds …")}<//>`
        : html`
          <ul class="rows">
            ${peers.map((peer) => html`
              <li class="row" key=${peer.peer_id}>
                <div class="row-main">
                  <span class="id" title=${peer.peer_id}>${short(peer.peer_id)}</span><${Copy} text=${peer.peer_id} what="the peer ID" />
                  ${peer.sharing ? html`<${Chip} tone=${peer.free_slots ? "good" : "busy"}>${peer.free_slots ? `${peer.free_slots} free` : "busy"}<//>` : html`<${Chip}>${peer.reason || "not lending"}<//>`}
                </div>
                <div class="row-facts">
                  ${peer.devices.map((device) => html`<span>${device.kind === "cpu" ? "cpu (no GPU)" : device.name}, ${bytes(device.memory_free_bytes)} free</span>`)}
                  <span>${peer.runtime}</span>
                </div>
                <span class="latency"><b>${peer.latency_ms < 10 ? peer.latency_ms.toFixed(1) : Math.round(peer.latency_ms)}</b> ms</span>
              </li>
            `)}
          </ul>
        `}
      <p class="muted">Each was asked just now, and its answer's signature verified. There is no map: where people are is their own business.</p>
    <//>
  `;
}
