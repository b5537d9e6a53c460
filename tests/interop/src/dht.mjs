// The DHT as a client sees it.  Spec: 72-discovery.md
import { concat, sodium, u32 } from "./bytes.mjs";
import { domain } from "./domain.mjs";
import { openEnvelope, sealEnvelope } from "./envelope.mjs";
import { fail } from "./errors.mjs";
import { LIMITS } from "./limits.mjs";
import { decodeMessage, encodeMessage, requireSuite } from "./messages.mjs";

export const DHT_PROTOCOL = "/nextgpu/dht/1";
const KINDS = { 1: "find node", 2: "nodes", 3: "store", 4: "stored", 5: "find", 6: "found" };
const NUMBERS = Object.fromEntries(Object.entries(KINDS).map(([number, name]) => [name, Number(number)]));

const sha256 = (label, ...parts) => sodium.crypto_hash_sha256(concat(domain(label), ...parts));

export const nodePlace = (peerKey) => sha256("dht node", peerKey);

/** The shard of a peer on a level: the first 4·level bits. */
export function branchOf(peerKey, level) {
  const head = Buffer.from(sha256("dht branch", peerKey)).readUInt32BE();
  return level ? head >>> (32 - 4 * level) : 0;
}

export function encodeDht(kind, message) {
  const body = encodeMessage(kind, message);
  return concat(u32(1 + body.length), Uint8Array.of(NUMBERS[kind]), body);
}

/** Cuts what comes from a stream into [kind, message] pairs. */
export async function* dhtMessages(chunks) {
  let held = new Uint8Array(0);
  for await (const chunk of chunks) {
    held = concat(held, chunk);
    while (held.length >= 5) {
      const length = Buffer.from(held).readUInt32BE();
      if (length < 1 || length > LIMITS.MAX_MESSAGE_BYTES + 1) fail("TOO_LARGE", "DHT message");
      const kind = KINDS[held[4]] ?? fail("MALFORMED", "DHT message kind");
      if (held.length < 4 + length) break;
      yield [kind, decodeMessage(kind, held.slice(5, 4 + length))];
      held = held.slice(4 + length);
    }
  }
}

export const announcement = (key, addresses, nowMs, pair) =>
  sealEnvelope("announcement", {
    suite: 1, key, addresses, issued_at_ms: nowMs, expires_at_ms: nowMs + 60_000,
  }, pair);

/** An announcement from a holder, checked as a reader must. */
export function openAnnouncement(bytes, wanted, nowMs) {
  if (bytes.length > LIMITS.MAX_ANNOUNCEMENT_BYTES) fail("TOO_LARGE", "announcement");
  const opened = openEnvelope("announcement", bytes);
  requireSuite(opened.message);
  if (nowMs >= Number(opened.message.expires_at_ms)) fail("EXPIRED");
  if (Number(opened.message.issued_at_ms) > nowMs + LIMITS.MAX_CLOCK_SKEW_MS) fail("NOT_YET_VALID");
  const isOfKey = Buffer.compare(opened.message.key, wanted.key) === 0;
  if (!isOfKey || branchOf(opened.signer, wanted.level) !== wanted.branch) fail("UNEXPECTED_MESSAGE");
  return opened;
}
