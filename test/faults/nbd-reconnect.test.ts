import { describe, expect, it } from "vitest";
import { connect, NbdConnectionError, reconnect } from "../../src/nbd/index.js";
import { FakeNbdServer, type FakeExport } from "../support/fake-nbd-server.js";
import { CHUNK, CMD, contentAt } from "../support/nbd-frames.js";

const FIRST: FakeExport = { size: 2 ** 20, contexts: [{ id: 1, name: "c" }] };

/** A server whose first connection breaks at the first request, and that offers `second` on all further ones. */
async function breaking(second: FakeExport): Promise<FakeNbdServer & { readonly connections: () => number }> {
  let connections = 0;
  const server = await FakeNbdServer.start(async (peer) => {
    connections += 1;
    if (connections === 1) {
      await peer.handshake(FIRST);
      await peer.request();
      peer.close();
      return;
    }
    await peer.handshake(second);
    for (;;) {
      const { type, cookie, offset, length } = await peer.request();
      if (type === CMD.DISC) break;
      const content = contentAt(offset, length);
      peer.send(peer.chunk({ done: true, type: CHUNK.OFFSET_DATA, cookie }, [64, offset], content));
    }
    peer.close();
  });
  return Object.assign(server, { connections: () => connections });
}

describe("reconnect()", { timeout: 5000 }, () => {
  it("makes a new connection with all that was negotiated, and asks nothing of the old one again", async () => {
    await using server = await breaking({ ...FIRST, contexts: [{ id: 9, name: "c" }] });
    const first = await connect(server.address, { exportName: "sda", contexts: ["c"] });
    await expect(first.read(0, Buffer.alloc(512))).rejects.toMatchObject({ code: "TM_NBD_EOF" });
    expect(server.connections()).toBe(1);

    const second = await reconnect(first);
    expect(server.connections()).toBe(2);
    expect(second.export).toEqual(first.export);
    const target = Buffer.alloc(512);
    await second.read(4096, target);
    expect(target.equals(contentAt(4096, 512))).toBe(true);
    // Once more, from the second: the way there and back is the same.
    const third = await reconnect(second);
    await Promise.all([second.close(), third.close()]);
    await server.played();
    await expect(first.read(0, Buffer.alloc(1))).rejects.toMatchObject({ code: "TM_NBD_EOF" });
  });

  it.each<[what: string, second: FakeExport, says: string]>([
    ["size", { ...FIRST, size: 2 ** 21 }, "its size changed from 1048576 to 2097152"],
    ["flags", { ...FIRST, flags: 0x181 }, "its flags changed from"],
    ["block sizes", { ...FIRST, blockSize: [512, 4096, 65536] }, 'changed from "1/4096/33554432" to'],
    ["contexts", { ...FIRST, contexts: [] }, 'its contexts changed from "c" to ""'],
  ])("refuses an export of other %s: TM_NBD_EXPORT_CHANGED", async (_what, second, says) => {
    await using server = await breaking(second);
    const first = await connect(server.address, { exportName: "sda", contexts: ["c"] });
    await expect(first.read(0, Buffer.alloc(512))).rejects.toThrow(NbdConnectionError);
    await expect(reconnect(first)).rejects.toMatchObject({
      code: "TM_NBD_EXPORT_CHANGED",
      message: expect.stringContaining(says) as string,
    });
  });

  it("says when nobody is there any more", async () => {
    const server = await breaking(FIRST);
    const first = await connect(server.address, { contexts: ["c"] });
    await server[Symbol.asyncDispose]();
    await expect(reconnect(first)).rejects.toMatchObject({ code: "TM_NBD_CONNECT" });
  });

  it("rejects with the signal's reason", async () => {
    await using server = await breaking(FIRST);
    const first = await connect(server.address, { contexts: ["c"] });
    const reason = new Error("enough");
    await expect(reconnect(first, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
    first.destroy();
  });
});
