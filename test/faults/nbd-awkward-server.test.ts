import { describe, expect, it } from "vitest";
import {
  connect,
  MAX_IN_FLIGHT,
  NbdConnectionError,
  NbdRequestError,
  type BlockRun,
} from "../../src/nbd/index.js";
import { FakeNbdServer, type Peer, type ReceivedRequest } from "../support/fake-nbd-server.js";
import { chunk, CHUNK, contentAt, simpleReply } from "../support/nbd-frames.js";

// What these servers do is allowed, or known of real ones; the client has to live with it.

const KiB = 1024;
const READ = 0;
const DISCONNECT = 2;
const BLOCK_STATUS = 7;
const DF = 4;
const EOVERFLOW = 75;

/** Answers reads with their content, in one chunk. */
function answerRead(peer: Peer, { cookie, offset, length }: ReceivedRequest): void {
  peer.send(chunk({ done: true, type: CHUNK.OFFSET_DATA, cookie }, [64, offset], contentAt(offset, length)));
}

/** Takes requests until the client disconnects or closes. */
async function serve(peer: Peer, answer: (request: ReceivedRequest) => void | Promise<void>): Promise<void> {
  for (;;) {
    const request = await peer.request();
    if (request.type === DISCONNECT) break;
    await answer(request);
  }
  peer.close();
}

async function collect(runs: AsyncIterable<BlockRun>): Promise<(readonly number[])[]> {
  const result: (readonly number[])[] = [];
  for await (const { offset, length, flags } of runs) result.push([offset, length, flags]);
  return result;
}

