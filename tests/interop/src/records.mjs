// Records inside chunks: u8 kind ‖ u8 flags ‖ u32 length ‖ body.  Spec: 50-sealing.md#records
import { concat, u32 } from "./bytes.mjs";
import { fail } from "./errors.mjs";
import { LIMITS } from "./limits.mjs";
import { padded } from "./padding.mjs";

const HEAD_BYTES = 6;
const MORE = 1;

export const RECORDS = {
  1: "MANIFEST", 2: "PROGRAM", 3: "CONSTANTS", 4: "CARRY", 5: "STEP", 6: "CALL",
  16: "STARTED", 17: "RESULT", 18: "CHECKPOINT", 19: "DONE", 20: "FAILED", 21: "FINAL",
  22: "LOG", 23: "VALUE", 24: "FILE",
};
const NUMBERS = Object.fromEntries(Object.entries(RECORDS).map(([number, name]) => [name, Number(number)]));

const view = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

function readHead(chunk, at) {
  if (at + HEAD_BYTES > chunk.length) fail("MALFORMED", "a record head passes the end");
  const [kind, flags, length] = [chunk[at], chunk[at + 1], view(chunk).getUint32(at + 2)];
  if (!(kind in RECORDS)) fail("MALFORMED", `record kind ${kind}`);
  if (flags > MORE) fail("MALFORMED", "record flags");
  if (at + HEAD_BYTES + length > chunk.length) fail("MALFORMED", "a record body passes the end");
  return { name: RECORDS[kind], more: flags === MORE, length };
}

/** The fragments of one chunk: {name, body, more}. */
export function* fragments(chunk) {
  let at = 0;
  while (at < chunk.length && chunk[at] !== 0) {
    const { name, more, length } = readHead(chunk, at);
    yield { name, body: chunk.slice(at + HEAD_BYTES, at + HEAD_BYTES + length), more };
    at += HEAD_BYTES + length;
  }
}

/** Joins fragments into [name, body]. */
export class RecordJoiner {
  constructor() {
    this.open = null;
    this.parts = [];
  }

  /** The record that this fragment completes, or undefined. */
  add({ name, body, more }) {
    if (this.open !== null && this.open !== name) fail("UNEXPECTED_MESSAGE", "another record between two fragments");
    this.parts.push(body);
    this.open = more ? name : null;
    if (more) return undefined;
    const whole = concat(...this.parts);
    this.parts = [];
    return [name, whole];
  }
}

const head = (name, more, length) => concat(Uint8Array.of(NUMBERS[name], more ? MORE : 0), u32(length));

/** Fills chunks with records and pads what is between two flushes. */
export class RecordWriter {
  constructor() {
    this.chunks = [];
    this.pending = [];
    this.size = 0;
    this.flushed = 0;
  }

  #put(bytes) {
    this.pending.push(bytes);
    this.size += bytes.length;
  }

  #cut() {
    this.chunks.push(concat(...this.pending));
    this.flushed += this.size;
    this.pending = [];
    this.size = 0;
  }

  #room() {
    return LIMITS.CHUNK_PLAINTEXT_BYTES - this.size;
  }

  add(name, body) {
    let rest = body;
    do {
      if (this.#room() <= HEAD_BYTES) this.#fill(this.#room());
      const part = rest.subarray(0, this.#room() - HEAD_BYTES);
      rest = rest.subarray(part.length);
      this.#put(head(name, rest.length > 0, part.length));
      this.#put(part);
      if (this.#room() === 0) this.#cut();
    } while (rest.length > 0);
  }

  #fill(size) {
    this.#put(new Uint8Array(size));
    if (this.#room() === 0) this.#cut();
  }

  /** The chunks' plaintexts since the last flush, padded to their size class. */
  flush() {
    let missing = padded(this.flushed + this.size) - this.flushed - this.size;
    while (missing > 0) {
      const part = Math.min(missing, this.#room());
      this.#fill(part);
      missing -= part;
    }
    if (this.size) this.#cut();
    const chunks = this.chunks;
    this.chunks = [];
    this.flushed = 0;
    return chunks;
  }
}
