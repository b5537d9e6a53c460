// What a submitter sends on a bulk lane, as its provider reads it.  Spec: 48-lane.md#on-the-lane
import { concat, same, sodium, u64, unhex } from "./bytes.mjs";
import { domain, keyed } from "./domain.mjs";
import { fail } from "./errors.mjs";
import { FrameReader, KINDS } from "./framing.mjs";

const ID_BYTES = 16;
const NO_BYTES = new Uint8Array(0);

const laneId = (ticket) => keyed(ticket, "lane id", NO_BYTES).slice(0, ID_BYTES);

function requireHello(input, ticket) {
  const head = domain("lane");
  if (input.length < head.length + ID_BYTES) fail("TRUNCATED", "hello");
  if (!same(input.slice(0, head.length), head)) fail("MALFORMED", "no lane");
  if (!same(input.slice(head.length, head.length + ID_BYTES), laneId(ticket))) fail("UNKNOWN_UNIT");
  return input.slice(head.length + ID_BYTES);
}

function open(key, number, name, body) {
  if (name === "DATA") return body;
  const kind = Object.keys(KINDS).find((each) => KINDS[each] === name);
  const nonce = concat(new Uint8Array(4), u64(number));
  try {
    return sodium.crypto_aead_chacha20poly1305_ietf_decrypt(null, body, Uint8Array.of(Number(kind)), nonce, key);
  } catch {
    return fail("BAD_SEAL", "lane");
  }
}

/** [kind, opened body] of each frame behind the hello. */
export function readLane(params, input) {
  const [ticket, unitId, submitter, provider] =
    ["ticket", "unit_id", "submitter_peer", "provider_peer"].map((name) => unhex(params[name]));
  const rest = requireHello(input, ticket);
  const key = keyed(ticket, "lane S", concat(unitId, submitter, provider));
  const reader = new FrameReader();
  const frames = [...reader.feed(rest)];
  reader.end();
  return frames.map(([name, body], number) => [name, open(key, number, name, body)]);
}
