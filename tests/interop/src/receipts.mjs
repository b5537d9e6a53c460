// Receipts.  Spec: 55-receipts.md
import { same, sodium, u64 } from "./bytes.mjs";
import { domain } from "./domain.mjs";
import { openEnvelope, sealEnvelope } from "./envelope.mjs";
import { fail } from "./errors.mjs";

/** SHA-256 and size of the DATA bodies of one direction, as they pass. */
export class DirectionHash {
  constructor() {
    this.state = sodium.crypto_hash_sha256_init();
    sodium.crypto_hash_sha256_update(this.state, domain("ciphertext"));
    this.bytes = 0;
  }

  add(body) {
    sodium.crypto_hash_sha256_update(this.state, u64(body.length));
    sodium.crypto_hash_sha256_update(this.state, body);
    this.bytes += body.length;
  }

  /** Once, at the end. */
  digest() {
    return sodium.crypto_hash_sha256_final(this.state);
  }
}

/** What a submitter must check in a receipt; `unit` is what it knows of its own unit. */
export function checkReceipt({ signer, message }, unit) {
  if (!same(signer, unit.providerKey)) fail("WRONG_PEER");
  if (!same(message.unit_id, unit.unitId)) fail("WRONG_OFFER", "unit_id");
  if (!same(message.transcript_hash, unit.th)) fail("WRONG_OFFER", "transcript_hash");
  if (!same(message.output_hash, unit.outputHash)) fail("BAD_SEAL", "output_hash");
  if (unit.wholeInput && !same(message.input_hash, unit.inputHash)) fail("BAD_SEAL", "input_hash");
}

export const sealAck = (unitId, receiptHash, pair) =>
  sealEnvelope("ack", { unit_id: unitId, receipt_hash: receiptHash }, pair);
