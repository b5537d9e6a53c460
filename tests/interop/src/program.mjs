// Programs: writing a small one, and running those that only add and multiply.  Spec: 60-program.md
import { decode, encode } from "@msgpack/msgpack";
import { fail } from "./errors.mjs";

const FIELDS = ["version", "min_table_version", "symbols", "constants", "carry", "xs", "ys", "finish_ys",
  "stop", "checkpoint_s", "step", "init", "finish"];
const VALUE = 0; // the tag of a reference to a value

const value = (number) => [VALUE, number];
const spec = (name, size) => [name, "float32", [size]];
const node = (op, ...numbers) => [op, numbers.map(value), [], "t"];

/** y = x · w and carry = carry + x, for vectors of `size` float32. */
export function scaleAndSum(size) {
  // values: 0 w, 1 sum, 2 x, then 3 y and 4 the next sum
  const step = [[node("aten.mul.Tensor", 2, 0), node("aten.add.Tensor", 1, 2)], [4, 3]];
  const program = {
    version: 1, min_table_version: 1, symbols: [], constants: [spec("w", size)], carry: [spec("sum", size)],
    xs: [spec("x", size)], ys: [spec("y", size)], finish_ys: [], stop: null, checkpoint_s: 0,
    step, init: null, finish: null,
  };
  return encode(FIELDS.map((name) => program[name]));
}

const readSpecs = (section) => section.map(([name, dtype, shape]) => ({ name, dtype, shape }));

const readGraph = (graph) => graph && {
  nodes: graph[0].map(([op, args, kwargs, outputs]) => ({ op, args, kwargs, outputs })),
  outputs: graph[1],
};

/** A program as its worker needs it. What this peer can not run is refused. */
export function readProgram(bytes) {
  const items = decode(bytes);
  if (!Array.isArray(items) || items.length !== FIELDS.length) fail("BAD_PROGRAM", "fields");
  const program = Object.fromEntries(FIELDS.map((name, i) => [name, items[i]]));
  if (program.version !== 1 || program.init || program.finish || program.stop !== null) {
    fail("BAD_PROGRAM", "more than this peer does");
  }
  const sections = ["constants", "carry", "xs", "ys"].map((name) => [name, readSpecs(program[name])]);
  return { ...Object.fromEntries(sections), step: readGraph(program.step) };
}

const elementwise = (combine) => (a, b) => {
  const [long, short] = [a, b].map((each) => (Array.isArray(each) ? each : [each]))
    .sort((one, other) => other.length - one.length);
  return long.map((each, i) => Math.fround(combine(each, short.length === 1 ? short[0] : short[i])));
};

const OPERATORS = {
  "aten.add.Tensor": elementwise((a, b) => a + b),
  "aten.mul.Tensor": elementwise((a, b) => a * b),
};

const argument = (each, values) => (Array.isArray(each) ? values[each[1]] : each);

function run({ op, args, kwargs }, values) {
  const operator = OPERATORS[op] ?? fail("UNKNOWN_OPERATOR", op);
  if (kwargs.length) fail("BAD_PROGRAM", "keyword arguments");
  return operator(...args.map((each) => argument(each, values)));
}

/** One step: {carry, ys}, each by name. */
export function runStep(program, constants, carry, xs) {
  const given = [["constants", constants], ["carry", carry], ["xs", xs]];
  const values = given.flatMap(([section, tensors]) => program[section].map(({ name }) => tensors[name]));
  for (const each of program.step.nodes) values.push(run(each, values));
  const outputs = program.step.outputs.map((number) => values[number]);
  const named = (section, from) => Object.fromEntries(program[section].map(({ name }, i) => [name, outputs[from + i]]));
  return { carry: named("carry", 0), ys: named("ys", program.carry.length) };
}
