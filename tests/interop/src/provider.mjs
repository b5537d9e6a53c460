// A provider and its worker in one process: no walls, the same words.  Spec: 45-session.md
import { random, same, sodium } from "./bytes.mjs";
import { openEnvelope, requireWindow, sealEnvelope } from "./envelope.mjs";
import { ProtocolError, codeNumber, fail } from "./errors.mjs";
import { Inbound } from "./inbound.mjs";
import { Link } from "./link.mjs";
import { encodeMessage, requireSuite } from "./messages.mjs";
import { Outbound } from "./outbound.mjs";
import { newPair, transcriptHash, workerKeys } from "./sealing.mjs";
import { Worker } from "./worker.mjs";

const OFFER_LIFETIME_MS = 30_000;

const DEVICE = { kind: "cpu", name: "interop", memory_total_bytes: 2 ** 30, memory_free_bytes: 2 ** 30, compute_capability: "" };

/** Is a request of our suite, for us, in its time, and new? `seen`: hashes of earlier ones. */
export function checkRequest({ message, hash }, ownKey, seen, nowMs) {
  requireSuite(message);
  if (!same(message.provider_key, ownKey)) fail("WRONG_PEER");
  requireWindow(message, nowMs);
  if (seen.some((each) => same(each, hash))) fail("REPLAYED");
}

/** What this provider can not do. */
function checkNeeds({ message }) {
  if (message.device_kind === "cuda") fail("NO_SUCH_DEVICE");
  if (message.table_version > 1) fail("OLD_TABLE");
}

/** What a provider must check in a HEADER. */
export function checkHeader({ signer, message }, request, offer, nowMs) {
  requireSuite(message);
  if (!same(signer, request.signer)) fail("WRONG_PEER");
  if (!same(message.offer_hash, offer.hash)) fail("WRONG_OFFER");
  if (nowMs > offer.message.expires_at_ms) fail("EXPIRED", "the offer");
  requireWindow(message, nowMs);
}

function makeOffer(request, oneTimeKey) {
  const { memory_bytes, max_seconds, input_bytes, output_bytes } = request.message;
  const now = Date.now();
  return {
    suite: 1, offer_id: random(16), one_time_key: oneTimeKey, request_hash: request.hash,
    submitter_key: request.signer, device: DEVICE, memory_bytes, max_seconds, input_bytes, output_bytes,
    runtime: "interop 1", table_version: 1, isolation: [], price: 0,
    issued_at_ms: now, expires_at_ms: now + OFFER_LIFETIME_MS,
  };
}

const makeReceipt = (unit, inbound, out, status) => ({
  unit_id: unit.unitId, transcript_hash: unit.th,
  input_hash: inbound.hashed.digest(), output_hash: out.hashed.digest(), status,
  metering: {
    wall_ms: Date.now() - unit.beganMs, cpu_ms: 0, peak_memory_bytes: 0,
    input_bytes: inbound.hashed.bytes, output_bytes: out.hashed.bytes,
  },
  isolation: [], wipe: [{ name: "keys dropped", held: true }], finished_at_ms: Date.now(),
});

/** The peer's fault becomes a frame of `name`, then an error here. */
async function orSay(link, name, judge) {
  try {
    return judge();
  } catch (error) {
    if (error instanceof ProtocolError) {
      await link.send(name, encodeMessage("refusal", { code: codeNumber(error.code), detail: error.detail }));
    }
    throw error;
  }
}

async function admit(link, identity) {
  const body = await link.expect("REQUEST");
  return orSay(link, "REFUSAL", () => {
    const request = openEnvelope("request", body);
    checkRequest(request, identity.publicKey, [], Date.now()); // one unit only: nothing was seen
    checkNeeds(request);
    return request;
  });
}

async function offerAndAccept(link, identity, request, pair) {
  const bytes = sealEnvelope("offer", makeOffer(request, pair.publicKey), identity);
  const offer = openEnvelope("offer", bytes);
  await link.send("OFFER", bytes);
  const body = await link.expect("HEADER");
  const header = await orSay(link, "ERROR", () => {
    const opened = openEnvelope("header", body);
    checkHeader(opened, request, offer, Date.now());
    return opened;
  });
  return { bytes, header };
}

/** Reads the whole input; the worker answers on the way. A fault of the peer ends it with FAILED. */
async function runWorker(link, inbound, worker) {
  try {
    for (;;) {
      const [name, body] = await link.receive();
      if (name === "END") break;
      if (name === "CANCEL") return "cancelled";
      for (const record of inbound.data(body)) worker.take(record);
      await worker.flush();
    }
    inbound.end();
    await worker.finish();
    return "done";
  } catch (error) {
    if (!(error instanceof ProtocolError)) throw error;
    await worker.fail(error);
    return codeNumber(error.code) < 40 ? "protocol_error" : "failed";
  }
}

async function takeAck(link, request, unit, receiptHash) {
  for (;;) {
    const [name, body] = await link.receive();
    if (name !== "ACK") continue; // what was still on its way
    const { signer, message } = openEnvelope("ack", body);
    if (!same(signer, request.signer)) fail("WRONG_PEER", "ack");
    return same(message.receipt_hash, receiptHash) && same(message.unit_id, unit.unitId);
  }
}

async function provide({ seed }) {
  const identity = sodium.crypto_sign_seed_keypair(seed);
  const link = new Link("P");
  const request = await admit(link, identity);
  const pair = newPair();
  const { bytes, header } = await offerAndAccept(link, identity, request, pair);
  const unit = { unitId: header.message.unit_id, th: transcriptHash(bytes, header.bytes), beganMs: Date.now() };
  const keys = workerKeys(pair, header.message.ephemeral_key, bytes, header.bytes);
  const [inbound, out] = [new Inbound(keys.in), new Outbound(link, keys.out)];
  await out.open();
  const status = await runWorker(link, inbound, new Worker(out));
  const receipt = sealEnvelope("receipt", makeReceipt(unit, inbound, out, status), identity);
  await link.send("RECEIPT", receipt);
  const acknowledged = await takeAck(link, request, unit, openEnvelope("receipt", receipt).hash);
  return { state: link.state, status, acknowledged };
}

/** One unit over stdin and stdout; how it ended, or {error} where the peer was at fault. */
export async function runProvider(options) {
  try {
    return await provide(options);
  } catch (error) {
    if (!(error instanceof ProtocolError)) throw error;
    return { error: error.code, detail: error.detail };
  }
}
