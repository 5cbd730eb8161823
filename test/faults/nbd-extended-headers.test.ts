import { describe, expect, it } from "vitest";
import { connect } from "../../src/nbd/index.js";
import { FakeNbdServer, type Peer, type ReceivedRequest } from "../support/fake-nbd-server.js";
import { CHUNK, CMD, contentAt, OPT, optionReply, REP } from "../support/nbd-frames.js";

// No server of this test machine speaks extended headers (QEMU does from 8.2 on): these follow the specification.

const MiB = 2 ** 20;
const GiB = 2 ** 30;
const TiB = 2 ** 40;
const PAYLOAD_LEN = 0x20;
const NO_HOLE = 2;
/** HAS_FLAGS, SEND_FLUSH, SEND_WRITE_ZEROES, SEND_DF */
const WRITABLE = 0x1 | 0x4 | 0x40 | 0x80;

/** Answers as an honest server until the client disconnects; returns the requests. */
async function serve(peer: Peer, disk: Buffer): Promise<ReceivedRequest[]> {
  const requests: ReceivedRequest[] = [];
  for (;;) {
    const request = await peer.request();
    if (request.type === CMD.DISC) break;
    requests.push(request);
    const { type, cookie, offset, length, payload } = request;
    if (type === CMD.READ) {
      const content = Buffer.from(disk.subarray(offset, offset + length));
      peer.send(peer.chunk({ done: true, type: CHUNK.OFFSET_DATA, cookie }, [64, offset], content));
    } else {
      payload?.copy(disk, offset);
      peer.send(peer.chunk({ done: true, type: CHUNK.NONE, cookie }));
    }
  }
  peer.close();
  return requests;
}

describe("connect() to a server with extended headers", { timeout: 10_000 }, () => {
  it("asks for them first, and not for structured replies besides", async () => {
    const options: number[] = [];
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.greet();
      for (let option = 0; option !== OPT.GO;) {
        ({ option } = await peer.option());
        options.push(option);
        if (option === OPT.GO) peer.send(optionReply(option, REP.INFO, [16, 0], [64, 77], [16, 3]));
        peer.send(optionReply(option, REP.ACK));
      }
      peer.extended = true;
      expect((await peer.request()).type).toBe(CMD.DISC);
      peer.close();
    });
    const client = await connect(server.address, { contexts: ["c"] });
    expect(client.export).toMatchObject({ extendedHeaders: true, structuredReplies: true });
    await client.close();
    await server.played();
    expect(options).toEqual([OPT.EXTENDED_HEADERS, OPT.SET_META_CONTEXT, OPT.GO]);
  });

  it.each([
    ["without them uses structured replies", true],
    ["without either uses simple replies", false],
  ])("%s", async (_title, structured) => {
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ structured });
      expect((await peer.request()).type).toBe(CMD.DISC);
      peer.close();
    });
    const client = await connect(server.address);
    expect(client.export).toMatchObject({ extendedHeaders: false, structuredReplies: structured });
    await client.close();
    await server.played();
  });

  it("reads, writes with the flag that belongs to it, and flushes", async () => {
    const disk = Buffer.alloc(4 * MiB);
    let requests: ReceivedRequest[] = [];
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ extended: true, flags: WRITABLE, size: disk.length });
      requests = await serve(peer, disk);
    });
    const client = await connect(server.address);
    const bytes = contentAt(12_345, 2 * MiB);
    await client.write(12_345, bytes);
    const back = Buffer.alloc(bytes.length);
    await client.read(12_345, back);
    await client.flush();
    await client.close();
    await server.played();
    expect(back.equals(bytes)).toBe(true);
    expect(disk.subarray(12_345, 12_345 + bytes.length).equals(bytes)).toBe(true);
    const kinds = new Set(requests.map(({ type, flags }) => `${type}/${flags}`));
    expect(kinds).toEqual(new Set([`${CMD.WRITE}/${PAYLOAD_LEN}`, `${CMD.READ}/4`, `${CMD.FLUSH}/0`]));
  });

  it("zeroes in requests of 1 GiB, whatever the longest payload is, and of 32 MiB without holes", async () => {
    let requests: ReceivedRequest[] = [];
    await using server = await FakeNbdServer.start(async (peer) => {
      const blockSize = [512, 4096, MiB] as const;
      await peer.handshake({ extended: true, flags: WRITABLE, size: 64 * GiB, blockSize: [...blockSize] });
      requests = await serve(peer, Buffer.alloc(0));
    });
    const client = await connect(server.address);
    await client.writeZeroes(0, 5 * GiB + 512);
    await client.writeZeroes(0, 2 * MiB, { noHole: true });
    await client.close();
    await server.played();
    expect(requests.slice(0, 6).map(({ length }) => length)).toEqual([...Array<number>(5).fill(GiB), 512]);
    expect(requests.slice(6).map(({ flags, length }) => [flags, length])).toEqual([
      [NO_HOLE, MiB],
      [NO_HOLE, MiB],
    ]);
  });

  it("maps 16 TiB by one request", async () => {
    let requests = 0;
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({ extended: true, size: 16 * TiB, contexts: [{ id: 3, name: "c" }] });
      const { cookie, offset, length } = await peer.request();
      requests += 1;
      expect([offset, length]).toEqual([0, 16 * TiB]);
      peer.send(peer.status({ done: true, cookie }, 3, [5 * TiB, 3], [512, 0], [11 * TiB, 2]));
      expect((await peer.request()).type).toBe(CMD.DISC);
      peer.close();
    });
    const client = await connect(server.address, { contexts: ["c"] });
    const runs = [];
    for await (const run of client.map("c")) runs.push(run);
    await client.close();
    await server.played();
    expect(requests).toBe(1);
    expect(runs).toEqual([
      { offset: 0, length: 5 * TiB, flags: 3 },
      { offset: 5 * TiB, length: 512, flags: 0 },
      { offset: 5 * TiB + 512, length: 11 * TiB - 512, flags: 2 },
    ]);
  });

  it("ends with its own error when the server refuses them for another reason than not to know them", async () => {
    await using server = await FakeNbdServer.start(async (peer) => {
      await peer.handshake({}, OPT.EXTENDED_HEADERS);
      peer.send(optionReply(OPT.EXTENDED_HEADERS, REP.ERR_POLICY, "not today"));
      await peer.untilClosed();
    });
    await expect(connect(server.address)).rejects.toMatchObject({
      code: "TM_NBD_REFUSED",
      message: expect.stringContaining("refuses extended headers: NBD_REP_ERR_POLICY (not today)") as string,
    });
    await server.played();
  });
});
