// Who may say what when.  Spec: 45-session.md#transitions
import { fail } from "./errors.mjs";

// state -> sender and frame -> next state
export const TRANSITIONS = {
  idle: { "S REQUEST": "requested" },
  requested: { "P OFFER": "offered", "P REFUSAL": "closed" },
  offered: { "S HEADER": "streaming", "S CANCEL": "closed", "P ERROR": "closed" },
  streaming: {
    "S DATA": "streaming", "P DATA": "streaming", "S END": "input ended", "P END": "output ended",
    "S CANCEL": "cancelled", "P RECEIPT": "receipted", "P ERROR": "closed",
  },
  "input ended": {
    "P DATA": "input ended", "P END": "output ended", "S CANCEL": "cancelled",
    "P RECEIPT": "receipted", "P ERROR": "closed",
  },
  "output ended": {
    "S DATA": "output ended", "S END": "output ended", "S CANCEL": "cancelled",
    "P RECEIPT": "receipted", "P ERROR": "closed",
  },
  cancelled: { "P DATA": "cancelled", "P END": "cancelled", "P RECEIPT": "receipted", "P ERROR": "closed" },
  receipted: { "S DATA": "receipted", "S END": "receipted", "S CANCEL": "receipted", "S ACK": "closed" },
  closed: {},
};

/** One end's view of one unit. */
export class Session {
  constructor() {
    this.state = "idle";
  }

  step(sender, name) {
    this.state = TRANSITIONS[this.state][`${sender} ${name}`]
      ?? fail("UNEXPECTED_MESSAGE", `${sender} ${name} while ${this.state}`);
    return this.state;
  }
}
