// Envelopes: [type, payload, public key, signature].  Spec: 20-envelope.md
import { concat, sodium } from "./bytes.mjs";
import { domain, hash } from "./domain.mjs";
import { fail } from "./errors.mjs";
import { LIMITS } from "./limits.mjs";
import { decodeMessage, encodeMessage } from "./messages.mjs";
import { readOne, requireCanonical, write } from "./msgpack.mjs";

const MAX_ENVELOPE_BYTES = LIMITS.MAX_MESSAGE_BYTES + 256;
const ITEM_TYPES = ["text", "bytes", "bytes", "bytes"];

export const envelopeHash = (bytes) => hash("envelope", bytes);

const signedBytes = (type, payload) => concat(domain(type), payload);

function items(tree) {
  const value = tree.type === "array" ? tree.value : [];
  const fits = value.length === 4 && value.every((item, i) => item.type === ITEM_TYPES[i]);
  return fits ? value.map((item) => item.value) : fail("MALFORMED", "not an envelope");
}

function requireSizes(key, signature) {
  if (key.length !== 32 || signature.length !== 64) fail("MALFORMED", "key or signature size");
}

/** {signer, message, hash} of an envelope from a peer, where one of `type` belongs. */
export function openEnvelope(type, bytes) {
  const tree = readOne(bytes, MAX_ENVELOPE_BYTES);
  const [label, payload, signer, signature] = items(tree);
  requireCanonical(tree, bytes);
  if (label !== type) fail("UNEXPECTED_MESSAGE", label);
  requireSizes(signer, signature);
  if (!sodium.crypto_sign_verify_detached(signature, signedBytes(type, payload), signer)) fail("BAD_SIGNATURE");
  return { signer, message: decodeMessage(type, payload), hash: envelopeHash(bytes), bytes };
}

/** The envelope's bytes; `pair` is libsodium's {publicKey, privateKey} for Ed25519. */
export function sealEnvelope(type, message, pair) {
  const payload = encodeMessage(type, message);
  const signature = sodium.crypto_sign_detached(signedBytes(type, payload), pair.privateKey);
  const parts = [["text", type], ["bytes", payload], ["bytes", pair.publicKey], ["bytes", signature]];
  return write({ type: "array", value: parts.map(([kind, value]) => ({ type: kind, value })) });
}

/** EXPIRED or NOT_YET_VALID outside of the message's window and the skew.  Spec: 20-envelope.md#validity */
export function requireWindow({ issued_at_ms: issued, expires_at_ms: expires }, nowMs, skewMs = LIMITS.MAX_CLOCK_SKEW_MS) {
  if (nowMs > Number(expires) + skewMs) fail("EXPIRED");
  if (nowMs < Number(issued) - skewMs) fail("NOT_YET_VALID");
}