describe("NbdClient.read()", { timeout: 10_000 }, () => {
  it("puts chunks together that come in any order, with holes among them, between those of other reads", async () => {
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake();
      const [a, b] = [await peer.request(), await peer.request()];
      const part = ({ cookie, offset }: ReceivedRequest, at: number, length: number): void =>
        peer.send(
          chunk(
            { done: false, type: CHUNK.OFFSET_DATA, cookie },
            [64, offset + at],
            contentAt(offset + at, length),
          ),
        );
      part(a, 3072, 1024);
      part(b, 0, 100);
      peer.send(
        chunk({ done: false, type: CHUNK.OFFSET_HOLE, cookie: a.cookie }, [64, a.offset + 512], [32, 2560]),
      );
      part(b, 100, 3996);
      part(a, 0, 512);
      peer.send(chunk({ done: true, type: CHUNK.NONE, cookie: b.cookie }));
      peer.send(chunk({ done: true, type: CHUNK.NONE, cookie: a.cookie }));
      await serve(peer, (request) => answerRead(peer, request));
    });
    const client = await connect(server.address);
    const [a, b] = [Buffer.alloc(4096, 0xee), Buffer.alloc(4096, 0xee)];
    await Promise.all([client.read(8192, a), client.read(65536, b)]);
    expect(a.equals(Buffer.concat([contentAt(8192, 512), Buffer.alloc(2560), contentAt(11264, 1024)]))).toBe(
      true,
    );
    expect(b.equals(contentAt(65536, 4096))).toBe(true);
    await client.close();
    await server.played();
  });

  it("reads from a server without structured replies, and sends it no DF", async () => {
    const flags: number[] = [];
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ structured: false, flags: 0x103 });
      await serve(peer, ({ cookie, offset, length, flags: sent }) => {
        flags.push(sent);
        peer.send(
          offset >= 2 ** 20 ? simpleReply(cookie, 22) : simpleReply(cookie, 0, contentAt(offset, length)),
        );
      });
    });
    const client = await connect(server.address, { contexts: ["base:allocation"] });
    expect(client.export).toMatchObject({ structuredReplies: false, contexts: [] });
    const target = Buffer.alloc(600 * KiB);
    await client.read(1000, target);
    expect(target.equals(contentAt(1000, 600 * KiB))).toBe(true);
    await expect(client.read(2 ** 20, Buffer.alloc(10))).rejects.toMatchObject({ errorName: "EINVAL" });
    await expect(client.blockStatus("base:allocation", 0, 512)).rejects.toMatchObject({
      code: "TM_NBD_NO_CONTEXT",
    });
    await client.read(0, Buffer.alloc(10));
    await client.close();
    await server.played();
    expect(new Set(flags)).toEqual(new Set([0]));
  });

  it("asks again without DF when the server will not send that much in one piece", async () => {
    const withDf: number[] = [];
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ size: 2 ** 30 });
      await serve(peer, (request) => {
        const { cookie, flags, length } = request;
        if ((flags & DF) !== 0) withDf.push(length);
        if ((flags & DF) !== 0 && length > 65536) {
          peer.send(chunk({ done: true, type: CHUNK.ERROR, cookie }, [32, EOVERFLOW], [16, 0]));
        } else answerRead(peer, request);
      });
    });
    const client = await connect(server.address);
    const target = Buffer.alloc(20 * 256 * KiB);
    await client.read(0, target);
    expect(target.equals(contentAt(0, target.length))).toBe(true);
    const refused = withDf.length;
    expect(refused).toBeGreaterThan(0);
    expect(refused).toBeLessThanOrEqual(MAX_IN_FLIGHT);
    await client.read(0, target);
    expect(withDf).toHaveLength(refused);
    await client.close();
    await server.played();
  });

  it("ends only the read that the server refuses, once nothing of it is in flight, and names the error", async () => {
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake();
      const requests: ReceivedRequest[] = [];
      while (requests.length < 4) requests.push(await peer.request());
      // Of the first read's three requests the second one fails, in the midst of its content.
      const [a, b, c, other] = requests as [
        ReceivedRequest,
        ReceivedRequest,
        ReceivedRequest,
        ReceivedRequest,
      ];
      peer.send(
        chunk({ done: false, type: CHUNK.OFFSET_DATA, cookie: b.cookie }, [64, b.offset], Buffer.alloc(512)),
      );
      const where = b.offset + 100;
      const error = [[32, 5] as const, [16, 9] as const, "disk died", [64, where] as const];
      peer.send(chunk({ done: false, type: CHUNK.ERROR_OFFSET, cookie: b.cookie }, ...error));
      peer.send(chunk({ done: false, type: 0x8077, cookie: b.cookie }, [32, 1], [16, 0], "an extension"));
      peer.send(chunk({ done: true, type: CHUNK.NONE, cookie: b.cookie }));
      answerRead(peer, other);
      answerRead(peer, c);
      answerRead(peer, a);
      await serve(peer, (request) => answerRead(peer, request));
    });
    const client = await connect(server.address, { exportName: "sda" });
    const target = Buffer.alloc(768 * KiB);
    const failing = client.read(0, target);
    const other = client.read(0, Buffer.alloc(4096));
    const pendingAtFailure = failing.catch(() => client.pending);
    await other;
    await expect(failing).rejects.toThrow(NbdRequestError);
    await expect(failing).rejects.toMatchObject({
      errno: 5,
      errorName: "EIO",
      message: 'Cannot read 262144 bytes at 262144 of export "sda": server answered EIO (disk died)',
    });
    expect(await pendingAtFailure).toBe(0);
    // Answers of the others came in full: nobody writes to the buffer any more.
    expect(target.subarray(512 * KiB).equals(contentAt(512 * KiB, 256 * KiB))).toBe(true);
    await client.read(0, target);
    await client.close();
    await server.played();
  });

  it("keeps 16 requests in flight and no more, over all reads of the connection", async () => {
    let surplus = -1;
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ size: 2 ** 30 });
      const requests: ReceivedRequest[] = [];
      while (requests.length < MAX_IN_FLIGHT) requests.push(await peer.request());
      surplus = peer.waiting;
      for (const request of requests.reverse()) answerRead(peer, request);
      await serve(peer, (request) => answerRead(peer, request));
    });
    const client = await connect(server.address);
    const targets = [0, 1, 2].map(() => Buffer.alloc(2600 * KiB));
    const reads = targets.map((target, index) => client.read(index * 2 ** 22, target));
    expect(client.pending).toBe(MAX_IN_FLIGHT);
    await Promise.all(reads);
    for (const [index, target] of targets.entries()) {
      expect(target.equals(contentAt(index * 2 ** 22, target.length))).toBe(true);
    }
    expect(surplus).toBe(0);
    await client.close();
    await server.played();
  });

  it("keeps to the minimum and maximum block size, at odd offsets too", async () => {
    const requests: ReceivedRequest[] = [];
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ blockSize: [4096, 4096, 64 * KiB], size: 2 ** 20 });
      await serve(peer, (request) => {
        requests.push(request);
        answerRead(peer, request);
      });
    });
    const client = await connect(server.address, { requestSize: 2 ** 20 });
    const target = Buffer.alloc(200_001);
    await client.read(5_001, target);
    expect(target.equals(contentAt(5_001, 200_001))).toBe(true);
    await client.close();
    await server.played();
    for (const { offset, length } of requests) {
      expect([offset % 4096, length % 4096]).toEqual([0, 0]);
      expect(length).toBeLessThanOrEqual(64 * KiB);
    }
  });

  it("rejects with the signal's reason and closes when requests are in flight", async () => {
    const controller = new AbortController();
    const reason = new Error("operator pressed ^C");
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake();
      await peer.request();
      controller.abort(reason);
      await peer.untilClosed();
    });
    const client = await connect(server.address, { exportName: "sda" });
    const other = client.read(4096, Buffer.alloc(10));
    other.catch(() => undefined);
    await expect(client.read(0, Buffer.alloc(10), { signal: controller.signal })).rejects.toBe(reason);
    await expect(other).rejects.toMatchObject({ code: "TM_NBD_CLOSED", cause: reason });
    expect(client.pending).toBe(0);
    await expect(client.read(0, Buffer.alloc(1), { signal: controller.signal })).rejects.toBe(reason);
    await server.played();
  });

  it("leaves the connection alone when the aborted read was still in line", async () => {
    const controller = new AbortController();
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ size: 2 ** 30 });
      const first: ReceivedRequest[] = [];
      while (first.length < MAX_IN_FLIGHT) first.push(await peer.request());
      controller.abort(new Error("not needed"));
      for (const request of first) answerRead(peer, request);
      await serve(peer, (request) => answerRead(peer, request));
    });
    const client = await connect(server.address);
    const large = Buffer.alloc(MAX_IN_FLIGHT * 256 * KiB + 1);
    const reading = client.read(0, large);
    await expect(client.read(0, Buffer.alloc(1), { signal: controller.signal })).rejects.toThrow(
      "not needed",
    );
    await reading;
    expect(large.equals(contentAt(0, large.length))).toBe(true);
    await client.close();
    await server.played();
  });
});

