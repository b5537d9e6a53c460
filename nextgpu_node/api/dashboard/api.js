// Talks to the daemon that served this page, and to nobody else.
//
// The key comes in the fragment of the address, which no browser sends anywhere. It is taken out of
// the address at once and kept in this variable: a reload asks for `nextgpu web` again.

let token = "";

export class ApiError extends Error {
  constructor(sentence, status) {
    super(sentence);
    this.status = status;
  }
}

export function takeToken() {
  const match = /^#token=([A-Za-z0-9_-]+)$/.exec(location.hash);
  if (match) {
    token = match[1];
    history.replaceState(null, "", location.pathname + "#/overview");
  }
  return token !== "";
}

async function ask(method, path, body) {
  const headers = { authorization: `Bearer ${token}` };
  if (body !== undefined) headers["content-type"] = "application/json";
  let reply;
  try {
    reply = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "omit",
      cache: "no-store",
      redirect: "error",
      referrerPolicy: "no-referrer",
    });
  } catch {
    throw new ApiError("The node does not answer. Is it still running?", 0);
  }
  if (reply.ok) return reply;
  let sentence = `The node answered ${reply.status}.`;
  try {
    sentence = (await reply.json()).error ?? sentence;
  } catch {
    // Not every refusal is JSON.
  }
  throw new ApiError(sentence, reply.status);
}

export const get = async (path) => (await ask("GET", path)).json();
export const put = async (path, body) => (await ask("PUT", path, body)).json();
export const post = async (path, body = {}) => (await ask("POST", path, body)).json();

// Calls `take` with each event and `told` with whether the node answers; goes on for ever.
export async function follow(take, told) {
  for (let wait = 500; ; wait = Math.min(wait * 2, 8000)) {
    try {
      const reply = await ask("GET", "/v1/events");
      told(true);
      wait = 500;
      await readLines(reply.body.getReader(), take);
      told(false);
    } catch (error) {
      told(false, error.status);
      if (error.status === 401 || error.status === 421) return;
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

async function readLines(reader, take) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line) take(JSON.parse(line));
  }
}
