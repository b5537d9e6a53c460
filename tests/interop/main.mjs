// node main.mjs classify DIR     one line of JSON for each vector in DIR: {name, expect, decoded}
// node main.mjs tables           one line: codes, kinds, limits, transitions
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { allCodes } from "./src/errors.mjs";
import { KINDS } from "./src/framing.mjs";
import { LIMITS } from "./src/limits.mjs";
import { RECORDS } from "./src/records.mjs";
import { TRANSITIONS } from "./src/session.mjs";
import { classify, toJson } from "./src/vectors.mjs";

const print = (value) => process.stdout.write(`${toJson(value)}\n`);

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
};

const [command, ...rest] = process.argv.slice(2);
await COMMANDS[command](rest);
