// Domain separation.  Spec: 00-conventions.md#domain-separation
//   D(t) = "NextGPU/1 " ‖ t ‖ 00      H(t, p1 …) = BLAKE2b-256( D(t) ‖ u64 len(p1) ‖ p1 ‖ … )
import { ascii, concat, sodium, u64 } from "./bytes.mjs";

export const domain = (label) => concat(ascii(`NextGPU/1 ${label}`), Uint8Array.of(0));

/** H, taking one part after the other. */
export class Hash {
  constructor(label) {
    this.state = sodium.crypto_generichash_init(null, 32);
    sodium.crypto_generichash_update(this.state, domain(label));
  }

  add(part) {
    sodium.crypto_generichash_update(this.state, u64(part.length));
    sodium.crypto_generichash_update(this.state, part);
    return this;
  }

  digest() {
    return sodium.crypto_generichash_final(this.state, 32);
  }
}

export const hash = (label, ...parts) =>
  parts.reduce((running, part) => running.add(part), new Hash(label)).digest();

/** BLAKE2b-256 of D(label) ‖ tail under a key. */
export const keyed = (key, label, tail) =>
  sodium.crypto_generichash(32, concat(domain(label), tail), key);
