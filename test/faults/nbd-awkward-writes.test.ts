import { describe, expect, it } from "vitest";
import { connect, MAX_IN_FLIGHT, NbdProtocolError, NbdRequestError } from "../../src/nbd/index.js";
import { FakeNbdServer, type Peer, type ReceivedRequest } from "../support/fake-nbd-server.js";
import { chunk, CHUNK, CMD, contentAt, simpleReply } from "../support/nbd-frames.js";

const KiB = 1024;
const MiB = 1024 * KiB;
const NO_HOLE = 2;
/** HAS_FLAGS, SEND_FLUSH, SEND_WRITE_ZEROES, SEND_DF */
const WRITABLE = 0x1 | 0x4 | 0x40 | 0x80;

function done(peer: Peer, { cookie }: ReceivedRequest): void {
  peer.send(chunk({ done: true, type: CHUNK.NONE, cookie }));
}

/** Takes requests until the client disconnects; returns them. */
async function serve(
  peer: Peer,
  answer: (request: ReceivedRequest) => void = (request) => done(peer, request),
): Promise<ReceivedRequest[]> {
  const requests: ReceivedRequest[] = [];
  for (;;) {
    const request = await peer.request();
    if (request.type === CMD.DISC) break;
    requests.push(request);
    answer(request);
  }
  peer.close();
  return requests;
}

describe("NbdClient.write()", { timeout: 10_000 }, () => {
  it("sends each byte once, in requests of the wanted size, 16 in flight and no more", async () => {
    let requests: ReceivedRequest[] = [];
    let surplus = -1;
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ flags: WRITABLE, size: 64 * MiB });
      const first: ReceivedRequest[] = [];
      while (first.length < MAX_IN_FLIGHT) first.push(await peer.request());
      surplus = peer.waiting;
      for (const request of first.reverse()) done(peer, request);
      requests = [...first, ...(await serve(peer))];
    });
    const client = await connect(server.address);
    const bytes = contentAt(1000, 5 * MiB + 5);
    const writing = client.write(1000, bytes);
    expect(client.pending).toBe(MAX_IN_FLIGHT);
    await writing;
    await client.close();
    await server.played();
    expect(surplus).toBe(0);
    const sorted = requests.toSorted((a, b) => a.offset - b.offset);
    expect(sorted.map(({ type, flags, length }) => [type, flags, length])).toEqual([
      ...Array.from({ length: 20 }, () => [CMD.WRITE, 0, 256 * KiB]),
      [CMD.WRITE, 0, 5],
    ]);
    expect(Buffer.concat(sorted.map(({ payload }) => payload!)).equals(bytes)).toBe(true);
  });

  it("takes simple replies from a server that has structured ones: they bring nothing", async () => {
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ flags: WRITABLE });
      await serve(peer, ({ cookie, offset }) => peer.send(simpleReply(cookie, offset === 0 ? 0 : 28)));
    });
    const client = await connect(server.address, { exportName: "sda" });
    await client.write(0, Buffer.alloc(512));
    await expect(client.write(512, Buffer.alloc(512))).rejects.toThrow(
      'Cannot write 512 bytes at 512 of export "sda": server answered ENOSPC',
    );
    await client.write(0, Buffer.alloc(512));
    await client.close();
    await server.played();
  });

  it("stops sending after a refusal, and settles when nothing of it is in flight", async () => {
    let sent = 0;
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ flags: WRITABLE, size: 64 * MiB });
      const first: ReceivedRequest[] = [];
      while (first.length < MAX_IN_FLIGHT) first.push(await peer.request());
      const error = [[32, 5] as const, [16, 4] as const, "dead"];
      peer.send(chunk({ done: true, type: CHUNK.ERROR, cookie: first[3]!.cookie }, ...error));
      // A further client request, of another kind, comes in place of the refused one.
      const flush = await peer.request();
      expect(flush.type).toBe(CMD.FLUSH);
      done(peer, flush);
      for (const request of first) if (request !== first[3]) done(peer, request);
      sent = MAX_IN_FLIGHT + (await serve(peer)).length;
    });
    const client = await connect(server.address);
    const writing = client.write(0, Buffer.alloc(32 * MiB));
    const pendingAtFailure = writing.catch(() => client.pending);
    await client.flush();
    await expect(writing).rejects.toThrow(NbdRequestError);
    await expect(writing).rejects.toThrow("EIO (dead)");
    expect(await pendingAtFailure).toBe(0);
    await client.close();
    await server.played();
    expect(sent).toBe(MAX_IN_FLIGHT);
  });

  it("changes the blocks at odd ends by reading them, one after the other", async () => {
    const disk = contentAt(0, MiB);
    const expected = Buffer.from(disk);
    let requests: ReceivedRequest[] = [];
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ flags: WRITABLE, blockSize: [4096, 4096, 64 * KiB] });
      requests = await serve(peer, (request) => {
        const { cookie, offset, length, payload } = request;
        if (payload !== undefined) payload.copy(disk, offset);
        if (request.type === CMD.WRITE) done(peer, request);
        else {
          const content = Buffer.from(disk.subarray(offset, offset + length));
          peer.send(chunk({ done: true, type: CHUNK.OFFSET_DATA, cookie }, [64, offset], content));
        }
      });
    });
    const client = await connect(server.address);
    // All in the block at 8192, and one over three blocks of which the last is that one too.
    const changes = [
      [8200, 1],
      [8300, 90],
      [1, 8192],
      [12_000, 100_000],
      [MiB - 1, 1],
    ] as const;
    await Promise.all(
      changes.map(([offset, length], index) => {
        expected.fill(index + 1, offset, offset + length);
        return client.write(offset, Buffer.alloc(length, index + 1));
      }),
    );
    await client.close();
    await server.played();
    expect(disk.equals(expected)).toBe(true);
    for (const { offset, length } of requests) expect([offset % 4096, length % 4096]).toEqual([0, 0]);
    expect(Math.max(...requests.map(({ length }) => length))).toBe(64 * KiB);
  });

  it("rejects with the signal's reason and closes when requests are in flight", async () => {
    const controller = new AbortController();
    const reason = new Error("operator pressed ^C");
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ flags: WRITABLE });
      await peer.request();
      controller.abort(reason);
      await peer.untilClosed();
    });
    const client = await connect(server.address);
    const { signal } = controller;
    await expect(client.write(0, Buffer.alloc(512), { signal })).rejects.toBe(reason);
    expect(client.pending).toBe(0);
    expect(await client.closed).toMatchObject({ code: "TM_NBD_CLOSED", cause: reason });
    await expect(client.write(0, Buffer.alloc(512), { signal })).rejects.toBe(reason);
    await server.played();
  });
});

