// The worker's records, in their order.  Spec: 50-sealing.md#records
import { concat, u64 } from "./bytes.mjs";
import { codeNumber, fail } from "./errors.mjs";
import { LIMITS } from "./limits.mjs";
import { decodeMessage, encodeMessage } from "./messages.mjs";
import { readProgram, runStep } from "./program.mjs";
import { decodeImage, encodeImage } from "./tensors.mjs";

export class Worker {
  constructor(out) {
    this.out = out;
    this.awaited = "MANIFEST";
    this.steps = 0;
    this.beganMs = Date.now();
    this.loadedMs = this.beganMs;
  }

  take([name, body]) {
    if (name !== this.awaited) fail("UNEXPECTED_MESSAGE", `${name}, not ${this.awaited}`);
    this[name.toLowerCase()](body);
  }

  manifest(body) {
    if (body.length > LIMITS.MAX_MANIFEST_BYTES) fail("TOO_LARGE", "manifest");
    this.manifestMessage = decodeMessage("manifest", body);
    this.awaited = "PROGRAM";
  }

  program(body) {
    this.spec = readProgram(body);
    this.awaited = "CONSTANTS";
  }

  constants(body) {
    this.constantValues = decodeImage(this.spec.constants, body);
    this.carryValues = {};
    if (this.spec.carry.length) this.awaited = "CARRY";
    else this.#start();
  }

  carry(body) {
    this.carryValues = decodeImage(this.spec.carry, body);
    this.#start();
  }

  step(body) {
    const xs = decodeImage(this.spec.xs, body);
    const { carry, ys } = runStep(this.spec, this.constantValues, this.carryValues, xs);
    this.carryValues = carry;
    this.steps += 1;
    this.out.add("RESULT", this.#image("ys", ys));
  }

  async flush() {
    if (this.awaited === "STEP") await this.out.flush();
  }

  async finish() {
    if (this.awaited !== "STEP") fail("TRUNCATED", `${this.awaited} is missing`);
    if (this.manifestMessage.return_carry) {
      this.out.add("CHECKPOINT", concat(u64(this.steps), this.#image("carry", this.carryValues)));
    }
    const now = Date.now();
    this.out.add("DONE", encodeMessage("summary", {
      steps: this.steps, load_ms: this.loadedMs - this.beganMs, run_ms: now - this.loadedMs, stopped_early: false,
    }));
    await this.out.close();
  }

  async fail(error) {
    this.out.add("FAILED", encodeMessage("refusal", { code: codeNumber(error.code), detail: error.detail }));
    await this.out.close();
  }

  #start() {
    this.loadedMs = Date.now();
    this.awaited = "STEP";
    this.out.add("STARTED", new Uint8Array(0));
  }

  #image(section, tensors) {
    return encodeImage(this.spec[section].map(({ name, shape }) => [name, { shape, values: tensors[name] }]));
  }
}