describe("NbdClient.blockStatus()", { timeout: 10_000 }, () => {
  it("takes QEMU's further chunks after the error of one of two contexts, and stays in step", async () => {
    const contexts = [
      { id: 0, name: "base:allocation" },
      { id: 2, name: "qemu:dirty-bitmap:b0" },
    ];
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ contexts });
      const { cookie } = await peer.request();
      peer.send(chunk({ done: true, type: CHUNK.ERROR, cookie }, [32, 22], [16, 3], "gone"[0]!, "on"));
      peer.send(chunk({ done: true, type: CHUNK.BLOCK_STATUS, cookie }, [32, 2], [32, 4096], [32, 1]));
      await serve(peer, (request) => {
        const both = { type: CHUNK.BLOCK_STATUS, cookie: request.cookie };
        peer.send(chunk({ ...both, done: false }, [32, 0], [32, 4096], [32, 3]));
        peer.send(chunk({ ...both, done: true }, [32, 2], [32, 512], [32, 1]));
      });
    });
    const client = await connect(server.address, { contexts: contexts.map(({ name }) => name) });
    await expect(client.blockStatus("base:allocation", 0, 4096)).rejects.toThrow("EINVAL (gon)");
    expect(await client.blockStatus("base:allocation", 0, 8192)).toEqual([
      { offset: 0, length: 4096, flags: 3 },
    ]);
    expect(await client.blockStatus("qemu:dirty-bitmap:b0", 0, 8192)).toEqual([
      { offset: 0, length: 512, flags: 1 },
    ]);
    await client.close();
    await server.played();
  });

  it("refuses those further chunks on a connection with one context", async () => {
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ contexts: [{ id: 0, name: "base:allocation" }] });
      const { cookie } = await peer.request();
      peer.send(chunk({ done: true, type: CHUNK.ERROR, cookie }, [32, 22], [16, 0]));
      peer.send(chunk({ done: true, type: CHUNK.BLOCK_STATUS, cookie }, [32, 0], [32, 4096], [32, 1]));
      await peer.untilClosed();
    });
    const client = await connect(server.address, { contexts: ["base:allocation"] });
    await expect(client.blockStatus("base:allocation", 0, 4096)).rejects.toThrow(NbdRequestError);
    expect(await client.closed).toMatchObject({ code: "TM_NBD_CHUNK_AFTER_DONE" });
    await server.played();
  });

  it("widens to the minimum block size and clips the answer to what was asked", async () => {
    let asked: ReceivedRequest | undefined;
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ contexts: [{ id: 9, name: "c" }], blockSize: [512, 4096, 65536], size: 4000 });
      await serve(peer, (request) => {
        asked ??= request;
        const { cookie } = request;
        peer.send(
          chunk(
            { done: true, type: CHUNK.BLOCK_STATUS, cookie },
            ...[
              [32, 9] as const,
              [32, 1024] as const,
              [32, 1] as const,
              [32, 0xffffffff] as const,
              [32, 0] as const,
            ],
          ),
        );
      });
    });
    const client = await connect(server.address, { contexts: ["c"] });
    expect(await client.blockStatus("c", 700, 3300)).toEqual([
      { offset: 700, length: 836, flags: 1 },
      { offset: 1536, length: 2464, flags: 0 },
    ]);
    expect(asked).toMatchObject({ type: BLOCK_STATUS, offset: 512, length: 3488 });
    await client.close();
    await server.played();
  });
});

