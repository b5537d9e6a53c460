// js-libp2p 3 uses Promise.withResolvers (Node.js 22); Node.js 20 lacks nothing else that it needs.
Promise.withResolvers ??= function withResolvers() {
  let resolve, reject;
  const promise = new this((yes, no) => {
    [resolve, reject] = [yes, no];
  });
  return { promise, resolve, reject };
};
