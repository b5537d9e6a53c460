// One unit's stream: frames over stdin and stdout, each checked against the session's table.
import { fail } from "./errors.mjs";
import { FrameReader, frame } from "./framing.mjs";
import { Session } from "./session.mjs";

export class Link {
  /** `side` is this end's letter, S or P. */
  constructor(side, readable = process.stdin, writable = process.stdout) {
    this.own = side;
    this.peer = side === "S" ? "P" : "S";
    this.session = new Session();
    this.writable = writable;
    this.frames = this.#read(readable);
  }

  async *#read(readable) {
    const reader = new FrameReader();
    for await (const bytes of readable) yield* reader.feed(bytes);
    reader.end();
  }

  /** The peer's next frame, [name, body]; TRUNCATED where the stream ends before the unit. */
  async receive() {
    const { value, done } = await this.frames.next();
    if (done) fail("TRUNCATED", `while ${this.session.state}`);
    this.session.step(this.peer, value[0]);
    return value;
  }

  async expect(name) {
    const [got, body] = await this.receive();
    return got === name ? body : fail("UNEXPECTED_MESSAGE", got);
  }

  async send(name, body) {
    this.session.step(this.own, name);
    if (!this.writable.write(frame(name, body))) {
      await new Promise((resolve) => this.writable.once("drain", resolve));
    }
  }

  get state() {
    return this.session.state;
  }
}
