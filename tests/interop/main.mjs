// node main.mjs classify DIR     one line of JSON for each vector in DIR: {name, expect, decoded}
// node main.mjs tables           one line: codes, kinds, limits, transitions
// node main.mjs submit PEER_ID SEED SIZE STEPS     a submitter over stdin and stdout
// node main.mjs provide SEED                       a provider over stdin and stdout
//
// The last two say how it went in one line of JSON on stderr.
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { unhex } from "./src/bytes.mjs";
import { allCodes } from "./src/errors.mjs";
import { KINDS } from "./src/framing.mjs";
import { LIMITS } from "./src/limits.mjs";
import { runProvider } from "./src/provider.mjs";
import { RECORDS } from "./src/records.mjs";
import { TRANSITIONS } from "./src/session.mjs";
import { runSubmitter } from "./src/submitter.mjs";
import { classify, toJson } from "./src/vectors.mjs";

const print = (value, to = process.stdout) => to.write(`${toJson(value)}\n`);

/** Ends the process although stdin may still be open. */
async function report(outcome) {
  print(await outcome, process.stderr);
  process.stdout.end(() => process.exit(0));
}

function classifyAll(directory) {
  for (const file of readdirSync(directory).filter((name) => name.endsWith(".json")).sort()) {
    const vector = JSON.parse(readFileSync(join(directory, file), "utf8"));
    print({ name: vector.name, ...classify(vector) });
  }
}

const rows = () =>
  Object.entries(TRANSITIONS)
    .flatMap(([state, steps]) => Object.entries(steps).map(([step, next]) => [state, step, next]))
    .sort();

const COMMANDS = {
  classify: ([directory]) => classifyAll(directory),
  tables: () => print({ errors: allCodes(), frames: KINDS, records: RECORDS, limits: LIMITS, transitions: rows() }),
  submit: ([provider, seed, size, steps]) =>
    report(runSubmitter({ provider, seed: unhex(seed), size: Number(size), steps: Number(steps) })),
  provide: ([seed]) => report(runProvider({ seed: unhex(seed) })),
};

const [command, ...rest] = process.argv.slice(2);
await COMMANDS[command](rest);
