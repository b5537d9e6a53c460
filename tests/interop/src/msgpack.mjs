// Canonical msgpack.  Spec: 00-conventions.md#messages
//
// Reading is our own: the usual decoders hand out a float 1.0 as the integer 1, mend broken UTF-8 and
// keep the last of two equal keys. Writing is @msgpack/msgpack's, whose forms are the shortest.
import { encode } from "@msgpack/msgpack";
import { same } from "./bytes.mjs";
import { fail } from "./errors.mjs";
import { LIMITS } from "./limits.mjs";

const MAX_DEPTH = 8;
const MAX_INTEGER = (1n << 63n) - 1n;
const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

const malformed = (detail) => fail("MALFORMED", detail);

/** Takes bytes from the front; a length beyond what is there allocates nothing. */
class Cursor {
  constructor(bytes) {
    this.bytes = bytes;
    this.at = 0;
  }

  take(size) {
    if (size > this.bytes.length - this.at) malformed("a length beyond the end");
    this.at += size;
    return this.bytes.subarray(this.at - size, this.at);
  }

  unsigned(size) {
    return this.take(size).reduce((value, byte) => (value << 8n) | BigInt(byte), 0n);
  }

  signed(size) {
    return BigInt.asIntN(size * 8, this.unsigned(size));
  }

  length(size) {
    return Number(this.unsigned(size));
  }
}

const integer = (value) => {
  if (value < 0n || value > MAX_INTEGER) malformed("an integer out of its range");
  return { type: "int", value: value <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(value) : value };
};

const text = (bytes) => {
  try {
    return { type: "text", value: UTF8.decode(bytes) };
  } catch {
    return malformed("text that is not UTF-8");
  }
};

const array = (cursor, length, depth) => {
  if (length > LIMITS.MAX_LIST_ITEMS) malformed("too many items");
  if (depth === 0) malformed("nested too deep");
  const value = [];
  for (let i = 0; i < length; i++) value.push(readValue(cursor, depth - 1));
  return { type: "array", value };
};

const bytes = (value) => ({ type: "bytes", value });
const bool = (value) => ({ type: "bool", value });

// One row for each head byte that this protocol uses; the ranges of "fix" forms are in readValue.
const HEADS = {
  0xc2: () => bool(false),
  0xc3: () => bool(true),
  0xc4: (cursor) => bytes(cursor.take(cursor.length(1))),
  0xc5: (cursor) => bytes(cursor.take(cursor.length(2))),
  0xc6: (cursor) => bytes(cursor.take(cursor.length(4))),
  0xcc: (cursor) => integer(cursor.unsigned(1)),
  0xcd: (cursor) => integer(cursor.unsigned(2)),
  0xce: (cursor) => integer(cursor.unsigned(4)),
  0xcf: (cursor) => integer(cursor.unsigned(8)),
  0xd0: (cursor) => integer(cursor.signed(1)),
  0xd1: (cursor) => integer(cursor.signed(2)),
  0xd2: (cursor) => integer(cursor.signed(4)),
  0xd3: (cursor) => integer(cursor.signed(8)),
  0xd9: (cursor) => text(cursor.take(cursor.length(1))),
  0xda: (cursor) => text(cursor.take(cursor.length(2))),
  0xdb: (cursor) => text(cursor.take(cursor.length(4))),
  0xdc: (cursor, depth) => array(cursor, cursor.length(2), depth),
  0xdd: (cursor, depth) => array(cursor, cursor.length(4), depth),
};

function readValue(cursor, depth) {
  const head = cursor.length(1);
  if (head < 0x80) return integer(BigInt(head));
  if (head >= 0x90 && head <= 0x9f) return array(cursor, head & 0x0f, depth);
  if (head >= 0xa0 && head <= 0xbf) return text(cursor.take(head & 0x1f));
  const read = HEADS[head] ?? malformed("a type that does not occur here");
  return read(cursor, depth);
}

/** The one value in `input`, as {type, value}; MALFORMED or TOO_LARGE. Its form is not judged yet. */
export function readOne(input, maxBytes) {
  if (input.length > maxBytes) fail("TOO_LARGE");
  const cursor = new Cursor(input);
  const value = readValue(cursor, MAX_DEPTH);
  if (cursor.at !== input.length) malformed("bytes after the value");
  return value;
}

const plain = ({ type, value }) => {
  if (type === "array") return value.map(plain);
  // The library writes a number above 2^32 as a float, unless it is a BigInt.
  return type === "int" && value > 0xffffffff ? BigInt(value) : value;
};

/** The one encoding of a tree of {type, value}. */
export const write = (tree) => encode(plain(tree), { useBigInt64: true });

/** NOT_CANONICAL unless `tree` was read from its one encoding. */
export function requireCanonical(tree, input) {
  if (!same(write(tree), input)) fail("NOT_CANONICAL");
}
