// Tensor images: u64 little-endian header size ‖ JSON header ‖ data.  Spec: 60-program.md#tensors
//
// float32 only: this peer computes nothing else.
import { concat } from "./bytes.mjs";
import { fail } from "./errors.mjs";

const ELEMENT_BYTES = 4;
const FIELDS = "data_offsets,dtype,shape";

const elements = (shape) => shape.reduce((product, size) => product * size, 1);

const littleEndian = (value) => {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return new Uint8Array(bytes);
};

const floatBytes = (values) => {
  const bytes = Buffer.alloc(values.length * ELEMENT_BYTES);
  values.forEach((value, i) => bytes.writeFloatLE(value, i * ELEMENT_BYTES));
  return new Uint8Array(bytes);
};

/** `tensors` is a list of [name, {shape, values}] in the order of their specs. */
export function encodeImage(tensors) {
  let at = 0;
  const entries = tensors.map(([name, { shape, values }]) => {
    const offsets = [at, at + values.length * ELEMENT_BYTES];
    at = offsets[1];
    return [name, { dtype: "F32", shape, data_offsets: offsets }];
  });
  const json = JSON.stringify(Object.fromEntries(entries));
  const header = Buffer.from(json.padEnd(Math.ceil(json.length / 8) * 8, " "));
  return concat(littleEndian(header.length), header, ...tensors.map(([, { values }]) => floatBytes(values)));
}

function readHeader(image) {
  if (image.length < 8) fail("TRUNCATED", "image");
  const size = Number(Buffer.from(image.slice(0, 8)).readBigUInt64LE());
  if (8 + size > image.length) fail("TRUNCATED", "image header");
  try {
    return [JSON.parse(Buffer.from(image.slice(8, 8 + size)).toString("utf8")), image.slice(8 + size)];
  } catch {
    return fail("BAD_TENSORS", "header");
  }
}

function readTensor({ name, dtype, shape }, entry, data) {
  const [begin, end] = entry.data_offsets;
  const fits = entry.dtype === "F32" && dtype === "float32" && String(entry.shape) === String(shape);
  if (!fits || end - begin !== elements(shape) * ELEMENT_BYTES) fail("BAD_TENSORS", name);
  const bytes = Buffer.from(data.slice(begin, end));
  return Array.from({ length: elements(shape) }, (_, i) => bytes.readFloatLE(i * ELEMENT_BYTES));
}

/** The values of each spec of a section, by name; all names, and no others, without gaps. */
export function decodeImage(specs, image) {
  const [header, data] = readHeader(image);
  const names = Object.keys(header);
  if (names.length !== specs.length) fail("BAD_TENSORS", "names");
  let at = 0;
  for (const entry of Object.values(header)) {
    if (Object.keys(entry).sort().join() !== FIELDS) fail("BAD_TENSORS", "fields");
    if (entry.data_offsets[0] !== at) fail("BAD_TENSORS", "a gap or an overlap");
    at = entry.data_offsets[1];
  }
  if (at !== data.length) fail("BAD_TENSORS", "bytes after the last tensor");
  return Object.fromEntries(specs.map((spec) => {
    const entry = header[spec.name] ?? fail("BAD_TENSORS", spec.name);
    return [spec.name, readTensor(spec, entry, data)];
  }));
}
