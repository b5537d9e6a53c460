// Reads each vector as its kind asks.  Spec: ../vectors/README.md
import { hex, unhex } from "./bytes.mjs";
import { checkCapacity } from "./capacity.mjs";
import { openEnvelope, requireWindow } from "./envelope.mjs";
import { ProtocolError, fail } from "./errors.mjs";
import { FrameReader, KINDS } from "./framing.mjs";
import { readLane } from "./lane.mjs";
import { decodeMessage, requireSuite } from "./messages.mjs";
import { checkHeader, checkRequest } from "./provider.mjs";
import { DirectionHash, checkReceipt } from "./receipts.mjs";
import { RecordJoiner, fragments } from "./records.mjs";
import { StreamOpener, submitterKeys, workerKeys } from "./sealing.mjs";
import { checkResume } from "./resuming.mjs";
import { RESUMING, Session, TRANSITIONS } from "./session.mjs";
import { checkOffer } from "./submitter.mjs";
import { predecessors } from "./succession.mjs";
import { checkToken } from "./tokens.mjs";

function readEnvelope(params, input) {
  const { signer, message, hash } = openEnvelope(params.type, input);
  requireSuite(message);
  const hasWindow = "issued_at_ms" in message && "expires_at_ms" in message;
  if (params.now_ms !== undefined && hasWindow) requireWindow(message, params.now_ms);
  return { signer, hash, message };
}

function readFrames(input) {
  const reader = new FrameReader();
  const frames = [...reader.feed(input)];
  reader.end();
  return frames;
}

function streamKeys(params) {
  const [secret, mine, theirs, offer, header] =
    ["own_secret_key", "own_public_key", "peer_public_key", "offer", "header"].map((name) => unhex(params[name]));
  const derive = params.direction === "in" ? workerKeys : submitterKeys;
  return derive({ publicKey: mine, privateKey: secret }, theirs, offer, header)[params.direction];
}

function readRecords(chunk, joiner, records) {
  for (const fragment of fragments(chunk)) {
    joiner.add(fragment);
    records.push([fragment.name, fragment.body, fragment.more]);
  }
}

function readStream(params, input) {
  const keys = streamKeys(params);
  const [opener, joiner, hashed] = [new StreamOpener(keys), new RecordJoiner(), new DirectionHash()];
  const records = [];
  let ended = false;
  const reader = new FrameReader();
  for (const [name, body] of reader.feed(input)) {
    if (name === "DATA") {
      const chunk = opener.data(body);
      hashed.add(body);
      if (chunk) readRecords(chunk, joiner, records);
    } else if (name === "END") {
      opener.end();
      ended = true;
    } else fail("UNEXPECTED_MESSAGE", name);
  }
  reader.end();
  if (!ended) fail("TRUNCATED", "no END");
  return {
    transcript_hash: keys.th, stream_key: keys.key, commitment: keys.commitment,
    ciphertext_hash: hashed.digest(), records,
  };
}

function readSession({ table }, input) {
  const session = new Session(table === "resuming" ? RESUMING : TRANSITIONS);
  const steps = [];
  let refused = null;
  for (let i = 0; i < input.length; i += 2) {
    const step = [String.fromCharCode(input[i]), KINDS[input[i + 1]]];
    steps.push(step.join(" "));
    try {
      session.step(...step);
    } catch (error) {
      refused = error.code;
    }
  }
  return { expect: refused ?? "ok", decoded: { steps, state: session.state } };
}

function readToken(params, input) {
  const request = {
    submitterKey: unhex(params.submitter_key), nonce: unhex(params.request_nonce),
    memoryBytes: params.memory_bytes, maxSeconds: params.max_seconds,
  };
  return checkToken(input, unhex(params.issuer), request, params.now_ms);
}

const CHECKS = {
  request: (opened, known, nowMs) =>
    checkRequest(opened, unhex(known.provider_key), known.seen.map(unhex), nowMs),
  offer: (opened, known, nowMs) =>
    checkOffer(opened, openEnvelope("request", unhex(known.request)), unhex(known.provider_key), nowMs),
  header: (opened, known, nowMs) => {
    const request = openEnvelope("request", unhex(known.request));
    checkHeader(opened, request, openEnvelope("offer", unhex(known.offer)), nowMs);
  },
  receipt: (opened, known) => checkReceipt(opened, {
    providerKey: unhex(known.provider_key), unitId: unhex(known.unit_id), th: unhex(known.transcript),
    outputHash: unhex(known.received), inputHash: unhex(known.sent), wholeInput: known.sent !== "",
  }),
  resume: (opened, known, nowMs) => checkResume(opened, {
    unitId: unhex(known.unit_id), headerHash: unhex(known.header_hash),
    submitterKey: unhex(known.submitter_key), peerKey: unhex(known.peer_key),
    lastAttempt: known.last_attempt, keptFrom: known.kept_from, sent: known.sent,
  }, unhex(known.connection_key), nowMs),
  capacity: (opened, known, nowMs) => checkCapacity(opened, unhex(known.provider_key), nowMs),
};

function readCheck(params, input) {
  const opened = openEnvelope(params.of, input);
  CHECKS[params.of](opened, params, params.now_ms);
  return { signer: opened.signer, hash: opened.hash };
}

const READERS = {
  message: (params, input) => decodeMessage(params.type, input),
  envelope: readEnvelope,
  frame: (params, input) => readFrames(input),
  stream: readStream,
  check: readCheck,
  token: readToken,
  lane: readLane,
  successions: ({ peer }, input) => ({ predecessors: predecessors(input, unhex(peer)) }),
};

/** {expect, decoded} as this implementation sees the vector. */
export function classify({ kind, params, input }) {
  const bytes = unhex(input);
  if (kind === "session") return readSession(params, bytes);
  try {
    return { expect: "ok", decoded: READERS[kind](params, bytes) };
  } catch (error) {
    if (!(error instanceof ProtocolError)) throw error;
    return { expect: error.code, decoded: null };
  }
}

/** JSON with bytes in hex and every integer in full. */
export const toJson = (value) =>
  JSON.stringify(value, (_, each) => {
    if (each instanceof Uint8Array) return hex(each);
    return typeof each === "bigint" ? `${each}n` : each;
  }).replace(/"(\d+)n"/g, "$1");
