// Peer IDs: identity multihash of the protobuf form of an Ed25519 key, in base58btc.  Spec: 10-identity.md
import { concat, same, unhex } from "./bytes.mjs";
import { fail } from "./errors.mjs";

const ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
const PREFIX = unhex("002408011220");
const MAX_CHARACTERS = 52;

const toNumber = (bytes) => bytes.reduce((value, byte) => (value << 8n) | BigInt(byte), 0n);

function digits(value) {
  let text = "";
  for (let rest = value; rest > 0n; rest /= 58n) text = ALPHABET[Number(rest % 58n)] + text;
  return text;
}

const leadingZeros = (bytes) => {
  const first = bytes.findIndex((byte) => byte !== 0);
  return first === -1 ? bytes.length : first;
};

/** base58btc: one "1" for each leading zero byte, then the number. */
const base58 = (bytes) => "1".repeat(leadingZeros(bytes)) + digits(toNumber(bytes));

export const peerId = (key) => base58(concat(PREFIX, key));

function parseDigits(text) {
  let value = 0n;
  for (const letter of text) {
    const digit = ALPHABET.indexOf(letter);
    if (digit < 0) fail("MALFORMED", "not a peer ID");
    value = value * 58n + BigInt(digit);
  }
  return value;
}

/** The 32-byte key of a peer ID; MALFORMED for anything else. */
export function peerKey(text) {
  if (text.length > MAX_CHARACTERS) fail("MALFORMED", "not a peer ID");
  const bytes = unhex(parseDigits(text).toString(16).padStart(76, "0"));
  const key = bytes.slice(PREFIX.length);
  if (!same(bytes.slice(0, PREFIX.length), PREFIX) || peerId(key) !== text) fail("MALFORMED", "not a peer ID");
  return key;
}