describe("NbdClient.writeZeroes()", { timeout: 10_000 }, () => {
  const zeroing = async (
    offer: { readonly flags: number; readonly blockSize?: readonly [number, number, number] },
    noHole: boolean,
  ): Promise<ReceivedRequest[]> => {
    let requests: ReceivedRequest[] = [];
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ ...offer, size: 1024 * MiB });
      requests = await serve(peer);
    });
    const client = await connect(server.address);
    await client.writeZeroes(0, 100 * MiB, { noHole });
    await client.writeZeroes(0, 0);
    await client.close();
    await server.played();
    return requests;
  };

  it.each([
    [false, 0],
    [true, NO_HOLE],
  ])("sends a few requests without payload, noHole %s as flags %i", async (noHole, flags) => {
    const requests = await zeroing({ flags: WRITABLE }, noHole);
    expect(requests.map((request) => [request.type, request.flags, request.offset, request.length])).toEqual([
      [CMD.WRITE_ZEROES, flags, 0, 32 * MiB],
      [CMD.WRITE_ZEROES, flags, 32 * MiB, 32 * MiB],
      [CMD.WRITE_ZEROES, flags, 64 * MiB, 32 * MiB],
      [CMD.WRITE_ZEROES, flags, 96 * MiB, 4 * MiB],
    ]);
  });

  it("keeps to the maximum block size", async () => {
    const requests = await zeroing({ flags: WRITABLE, blockSize: [512, 4096, MiB] }, false);
    expect(requests.map(({ length }) => length)).toEqual(Array<number>(100).fill(MiB));
  });

  it("writes zeroes where the server does not offer the request", async () => {
    const requests = await zeroing({ flags: WRITABLE & ~0x40 }, true);
    expect(new Set(requests.map(({ type, flags }) => `${type}/${flags}`))).toEqual(new Set(["1/0"]));
    const total = requests.reduce((sum, { payload }) => {
      expect(payload!.equals(Buffer.alloc(payload!.length))).toBe(true);
      return sum + payload!.length;
    }, 0);
    expect(total).toBe(100 * MiB);
  });
});

describe("NbdClient.flush()", { timeout: 10_000 }, () => {
  it.each([
    ["asks once where the server offers it", WRITABLE, [CMD.FLUSH]],
    ["asks nothing where the server does not", WRITABLE & ~0x4, []],
  ])("%s", async (_title, flags, types) => {
    let requests: ReceivedRequest[] = [];
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ flags });
      requests = await serve(peer);
    });
    const client = await connect(server.address);
    await client.flush();
    await client.close();
    await server.played();
    expect(requests.map(({ type, offset, length }) => [type, offset, length])).toEqual(
      types.map((type) => [type, 0, 0]),
    );
  });
});

describe("NbdClient ends the connection when a server answers a write with", { timeout: 5000 }, () => {
  const lies: readonly [title: string, code: string, tell: (peer: Peer, request: ReceivedRequest) => void][] =
    [
      [
        "content",
        "TM_NBD_REPLY_TYPE",
        (peer, { cookie }) =>
          peer.send(chunk({ done: true, type: CHUNK.OFFSET_DATA, cookie }, [64, 0], Buffer.alloc(512))),
      ],
      [
        "a hole",
        "TM_NBD_REPLY_TYPE",
        (peer, { cookie }) =>
          peer.send(chunk({ done: true, type: CHUNK.OFFSET_HOLE, cookie }, [64, 0], [32, 512])),
      ],
      [
        "block status",
        "TM_NBD_REPLY_TYPE",
        (peer, { cookie }) =>
          peer.send(chunk({ done: true, type: CHUNK.BLOCK_STATUS, cookie }, [32, 1], [32, 512], [32, 0])),
      ],
      [
        "success, and then once more",
        "TM_NBD_CHUNK_AFTER_DONE",
        (peer, request) => {
          done(peer, request);
          done(peer, request);
        },
      ],
      ["nothing", "TM_NBD_TIMEOUT", () => undefined],
    ];
  it.each(lies)("%s: %s", async (_title, code, tell) => {
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ flags: WRITABLE });
      const [first] = [await peer.request(), await peer.request()];
      tell(peer, first);
      await peer.untilClosed();
    });
    const client = await connect(server.address, { exportName: "sda", requestTimeoutMs: 400 });
    const asked = [client.write(0, Buffer.alloc(512)), client.flush()];
    const [, flushed] = await Promise.allSettled(asked);
    await server.played();
    const error = await client.closed;
    expect(error).toMatchObject({ code, message: expect.stringContaining('"sda"') as string });
    expect(error instanceof NbdProtocolError).toBe(code !== "TM_NBD_TIMEOUT");
    expect(flushed).toMatchObject({ status: "rejected", reason: error });
    expect(client.pending).toBe(0);
  });
});
