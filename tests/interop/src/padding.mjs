// Size classes.  Spec: 50-sealing.md#padding
import { LIMITS } from "./limits.mjs";

const log2 = (n) => Math.floor(Math.log2(n));

export function padded(n) {
  if (n <= LIMITS.PADDING_FLOOR_BYTES) return LIMITS.PADDING_FLOOR_BYTES;
  const e = log2(n);
  const step = 2 ** (e - (log2(e) + 1));
  return Math.ceil(n / step) * step;
}
