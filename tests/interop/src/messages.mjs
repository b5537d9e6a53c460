// Messages: one array of fields each.  Spec: 40-messages.md, 00-conventions.md#messages
import { fail } from "./errors.mjs";
import { LIMITS } from "./limits.mjs";
import { readOne, requireCanonical, write } from "./msgpack.mjs";

const UNPRINTABLE = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u;

const typed = (node, type, name) =>
  node.type === type ? node.value : fail("MALFORMED", `${name} is not ${type}`);

// A field type is a pair: read({type, value}, name) -> value, and tree(value) -> {type, value}.
const leaf = (type, check = () => {}) => ({
  read: (node, name) => {
    const value = typed(node, type, name);
    check(value, name);
    return value;
  },
  tree: (value) => ({ type, value }),
});

const bool = leaf("bool");
const int = leaf("int");

const amount = (least, most) =>
  leaf("int", (value, name) => {
    if (value < least || value > most) fail("OVER_LIMIT", name);
  });

const bytes = (...sizes) =>
  leaf("bytes", (value, name) => {
    if (sizes.length && !sizes.includes(value.length)) fail("MALFORMED", `${name} has ${value.length} bytes`);
  });

const text = leaf("text", (value, name) => {
  if (Buffer.byteLength(value) > LIMITS.MAX_TEXT_BYTES) fail("MALFORMED", `${name} is too long`);
  if (UNPRINTABLE.test(value)) fail("MALFORMED", `${name} is not printable`);
});

const oneOf = (...values) =>
  leaf("text", (value, name) => {
    if (!values.includes(value)) fail("MALFORMED", `${name} is none of its values`);
  });

const listOf = (item, check = () => {}) => ({
  read: (node, name) => {
    const values = typed(node, "array", name).map((each) => item.read(each, name));
    check(values, name);
    return values;
  },
  tree: (values) => ({ type: "array", value: values.map(item.tree) }),
});

const items = (least, most) => (values, name) => {
  if (values.length < least || values.length > most) fail("MALFORMED", `${name} has ${values.length} items`);
};

const addresses = (values, name) => {
  items(0, LIMITS.MAX_ADDRESSES)(values, name);
  if (values.some((value) => Buffer.byteLength(value) > LIMITS.MAX_ADDRESS_BYTES)) fail("MALFORMED", `${name} are too long`);
};

const codePoints = (value) => [...value].map((letter) => letter.codePointAt(0));

/** Whether `a` stands before `b` by code point, which is not how JavaScript compares texts. */
function before(a, b) {
  const [one, other] = [codePoints(a), codePoints(b)];
  const at = one.findIndex((point, i) => point !== other[i]);
  return at === -1 ? one.length < other.length : at < other.length && one[at] < other[at];
}

const ascending = (values, name) => {
  if (!values.length || values.some((value, i) => i > 0 && !before(values[i - 1], value))) {
    fail("MALFORMED", `${name} is not strictly ascending`);
  }
};

const message = (type) => ({
  read: (node) => readFields(type, node),
  tree: (value) => fieldsTree(type, value),
});

const window = [["issued_at_ms", int], ["expires_at_ms", int]];

const STATUSES = ["done", "failed", "cancelled", "timed_out", "out_of_memory", "worker_crashed",
  "submitter_lost", "protocol_error", "over_limit", "owner_stopped"];

