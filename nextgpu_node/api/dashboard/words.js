// Numbers in words.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function bytes(size) {
  let power = 0;
  while (size >= 1024 && power < UNITS.length - 1) {
    size /= 1024;
    power += 1;
  }
  return `${power ? size.toFixed(size < 10 ? 1 : 0) : size} ${UNITS[power]}`;
}

export function seconds(total) {
  const rest = Math.max(0, Math.floor(total));
  if (rest < 60) return `${rest} s`;
  if (rest < 3600) return `${Math.floor(rest / 60)} min ${rest % 60} s`;
  if (rest < 86400) return `${Math.floor(rest / 3600)} h ${Math.floor((rest % 3600) / 60)} min`;
  return `${Math.floor(rest / 86400)} d ${Math.floor((rest % 86400) / 3600)} h`;
}

export const ago = (at_ms) => `${seconds((Date.now() - at_ms) / 1000)} ago`;

export const clock = (at_ms) => new Date(at_ms).toLocaleTimeString([], { hour12: false });

export const short = (id) => (id.length > 16 ? `${id.slice(0, 8)}…${id.slice(-6)}` : id);

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

// What is lent or not, from what the node says: a state, a headline, a line below it.
export function sharingWords(sharing, device) {
  if (!sharing) return { state: "unknown", headline: "Asking the node …", line: "" };
  const state = sharingState(sharing);
  const headline = {
    off: "Sharing is off",
    starting: "Sharing is starting",
    lending: "Sharing is on",
    paused: "Sharing is paused",
    draining: "Finishing what runs",
  }[state];
  const free = `${sharing.free_slots} of ${plural(sharing.slots, "place")} free`;
  const line = {
    off: `Nothing of this machine is lent. Switch it on to lend ${device} within your limits.`,
    starting: "The sandbox is being made ready.",
    lending: `${free}. Each work unit runs in a sandbox of its own that ends with it.`,
    paused: sentence(sharing.reason),
    draining: "Current units end by themselves; new ones are refused.",
  }[state];
  return { state, headline: headline ?? sharing.state, line: line ?? sentence(sharing.reason) };
}

function sharingState(sharing) {
  if (sharing.active) return "lending";
  if (!sharing.enabled) return "off";
  if (sharing.state && sharing.state !== "off") return sharing.state;
  return sharing.reason === "starting" ? "starting" : "paused";
}

export function sentence(reason) {
  if (!reason) return "";
  const text = reason.replace(/^paused: /, "");
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
