// Capability tokens, as their issuer checks them.  Spec: 75-tokens.md#what-the-issuer-checks
import { same } from "./bytes.mjs";
import { openEnvelope } from "./envelope.mjs";
import { ProtocolError, fail } from "./errors.mjs";
import { LIMITS } from "./limits.mjs";
import { decodeMessage, requireSuite } from "./messages.mjs";

const KIND = "program";

const bad = (detail) => fail("BAD_TOKEN", detail);

/** Whatever is wrong inside is BAD_TOKEN. */
function asBadToken(judge) {
  try {
    return judge();
  } catch (error) {
    if (error instanceof ProtocolError) bad(error.message);
    throw error;
  }
}

const openPart = (type, bytes) => {
  const opened = openEnvelope(type, bytes);
  requireSuite(opened.message);
  return opened;
};

const wider = (before, block) =>
  block.gpu_seconds > before.gpu_seconds || block.memory_bytes > before.memory_bytes
  || block.expires_at_ms > before.expires_at_ms
  || !block.kinds.every((kind) => before.kinds.includes(kind))
  || (before.audience.length > 0 && !same(block.audience, before.audience));

function checkLink(before, block) {
  if (!same(block.signer, before.message.next_key)) bad("a block's signer");
  if (!same(block.message.previous_hash, before.hash)) bad("previous_hash");
  if (wider(before.message, block.message)) bad("a wider block");
}

function checkUse(use, last, request) {
  const fits = same(use.signer, last.message.next_key) && same(use.message.token_hash, last.hash)
    && same(use.message.submitter_key, request.submitterKey)
    && same(use.message.request_nonce, request.nonce);
  if (!fits) bad("the use");
}

/** The blocks of a token whose chain and use hold for this request. */
function openToken(field, request) {
  if (field.length > LIMITS.MAX_TOKEN_BYTES) bad("size");
  const token = decodeMessage("request token", field);
  const blocks = token.blocks.map((bytes) => openPart("token", bytes));
  if (blocks[0].message.previous_hash.length) bad("the first block has one before it");
  blocks.slice(1).forEach((block, i) => checkLink(blocks[i], block));
  checkUse(openPart("token use", token.use), blocks.at(-1), request);
  return blocks;
}

/** Steps 1 to 7, 9 and 10; what is recorded, revoked and spent is the issuer's own matter. */
export function checkToken(field, issuer, request, nowMs) {
  const blocks = asBadToken(() => openToken(field, request));
  const last = blocks.at(-1).message;
  if (!same(blocks[0].signer, issuer)) fail("TOKEN_ISSUER");
  if (nowMs > last.expires_at_ms) fail("TOKEN_EXPIRED");
  if (last.audience.length && !same(last.audience, request.submitterKey)) fail("TOKEN_AUDIENCE");
  const within = last.kinds.includes(KIND) && request.memoryBytes <= last.memory_bytes
    && request.maxSeconds <= last.gpu_seconds;
  if (!within) fail("TOKEN_LIMIT");
  return { hashes: blocks.map((block) => block.hash), allows: last };
}