const FIELDS = {
  request: [
    ["suite", int],
    ["nonce", bytes(16)],
    ["provider_key", bytes(32)],
    ["device_kind", oneOf("any", "cpu", "cuda")],
    ["device_memory_bytes", amount(0, LIMITS.MAX_MEMORY_BYTES)],
    ["memory_bytes", amount(1, LIMITS.MAX_MEMORY_BYTES)],
    ["max_seconds", amount(1, LIMITS.MAX_UNIT_SECONDS)],
    ["input_bytes", amount(0, LIMITS.MAX_STREAM_BYTES)],
    ["output_bytes", amount(0, LIMITS.MAX_STREAM_BYTES)],
    ["table_version", int],
    ...window,
    ["token", bytes()],
    ["kind", oneOf("program", "python")],
  ],
  device: [
    ["kind", oneOf("cpu", "cuda")],
    ["name", text],
    ["memory_total_bytes", int],
    ["memory_free_bytes", int],
    ["compute_capability", text],
  ],
  offer: [
    ["suite", int],
    ["offer_id", bytes(16)],
    ["one_time_key", bytes(32)],
    ["request_hash", bytes(32)],
    ["submitter_key", bytes(32)],
    ["device", message("device")],
    ["memory_bytes", int],
    ["max_seconds", int],
    ["input_bytes", int],
    ["output_bytes", int],
    ["runtime", text],
    ["table_version", int],
    ["isolation", listOf(text)],
    ["price", int],
    ...window,
  ],
  header: [
    ["suite", int],
    ["unit_id", bytes(16)],
    ["offer_hash", bytes(32)],
    ["ephemeral_key", bytes(32)],
    ["chunk_bytes", amount(4096, LIMITS.CHUNK_PLAINTEXT_BYTES)],
    ...window,
  ],
  receipt: [
    ["unit_id", bytes(16)],
    ["transcript_hash", bytes(32)],
    ["input_hash", bytes(32)],
    ["output_hash", bytes(32)],
    ["status", oneOf(...STATUSES)],
    ["metering", message("metering")],
    ["isolation", listOf(text)],
    ["wipe", listOf(message("wipe"))],
    ["finished_at_ms", int],
  ],
  metering: ["wall_ms", "cpu_ms", "peak_memory_bytes", "input_bytes", "output_bytes"].map((name) => [name, int]),
  wipe: [["name", text], ["held", bool]],
  ack: [["unit_id", bytes(16)], ["receipt_hash", bytes(32)]],
  resume: [
    ["suite", int],
    ["unit_id", bytes(16)],
    ["header_hash", bytes(32)],
    ["attempt", int],
    ["received", int],
    ...window,
  ],
  resumed: [["received", int]],
  "lane ticket": [
    ["port", amount(1, 65_535)],
    ["ticket", bytes(LIMITS.LANE_TICKET_BYTES)],
    ["lifetime_ms", amount(1, LIMITS.MAX_LANE_TICKET_MS)],
  ],
  capacity: [
    ["suites", listOf(int)],
    ["devices", listOf(message("device"))],
    ["free_slots", int],
    ["memory_bytes", int],
    ["max_seconds", int],
    ["input_bytes", int],
    ["output_bytes", int],
    ["runtime", text],
    ["table_version", int],
    ["isolation", listOf(text)],
    ["sharing", bool],
    ["reason", text],
    ...window,
  ],
  announcement: [["suite", int], ["key", bytes(32)], ["addresses", listOf(text, addresses)], ...window],
  contact: [["key", bytes(32)], ["addresses", listOf(text, addresses)]],
  "find node": [["target", bytes(32)]],
  nodes: [["contacts", listOf(message("contact"), items(0, 20))]],
  "store item": [["level", amount(0, 4)], ["record", bytes()]],
  store: [["items", listOf(message("store item"), items(0, 16))]],
  "store result": [["code", int], ["sampling", amount(0, 48)]],
  stored: [["results", listOf(message("store result"))]],
  find: [["key", bytes(32)], ["level", amount(0, 4)], ["branch", int]],
  found: [["sampling", amount(0, 48)], ["records", listOf(bytes())], ["more", bool]],
  token: [
    ["suite", int],
    ["previous_hash", bytes(0, 32)],
    ["next_key", bytes(32)],
    ["gpu_seconds", amount(1, LIMITS.MAX_TOKEN_GPU_SECONDS)],
    ["memory_bytes", amount(1, LIMITS.MAX_MEMORY_BYTES)],
    ["kinds", listOf(text, ascending)],
    ["audience", bytes(0, 32)],
    ["expires_at_ms", int],
  ],
  "token use": [
    ["suite", int],
    ["token_hash", bytes(32)],
    ["submitter_key", bytes(32)],
    ["request_nonce", bytes(16)],
  ],
  "request token": [["blocks", listOf(bytes(), items(1, LIMITS.MAX_TOKEN_BLOCKS))], ["use", bytes()]],
  "held token": [["blocks", listOf(bytes(), items(1, LIMITS.MAX_TOKEN_BLOCKS))], ["seed", bytes(32)]],
  successor: [["suite", int], ["new_key", bytes(32)], ["issued_at_ms", int]],
  predecessor: [["suite", int], ["old_key", bytes(32)], ["successor_hash", bytes(32)]],
  succession: [["successor", bytes()], ["predecessor", bytes()]],
  successions: [["links", listOf(message("succession"), items(0, LIMITS.MAX_SUCCESSIONS))]],
  refusal: [["code", int], ["detail", text]],
  manifest: [["checkpoint_ms", int], ["checkpoint_steps", int], ["return_carry", bool]],
  summary: [["steps", int], ["load_ms", int], ["run_ms", int], ["stopped_early", bool]],
};

const LONGEST_LIFETIME_MS = {
  request: LIMITS.MAX_REQUEST_LIFETIME_MS,
  header: LIMITS.MAX_REQUEST_LIFETIME_MS,
  offer: LIMITS.MAX_OFFER_LIFETIME_MS,
  capacity: LIMITS.MAX_CAPACITY_LIFETIME_MS,
  resume: LIMITS.MAX_RESUME_LIFETIME_MS,
  announcement: LIMITS.MAX_ANNOUNCEMENT_LIFETIME_MS,
};

function requireLifetime(type, { issued_at_ms: issued, expires_at_ms: expires }) {
  const longest = LONGEST_LIFETIME_MS[type];
  if (longest === undefined) return;
  const lifetime = BigInt(expires) - BigInt(issued);
  if (lifetime <= 0n || lifetime > BigInt(longest)) fail("MALFORMED", "lifetime");
}

function readFields(type, node) {
  const items = typed(node, "array", type);
  const fields = FIELDS[type];
  if (items.length !== fields.length) fail("MALFORMED", `${type} has ${items.length} fields`);
  const value = Object.fromEntries(fields.map(([name, field], i) => [name, field.read(items[i], name)]));
  requireLifetime(type, value);
  return value;
}

const fieldsTree = (type, value) => ({
  type: "array",
  value: FIELDS[type].map(([name, field]) => field.tree(value[name])),
});

/** A message of `type` from a peer's bytes. */
export function decodeMessage(type, input) {
  const tree = readOne(input, LIMITS.MAX_MESSAGE_BYTES);
  const value = readFields(type, tree);
  requireCanonical(tree, input);
  return value;
}

export const encodeMessage = (type, value) => write(fieldsTree(type, value));

/** UNKNOWN_SUITE unless the message names suite 1.  Spec: 00-conventions.md#versions-and-suites */
export function requireSuite(value) {
  if ("suite" in value && value.suite !== 1) fail("UNKNOWN_SUITE");
}
