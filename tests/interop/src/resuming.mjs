// Whether a submitter that comes back may go on with its unit.  Spec: 47-resuming.md
import { same } from "./bytes.mjs";
import { requireWindow } from "./envelope.mjs";
import { fail } from "./errors.mjs";
import { requireSuite } from "./messages.mjs";

/** What a provider must check in a RESUME that came over a connection of `connectionKey`. */
export function checkResume({ signer, message }, unit, connectionKey, nowMs) {
  if (!same(message.unit_id, unit.unitId)) fail("UNKNOWN_UNIT");
  requireSuite(message);
  if (!same(connectionKey, unit.peerKey)) fail("WRONG_PEER", "connection");
  if (!same(signer, unit.submitterKey)) fail("WRONG_PEER", "signer");
  if (!same(message.header_hash, unit.headerHash)) fail("WRONG_OFFER");
  requireWindow(message, nowMs);
  if (BigInt(message.attempt) <= BigInt(unit.lastAttempt)) fail("REPLAYED");
  if (message.received > unit.sent || message.received < unit.keptFrom) fail("WRONG_OFFSET");
}
