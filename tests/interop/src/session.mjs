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

// How a stream begins that takes the place of one that was lost.  Spec: 47-resuming.md
export const RESUMING = {
  idle: { "S RESUME": "requested" },
  requested: { "P RESUMED": "streaming", "P REFUSAL": "closed" },
  streaming: {},
  closed: {},
};

/** One end's view of one unit. */
export class Session {
  constructor(table = TRANSITIONS) {
    this.table = table;
    this.state = "idle";
  }

  step(sender, name) {
    this.state = this.table[this.state][`${sender} ${name}`]
      ?? fail("UNEXPECTED_MESSAGE", `${sender} ${name} while ${this.state}`);
    return this.state;
  }
}
