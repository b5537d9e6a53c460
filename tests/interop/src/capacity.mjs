// How a provider is found and asked.  Spec: 70-capacity.md
import { ascii, concat, same, sodium } from "./bytes.mjs";
import { domain } from "./domain.mjs";
import { requireWindow } from "./envelope.mjs";
import { fail } from "./errors.mjs";

export const BUCKETS_GIB = [0, 1, 4, 8, 12, 16, 24, 40, 80];

export const capabilityKey = (kind, first, last) =>
  sodium.crypto_hash_sha256(concat(domain("capability"), ascii(`${kind}/mem=${first}..${last}`)));

/** What a reader must check in what a provider says of itself. */
export function checkCapacity({ signer, message }, providerKey, nowMs) {
  if (!same(signer, providerKey)) fail("WRONG_PEER");
  requireWindow(message, nowMs);
}
