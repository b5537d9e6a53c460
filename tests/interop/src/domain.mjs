// Domain separation.  Spec: 00-conventions.md#domain-separation
//   D(t) = "NextGPU/1 " ‖ t ‖ 00      H(t, p1 …) = BLAKE2b-256( D(t) ‖ u64 len(p1) ‖ p1 ‖ … )
import { ascii, concat, sodium, u64 } from "./bytes.mjs";

export const domain = (label) => concat(ascii(`NextGPU/1 ${label}`), Uint8Array.of(0));

export const hash = (label, ...parts) =>
  sodium.crypto_generichash(32, concat(domain(label), ...parts.flatMap((part) => [u64(part.length), part])), null);

/** BLAKE2b-256 of D(label) ‖ tail under a key. */
export const keyed = (key, label, tail) =>
  sodium.crypto_generichash(32, concat(domain(label), tail), key);
