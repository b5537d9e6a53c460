// Frames: u32 length ‖ u8 kind ‖ body.  Spec: 30-framing.md
import { concat, u32 } from "./bytes.mjs";
import { fail } from "./errors.mjs";
import { LIMITS } from "./limits.mjs";

export const KINDS = {
  1: "REQUEST", 2: "OFFER", 3: "REFUSAL", 4: "HEADER", 5: "DATA", 6: "END", 7: "RECEIPT", 8: "ACK",
  9: "ERROR", 10: "CANCEL", 11: "CAPACITY", 12: "SUCCESSIONS", 13: "RESUME", 14: "RESUMED", 15: "LANE",
  32: "CONNECT", 33: "CONNECTED", 34: "SIGN", 35: "SIGNED", 48: "HELLO", 49: "ASSIGN",
};
const NUMBERS = Object.fromEntries(Object.entries(KINDS).map(([number, name]) => [name, Number(number)]));

const EMPTY = new Uint8Array(0);

export const frame = (name, body = EMPTY) => concat(u32(1 + body.length), Uint8Array.of(NUMBERS[name]), body);

const view = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

function requireHead(length, kind) {
  if (length < 1 || length > LIMITS.MAX_FRAME_BYTES) fail("TOO_LARGE", "frame length");
  if (!(kind in KINDS)) fail("MALFORMED", `frame kind ${kind}`);
}

/** Cuts what comes from a connection into [name, body] frames. */
export class FrameReader {
  constructor() {
    this.held = EMPTY;
  }

  /** The frames that are complete with `bytes`. */
  *feed(bytes) {
    this.held = concat(this.held, bytes);
    while (this.held.length >= 5) {
      const length = view(this.held).getUint32(0);
      requireHead(length, this.held[4]);
      if (this.held.length < 4 + length) return;
      yield this.#take(length);
    }
  }

  #take(length) {
    const name = KINDS[this.held[4]];
    const body = this.held.slice(5, 4 + length);
    this.held = this.held.slice(4 + length);
    return [name, body];
  }

  /** The connection has ended: TRUNCATED inside a frame. */
  end() {
    if (this.held.length) fail("TRUNCATED");
  }
}
