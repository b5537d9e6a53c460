// Receipts.  Spec: 55-receipts.md
import { same } from "./bytes.mjs";
import { Hash } from "./domain.mjs";
import { openEnvelope, sealEnvelope } from "./envelope.mjs";
import { fail } from "./errors.mjs";

/** The hash and the size of the DATA bodies of one direction, as they pass. */
export class DirectionHash {
  constructor() {
    this.running = new Hash("ciphertext");
    this.bytes = 0;
  }

  add(body) {
    this.running.add(body);
    this.bytes += body.length;
    return this;
  }

  digest() {
    return this.running.digest();
  }
}

/** Checks a receipt as a submitter must; `unit` is what the submitter knows of its own unit. */
export function openReceipt(bytes, unit) {
  const receipt = openEnvelope("receipt", bytes);
  const { message } = receipt;
  if (!same(receipt.signer, unit.providerKey)) fail("WRONG_PEER");
  if (!same(message.unit_id, unit.unitId)) fail("WRONG_OFFER", "unit_id");
  if (!same(message.transcript_hash, unit.th)) fail("WRONG_OFFER", "transcript_hash");
  if (!same(message.output_hash, unit.outputHash)) fail("BAD_SEAL", "output_hash");
  if (unit.wholeInput && !same(message.input_hash, unit.inputHash)) fail("BAD_SEAL", "input_hash");
  return receipt;
}

export const sealAck = (unitId, receiptHash, pair) =>
  sealEnvelope("ack", { unit_id: unitId, receipt_hash: receiptHash }, pair);
