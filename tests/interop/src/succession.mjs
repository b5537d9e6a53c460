// Changes of a node's key, signed from both sides.  Spec: 15-succession.md#what-the-reader-checks
import { hex, same } from "./bytes.mjs";
import { openEnvelope } from "./envelope.mjs";
import { fail } from "./errors.mjs";
import { decodeMessage, requireSuite } from "./messages.mjs";

/** [old key, new key] of one link. */
function openLink({ successor, predecessor }) {
  const [naming, answer] = [openEnvelope("successor", successor), openEnvelope("predecessor", predecessor)];
  requireSuite(naming.message);
  requireSuite(answer.message);
  const fits = same(answer.signer, naming.message.new_key) && same(answer.message.old_key, naming.signer);
  if (!fits) fail("WRONG_PEER", "the two halves");
  if (!same(answer.message.successor_hash, naming.hash)) fail("BAD_SIGNATURE", "successor_hash");
  return [naming.signer, answer.signer];
}

/** The keys that `peer` had before, oldest first. */
export function predecessors(body, peer) {
  const links = decodeMessage("successions", body).links.map(openLink);
  const olds = links.map(([old]) => old);
  const keys = [...olds, peer];
  links.forEach(([, heir], i) => {
    if (!same(heir, keys[i + 1])) fail("WRONG_PEER", "a gap");
  });
  if (new Set(keys.map(hex)).size !== keys.length) fail("MALFORMED", "a circle");
  return olds;
}
