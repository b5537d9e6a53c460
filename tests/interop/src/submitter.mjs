// A submitter: borrows, sends a program and its steps, checks the receipt.  Spec: 45-session.md
import { hex, random, same, sodium } from "./bytes.mjs";
import { openEnvelope, requireWindow, sealEnvelope } from "./envelope.mjs";
import { ProtocolError, codeName, fail } from "./errors.mjs";
import { peerKey } from "./identity.mjs";
import { Inbound } from "./inbound.mjs";
import { LIMITS } from "./limits.mjs";
import { Link } from "./link.mjs";
import { decodeMessage, encodeMessage, requireSuite } from "./messages.mjs";
import { Outbound } from "./outbound.mjs";
import { readProgram, scaleAndSum } from "./program.mjs";
import { checkReceipt, sealAck } from "./receipts.mjs";
import { newPair, submitterKeys, transcriptHash } from "./sealing.mjs";
import { decodeImage, encodeImage } from "./tensors.mjs";

const MIB = 2 ** 20;
const AMOUNTS = { memory_bytes: 64 * MIB, max_seconds: 30, input_bytes: 8 * MIB, output_bytes: 8 * MIB };

const window = (lifetimeMs) => {
  const now = Date.now();
  return { issued_at_ms: now, expires_at_ms: now + lifetimeMs };
};

const makeRequest = (providerKey) => ({
  suite: 1, nonce: random(16), provider_key: providerKey, device_kind: "any", device_memory_bytes: 0,
  ...AMOUNTS, table_version: 1, ...window(60_000), token: new Uint8Array(0), kind: "program",
});

const makeHeader = (offerHash, ephemeralKey) => ({
  suite: 1, unit_id: random(16), offer_hash: offerHash, ephemeral_key: ephemeralKey,
  chunk_bytes: LIMITS.CHUNK_PLAINTEXT_BYTES, ...window(60_000),
});

/** What a submitter must check in an OFFER to its own opened request. */
export function checkOffer({ signer, message }, request, providerKey, nowMs) {
  if (!same(signer, providerKey)) fail("WRONG_PEER");
  if (!same(message.request_hash, request.hash)) fail("WRONG_OFFER", "request_hash");
  if (!same(message.submitter_key, request.signer)) fail("WRONG_OFFER", "submitter_key");
  requireSuite(message);
  requireWindow(message, nowMs);
  const asked = request.message;
  for (const name of Object.keys(AMOUNTS)) if (message[name] < asked[name]) fail("OVER_LIMIT", name);
  if (!["any", message.device.kind].includes(asked.device_kind)) fail("NO_SUCH_DEVICE");
}

function raiseRefusal(body) {
  const { code, detail } = decodeMessage("refusal", body);
  fail(codeName(code), detail);
}

async function takeOffer(link, identity, providerKey) {
  const request = sealEnvelope("request", makeRequest(providerKey), identity);
  await link.send("REQUEST", request);
  const [name, body] = await link.receive();
  if (name !== "OFFER") raiseRefusal(body);
  const offer = openEnvelope("offer", body);
  checkOffer(offer, openEnvelope("request", request), providerKey, Date.now());
  return offer;
}

/** The unit's keys and names, once its header is sent. */
async function takeUp(link, identity, offer) {
  const pair = newPair();
  const message = makeHeader(offer.hash, pair.publicKey);
  const header = sealEnvelope("header", message, identity);
  const keys = submitterKeys(pair, offer.message.one_time_key, offer.bytes, header);
  await link.send("HEADER", header);
  return { keys, unitId: message.unit_id, th: transcriptHash(offer.bytes, header) };
}

const vector = (size, value) => ({ shape: [size], values: new Array(size).fill(value) });

async function sendUnit(out, { size, steps }) {
  await out.open();
  out.add("MANIFEST", encodeMessage("manifest", { checkpoint_ms: 0, checkpoint_steps: 0, return_carry: true }));
  out.add("PROGRAM", scaleAndSum(size));
  out.add("CONSTANTS", encodeImage([["w", vector(size, 3)]]));
  out.add("CARRY", encodeImage([["sum", vector(size, 0)]]));
  await out.flush();
  for (let k = 1; k <= steps; k++) {
    out.add("STEP", encodeImage([["x", vector(size, k)]]));
    await out.flush();
  }
  await out.close();
}

/** Collects what the worker says. */
class Results {
  constructor(size) {
    const { ys, carry } = readProgram(scaleAndSum(size));
    this.ys = ys;
    this.carry = carry;
    this.results = [];
    this.checkpoint = null;
    this.summary = null;
    this.failure = null;
    this.started = 0;
  }

  take([name, body]) {
    if (this.summary || this.failure) fail("UNEXPECTED_MESSAGE", `${name} after the last word`);
    const readers = {
      STARTED: () => { this.started += 1; },
      RESULT: () => { this.results.push(decodeImage(this.ys, body).y); },
      CHECKPOINT: () => { this.checkpoint = decodeImage(this.carry, body.slice(8)).sum; },
      DONE: () => { this.summary = decodeMessage("summary", body); },
      FAILED: () => { this.failure = decodeMessage("refusal", body); },
    };
    (readers[name] ?? (() => fail("UNEXPECTED_MESSAGE", name)))();
  }
}

/** Everything up to the receipt's envelope. */
async function receiveUnit(link, inbound, results) {
  for (;;) {
    const [name, body] = await link.receive();
    if (name === "DATA") for (const record of inbound.data(body)) results.take(record);
    else if (name === "END") inbound.end();
    else if (name === "RECEIPT") return body;
    else raiseRefusal(body);
  }
}

async function submit({ provider, seed, size, steps }) {
  const identity = sodium.crypto_sign_seed_keypair(seed);
  const providerKey = peerKey(provider);
  const link = new Link("S");
  const offer = await takeOffer(link, identity, providerKey);
  const { keys, unitId, th } = await takeUp(link, identity, offer);
  const [out, inbound, results] = [new Outbound(link, keys.in), new Inbound(keys.out), new Results(size)];
  const [envelope] = await Promise.all([receiveUnit(link, inbound, results), sendUnit(out, { size, steps })]);
  const receipt = openEnvelope("receipt", envelope);
  checkReceipt(receipt, {
    providerKey, unitId, th,
    outputHash: inbound.hashed.digest(), inputHash: out.hashed.digest(),
    wholeInput: results.summary !== null && !results.summary.stopped_early,
  });
  await link.send("ACK", sealAck(unitId, receipt.hash, identity));
  return {
    state: link.state, status: receipt.message.status, summary: results.summary, failure: results.failure,
    started: results.started, results: results.results.map((values) => [...new Set(values)]),
    checkpoint: results.checkpoint && [...new Set(results.checkpoint)],
    frames: receipt.message.metering, submitter: hex(identity.publicKey),
  };
}

/** A whole unit over stdin and stdout; its outcome, or {error} where the peer was at fault. */
export async function runSubmitter(options) {
  try {
    return await submit(options);
  } catch (error) {
    if (!(error instanceof ProtocolError)) throw error;
    return { error: error.code, detail: error.detail };
  }
}
