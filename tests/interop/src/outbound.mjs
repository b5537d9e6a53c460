// What one end seals and sends, and what it hashes on the way.  Spec: 50-sealing.md, 55-receipts.md
import { DirectionHash } from "./receipts.mjs";
import { RecordWriter } from "./records.mjs";
import { StreamSealer } from "./sealing.mjs";

export class Outbound {
  constructor(link, keys) {
    this.link = link;
    this.sealer = new StreamSealer(keys);
    this.writer = new RecordWriter();
    this.hashed = new DirectionHash();
  }

  async open() {
    await this.#data(this.sealer.preamble);
  }

  add(name, body) {
    this.writer.add(name, body);
  }

  async flush() {
    for (const chunk of this.writer.flush()) await this.#data(this.sealer.chunk(chunk));
  }

  /** Everything that is left, the last chunk with FINAL, and END. */
  async close() {
    const chunks = this.writer.flush();
    const last = chunks.pop();
    for (const chunk of chunks) await this.#data(this.sealer.chunk(chunk));
    await this.#data(this.sealer.chunk(last, true));
    await this.link.send("END");
  }

  async #data(body) {
    this.hashed.add(body);
    await this.link.send("DATA", body);
  }
}
