// Error codes.  Spec: errors.md
const CODES = {
  1: "MALFORMED", 2: "NOT_CANONICAL", 3: "TOO_LARGE", 4: "UNEXPECTED_MESSAGE", 5: "BAD_SIGNATURE",
  6: "WRONG_PEER", 7: "EXPIRED", 8: "NOT_YET_VALID", 9: "REPLAYED", 10: "UNKNOWN_SUITE",
  11: "WRONG_OFFER", 12: "BAD_SEAL", 13: "TRUNCATED", 14: "UNKNOWN_UNIT", 15: "WRONG_OFFSET",
  20: "NOT_SHARING", 21: "NOT_ALLOWED", 22: "BUSY", 23: "OVER_LIMIT", 24: "NO_SUCH_DEVICE",
  25: "OLD_TABLE", 26: "RATE_LIMITED", 27: "SHUTTING_DOWN", 28: "PYTHON_NOT_ALLOWED",
  30: "BAD_TOKEN", 31: "TOKEN_EXPIRED", 32: "TOKEN_SPENT", 33: "TOKEN_REVOKED", 34: "TOKEN_AUDIENCE",
  35: "TOKEN_ISSUER", 36: "TOKEN_LIMIT",
  40: "BAD_PROGRAM", 41: "UNKNOWN_OPERATOR", 42: "BAD_TENSORS", 43: "OUT_OF_MEMORY", 44: "TIMED_OUT",
  45: "WORKER_CRASHED", 46: "CANCELLED", 47: "STEP_FAILED", 48: "SUBMITTER_LOST", 49: "OWNER_RETURNED",
  60: "PEER_UNREACHABLE", 99: "INTERNAL",
};
const NUMBERS = new Map(Object.entries(CODES).map(([number, name]) => [name, Number(number)]));

/** The other side broke the protocol, or says why it does not go on. `code` is the name in errors.md. */
export class ProtocolError extends Error {
  constructor(code, detail = "") {
    super(detail ? `${code}: ${detail}` : code);
    this.code = code;
    this.detail = detail;
  }
}

export const fail = (code, detail) => {
  throw new ProtocolError(code, detail);
};

/** The name of a code on the wire; an unknown one reads as INTERNAL. */
export const codeName = (number) => CODES[number] ?? "INTERNAL";

export const codeNumber = (name) => NUMBERS.get(name) ?? 99;

export const allCodes = () => CODES;
