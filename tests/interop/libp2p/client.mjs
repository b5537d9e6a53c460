// node client.mjs ask ADDRESS KEY        through the node at ADDRESS: ping it, find who announces KEY,
//                                        fetch and verify each one's signed capacity; one line of JSON
// node client.mjs lend ADDRESS KEY SEED  announce KEY at the node at ADDRESS, then answer echo streams
//                                        until stdin ends; one line of JSON once it is announced
import "./polyfill.mjs";
import { noise } from "@chainsafe/libp2p-noise";
import { yamux } from "@chainsafe/libp2p-yamux";
import { generateKeyPairFromSeed } from "@libp2p/crypto/keys";
import { identify } from "@libp2p/identify";
import { ping } from "@libp2p/ping";
import { tcp } from "@libp2p/tcp";
import { multiaddr } from "@multiformats/multiaddr";
import { createLibp2p } from "libp2p";
import { sodium, unhex } from "../src/bytes.mjs";
import { checkCapacity } from "../src/capacity.mjs";
import { DHT_PROTOCOL, announcement, dhtMessages, encodeDht, openAnnouncement } from "../src/dht.mjs";
import { openEnvelope } from "../src/envelope.mjs";
import { FrameReader } from "../src/framing.mjs";
import { peerId } from "../src/identity.mjs";
import { toJson } from "../src/vectors.mjs";

const CAPACITY_PROTOCOL = "/nextgpu/capacity/1";
const ECHO_PROTOCOL = "/test/echo/1";

const print = (value) => process.stdout.write(`${toJson(value)}\n`);
const now = () => Date.now();

const node = (options = {}) =>
  createLibp2p({
    addresses: { listen: ["/ip4/127.0.0.1/tcp/0"] },
    transports: [tcp()],
    connectionEncrypters: [noise()],
    streamMuxers: [yamux()],
    services: { identify: identify(), ping: ping() },
    ...options,
  });

async function* chunks(stream) {
  for await (const chunk of stream) yield chunk.subarray();
}

/** Answers to one question, until `isLast`. */
async function askDht(connection, kind, message, isLast = () => true) {
  const stream = await connection.newStream(DHT_PROTOCOL);
  stream.send(encodeDht(kind, message));
  const answers = [];
  for await (const [, answer] of dhtMessages(chunks(stream))) {
    answers.push(answer);
    if (isLast(answer)) break;
  }
  await stream.close();
  return answers;
}

async function capacityOf(connection, key) {
  const stream = await connection.newStream(CAPACITY_PROTOCOL);
  const reader = new FrameReader();
  for await (const chunk of chunks(stream)) {
    for (const [name, body] of reader.feed(chunk)) {
      if (name !== "CAPACITY") throw new Error(name);
      const opened = openEnvelope("capacity", body);
      checkCapacity(opened, key, now());
      return opened.message;
    }
  }
  throw new Error("no capacity came");
}

async function ask(address, key) {
  const client = await node();
  const connection = await client.dial(multiaddr(address));
  const pingMs = await client.services.ping.ping(connection.remotePeer);
  const identified = await client.services.identify.identify(connection);
  const wanted = { key, level: 0, branch: 0 };
  const pages = await askDht(connection, "find", wanted, (page) => !page.more);
  const found = [];
  for (const record of pages.flatMap((page) => page.records)) {
    const { signer, message } = openAnnouncement(record, wanted, now());
    const there = await client.dial(multiaddr(`${message.addresses[0]}/p2p/${peerId(signer)}`));
    found.push({ peer: peerId(signer), capacity: await capacityOf(there, signer) });
  }
  print({ ping_ms: pingMs, protocols: identified.protocols, found });
  await client.stop();
}

async function lend(address, key, seed) {
  const lender = await node({ privateKey: await generateKeyPairFromSeed("Ed25519", seed) });
  await lender.handle(ECHO_PROTOCOL, async (stream) => {
    for await (const chunk of chunks(stream)) stream.send(chunk);
    await stream.close();
  });
  const connection = await lender.dial(multiaddr(address));
  const addresses = lender.getMultiaddrs().map((each) => String(each).split("/p2p/")[0]);
  const record = announcement(key, addresses, now(), sodium.crypto_sign_seed_keypair(seed));
  const [stored] = await askDht(connection, "store", { items: [{ level: 0, record }] });
  print({ peer: lender.peerId.toString(), codes: stored.results.map((result) => result.code) });
  for await (const _ of process.stdin);
  await lender.stop();
}

const [command, address, key, seed] = process.argv.slice(2);
await { ask: () => ask(address, unhex(key)), lend: () => lend(address, unhex(key), unhex(seed)) }[command]();
process.exit(0);
