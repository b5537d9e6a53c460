// The sealed stream.  Spec: 50-sealing.md
import { concat, sodium } from "./bytes.mjs";
import { hash, keyed } from "./domain.mjs";
import { fail } from "./errors.mjs";
import { LIMITS } from "./limits.mjs";

const HEADER_BYTES = 24;
const PREAMBLE_BYTES = 56;
const TAG_MESSAGE = 0;
const TAG_FINAL = 3;
const NO_DATA = new Uint8Array(0);

export const transcriptHash = (offer, header) => hash("th", offer, header);

export const newPair = () => sodium.crypto_kx_keypair();

// A public key of small order makes libsodium throw; that is the peer's fault.
function agree(compute) {
  try {
    return compute();
  } catch {
    return fail("BAD_SEAL", "a public key of small order");
  }
}

const directions = (sIn, sOut, th) => ({
  in: { key: keyed(sIn, "key in", th), commitment: keyed(sIn, "commit in", th), th },
  out: { key: keyed(sOut, "key out", th), commitment: keyed(sOut, "commit out", th), th },
});

/** Keys of both directions at the submitter, which holds the ephemeral pair. */
export function submitterKeys(pair, oneTimeKey, offer, header) {
  const shared = agree(() => sodium.crypto_kx_client_session_keys(pair.publicKey, pair.privateKey, oneTimeKey));
  return directions(shared.sharedTx, shared.sharedRx, transcriptHash(offer, header));
}

/** Keys of both directions at the worker, which holds the one-time pair. */
export function workerKeys(pair, ephemeralKey, offer, header) {
  const shared = agree(() => sodium.crypto_kx_server_session_keys(pair.publicKey, pair.privateKey, ephemeralKey));
  return directions(shared.sharedRx, shared.sharedTx, transcriptHash(offer, header));
}

/** Makes the DATA bodies of one direction. */
export class StreamSealer {
  constructor({ key, commitment, th }) {
    const { state, header } = sodium.crypto_secretstream_xchacha20poly1305_init_push(key);
    this.state = state;
    this.preamble = concat(header, commitment);
    this.associated = th;
  }

  chunk(plaintext, final = false) {
    const associated = this.associated;
    this.associated = NO_DATA;
    return sodium.crypto_secretstream_xchacha20poly1305_push(
      this.state, plaintext, associated, final ? TAG_FINAL : TAG_MESSAGE);
  }
}

/** Opens the DATA bodies of one direction, the preamble first. */
export class StreamOpener {
  constructor(keys) {
    this.keys = keys;
    this.state = null;
    this.associated = keys.th;
    this.final = false;
  }

  /** The plaintext of a chunk; null for the preamble. */
  data(body) {
    if (this.final) fail("BAD_SEAL", "data after the final chunk");
    return this.state === null ? this.#preamble(body) : this.#chunk(body);
  }

  #preamble(body) {
    if (body.length !== PREAMBLE_BYTES) fail("MALFORMED", "preamble size");
    if (!sodium.memcmp(body.slice(HEADER_BYTES), this.keys.commitment)) fail("BAD_SEAL", "commitment");
    const header = body.slice(0, HEADER_BYTES);
    this.state = sodium.crypto_secretstream_xchacha20poly1305_init_pull(header, this.keys.key);
    return null;
  }

  #chunk(body) {
    if (body.length > LIMITS.CHUNK_PLAINTEXT_BYTES + LIMITS.CHUNK_OVERHEAD_BYTES) fail("TOO_LARGE", "chunk");
    if (body.length < LIMITS.CHUNK_OVERHEAD_BYTES) fail("BAD_SEAL", "chunk size");
    const opened = sodium.crypto_secretstream_xchacha20poly1305_pull(this.state, body, this.associated);
    if (!opened || ![TAG_MESSAGE, TAG_FINAL].includes(opened.tag)) fail("BAD_SEAL");
    this.associated = NO_DATA;
    this.final = opened.tag === TAG_FINAL;
    return opened.message;
  }

  /** END came. */
  end() {
    if (!this.final) fail("TRUNCATED", "END before FINAL");
  }
}
