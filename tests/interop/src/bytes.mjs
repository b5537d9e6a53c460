// Bytes, and the one instance of libsodium.  Spec: 00-conventions.md#numbers-and-notation
import sodiumModule from "libsodium-wrappers-sumo";

await sodiumModule.ready;
export const sodium = sodiumModule;

export const ascii = (text) => new TextEncoder().encode(text);
export const hex = (bytes) => Buffer.from(bytes).toString("hex");
export const unhex = (text) => new Uint8Array(Buffer.from(text, "hex"));
export const random = (size) => sodium.randombytes_buf(size);

export const concat = (...parts) => new Uint8Array(Buffer.concat(parts));

export const u32 = (value) => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return new Uint8Array(bytes);
};

export const u64 = (value) => {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(value));
  return new Uint8Array(bytes);
};

/** Whether two public values are the same bytes; secrets go through sodium.memcmp. */
export const same = (a, b) => Buffer.compare(a, b) === 0;
