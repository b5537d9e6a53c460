// What one end receives and opens.  Spec: 50-sealing.md, 55-receipts.md
import { DirectionHash } from "./receipts.mjs";
import { RecordJoiner, fragments } from "./records.mjs";
import { StreamOpener } from "./sealing.mjs";

export class Inbound {
  constructor(keys) {
    this.opener = new StreamOpener(keys);
    this.joiner = new RecordJoiner();
    this.hashed = new DirectionHash();
  }

  /** The records, [name, body], that a DATA body completes. */
  *data(body) {
    this.hashed.add(body);
    const chunk = this.opener.data(body);
    for (const fragment of chunk ? fragments(chunk) : []) {
      const record = this.joiner.add(fragment);
      if (record) yield record;
    }
  }

  end() {
    this.opener.end();
  }
}