describe("NbdClient.map()", { timeout: 10_000 }, () => {
  it("goes on where an answer ends and joins equal neighbours, over 4 GiB requests", async () => {
    const GiB = 2 ** 30;
    const lengths: number[] = [];
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ contexts: [{ id: 1, name: "c" }], size: 10 * GiB });
      await serve(peer, ({ cookie, offset, length }) => {
        lengths.push(length);
        // Never more than 3 GiB at once; the flag changes at 5 GiB only.
        const end = Math.min(offset + length, offset + 3 * GiB);
        const cut = offset < 5 * GiB && end > 5 * GiB ? 5 * GiB : end;
        const flags = offset < 5 * GiB ? 0 : 1;
        peer.send(
          chunk({ done: true, type: CHUNK.BLOCK_STATUS, cookie }, [32, 1], [32, cut - offset], [32, flags]),
        );
      });
    });
    const client = await connect(server.address, { contexts: ["c"] });
    expect(await collect(client.map("c"))).toEqual([
      [0, 5 * GiB, 0],
      [5 * GiB, 5 * GiB, 1],
    ]);
    expect(Math.max(...lengths)).toBe(4 * GiB - 64 * KiB);
    expect(await collect(client.map("c", { offset: 4 * GiB, length: 2 * GiB }))).toEqual([
      [4 * GiB, GiB, 0],
      [5 * GiB, GiB, 1],
    ]);
    await client.close();
    await server.played();
  });
});

describe("NbdClient.close()", { timeout: 10_000 }, () => {
  it("finishes what was asked, refuses what comes later, and says goodbye", async () => {
    const types: number[] = [];
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ size: 2 ** 30 });
      await serve(peer, (request) => {
        types.push(request.type);
        answerRead(peer, request);
      });
      types.push(DISCONNECT);
    });
    const client = await connect(server.address);
    const target = Buffer.alloc(40 * 256 * KiB);
    const reading = client.read(0, target);
    const closing = client.close();
    await expect(client.read(0, Buffer.alloc(1))).rejects.toThrow(NbdConnectionError);
    await Promise.all([reading, closing, client.close()]);
    expect(target.equals(contentAt(0, target.length))).toBe(true);
    expect(await client.closed).toBeUndefined();
    await server.played();
    expect(types).toEqual([...Array<number>(40).fill(READ), DISCONNECT]);
  });

  it("ends when the server hangs, because the requests do", async () => {
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake();
      await peer.untilClosed();
    });
    const client = await connect(server.address, { requestTimeoutMs: 200 });
    const reading = client.read(0, Buffer.alloc(1));
    const closing = client.close();
    await expect(reading).rejects.toMatchObject({ code: "TM_NBD_TIMEOUT" });
    await closing;
    await server.played();
  });
});

describe("NbdClient.destroy()", { timeout: 10_000 }, () => {
  it("ends what is pending with the given reason, at once", async () => {
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake();
      await peer.untilClosed();
    });
    const client = await connect(server.address);
    const reading = client.read(0, Buffer.alloc(100 * 256 * KiB));
    const reason = new Error("another disk failed");
    client.destroy(reason);
    expect(client.pending).toBe(0);
    await expect(reading).rejects.toBe(reason);
    expect(await client.closed).toBe(reason);
    await client.close();
    await server.played();
  });

  it("is what a time-out does to a server that answers some requests and not others", async () => {
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake();
      const stuck = await peer.request();
      expect(stuck.type).toBe(READ);
      await serve(peer, (request) => answerRead(peer, request)).catch(() => undefined);
    });
    const client = await connect(server.address, { requestTimeoutMs: 500 });
    const stuck = client.read(0, Buffer.alloc(10));
    let ended = false;
    const end = stuck.catch((error: unknown) => {
      ended = true;
      return error;
    });
    let answered = 0;
    while (!ended) {
      await client.read(512, Buffer.alloc(10)).then(
        () => (answered += 1),
        () => undefined,
      );
    }
    expect(await end).toMatchObject({ code: "TM_NBD_TIMEOUT" });
    expect(answered).toBeGreaterThan(10);
    await server.played();
  });
});
