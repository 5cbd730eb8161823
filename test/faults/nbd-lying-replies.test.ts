import { describe, expect, it } from "vitest";
import { connect, NbdConnectionError, NbdProtocolError } from "../../src/nbd/index.js";
import { FakeNbdServer, type Peer, type ReceivedRequest } from "../support/fake-nbd-server.js";
import { chunk, CHUNK, contentAt, extendedChunk, simpleReply } from "../support/nbd-frames.js";

const CONTEXT = "base:allocation";
const LENGTH = 65536;

/** What the server does once it has the requests: a read of 64 KiB at 4096, and a block status of the same. */
interface Lie {
  readonly title: string;
  readonly code: string;
  /** `first` is the read or the block status, as the lie is about one or the other. */
  readonly about?: "read" | "status";
  /** With which size of heads it can be told; default: both. */
  readonly headers?: "compact" | "extended";
  readonly tell: (peer: Peer, first: ReceivedRequest) => void;
}

const data = (peer: Peer, cookie: bigint, offset: number, length: number, done = true) =>
  peer.chunk({ done, type: CHUNK.OFFSET_DATA, cookie }, [64, offset], contentAt(offset, length));

const LIES: readonly Lie[] = [
  {
    title: "a reply with bad magic",
    code: "TM_NBD_REPLY_MAGIC",
    tell: (peer, { cookie }) => {
      const reply = peer.chunk({ done: true, type: CHUNK.NONE, cookie });
      reply.writeUInt8(reply.readUInt8(3) ^ 1, 3);
      peer.send(reply);
    },
  },
  {
    title: "a reply to a handle that was never used",
    code: "TM_NBD_UNKNOWN_HANDLE",
    tell: (peer) => peer.send(peer.chunk({ done: true, type: CHUNK.NONE, cookie: 0xdeadbeefdeadbeefn })),
  },
  {
    title: "a reply to handle 0",
    code: "TM_NBD_UNKNOWN_HANDLE",
    tell: (peer) => peer.send(peer.chunk({ done: true, type: CHUNK.NONE, cookie: 0 })),
  },
  {
    title: "content that is longer than the request",
    code: "TM_NBD_REPLY_LENGTH",
    tell: (peer, { cookie, offset }) => peer.send(data(peer, cookie, offset, LENGTH + 1)),
  },
  {
    title: "content of 4 GiB",
    code: "TM_NBD_REPLY_LENGTH",
    tell: (peer, { cookie }) =>
      peer.send(peer.chunk({ done: true, type: CHUNK.OFFSET_DATA, cookie, length: 0xffffffff })),
  },
  {
    title: "content without bytes",
    code: "TM_NBD_REPLY_LENGTH",
    tell: (peer, { cookie, offset }) =>
      peer.send(peer.chunk({ done: true, type: CHUNK.OFFSET_DATA, cookie }, [64, offset])),
  },
  {
    title: "a chunk after the last one",
    code: "TM_NBD_CHUNK_AFTER_DONE",
    tell: (peer, { cookie, offset }) => {
      peer.send(data(peer, cookie, offset, LENGTH));
      peer.send(data(peer, cookie, offset, LENGTH));
    },
  },
  {
    title: "content before the request",
    code: "TM_NBD_REPLY_OFFSET",
    tell: (peer, { cookie, offset }) => peer.send(data(peer, cookie, offset - 1, 512)),
  },
  {
    title: "content behind the request",
    code: "TM_NBD_REPLY_OFFSET",
    tell: (peer, { cookie, offset }) => peer.send(data(peer, cookie, offset + LENGTH - 511, 512)),
  },
  {
    title: "content at an offset beyond 2^53",
    code: "TM_NBD_REPLY_OFFSET",
    tell: (peer, { cookie }) =>
      peer.send(peer.chunk({ done: true, type: CHUNK.OFFSET_DATA, cookie }, [64, 2n ** 64n - 1n], "x")),
  },
  {
    title: "a hole outside the request",
    code: "TM_NBD_REPLY_OFFSET",
    tell: (peer, { cookie, offset }) =>
      peer.send(peer.chunk({ done: true, type: CHUNK.OFFSET_HOLE, cookie }, [64, offset], [32, 0xffffffff])),
  },
  {
    title: "a hole without length",
    code: "TM_NBD_EMPTY_EXTENT",
    tell: (peer, { cookie, offset }) =>
      peer.send(peer.chunk({ done: true, type: CHUNK.OFFSET_HOLE, cookie }, [64, offset], [32, 0])),
  },
  {
    title: "a hole chunk of another size",
    code: "TM_NBD_REPLY_LENGTH",
    tell: (peer, { cookie, offset }) =>
      peer.send(peer.chunk({ done: true, type: CHUNK.OFFSET_HOLE, cookie }, [64, offset], [64, 512])),
  },
  {
    title: "the same content twice",
    code: "TM_NBD_REPLY_OVERLAP",
    tell: (peer, { cookie, offset }) => {
      peer.send(data(peer, cookie, offset, 512, false), data(peer, cookie, offset, 512, false));
    },
  },
  {
    title: "a read called complete that is not",
    code: "TM_NBD_SHORT_READ",
    tell: (peer, { cookie, offset }) => peer.send(data(peer, cookie, offset, LENGTH - 1)),
  },
  {
    title: "a simple reply where a structured one was negotiated",
    code: "TM_NBD_REPLY_TYPE",
    headers: "compact",
    tell: (peer, { cookie }) => peer.send(simpleReply(cookie, 0, contentAt(0, LENGTH))),
  },
  {
    title: "a chunk of an unknown type",
    code: "TM_NBD_REPLY_TYPE",
    tell: (peer, { cookie }) => peer.send(peer.chunk({ done: true, type: 77, cookie })),
  },
  {
    title: "block status in answer to a read",
    code: "TM_NBD_REPLY_TYPE",
    tell: (peer, { cookie }) => peer.send(peer.status({ done: true, cookie }, 5, [512, 0])),
  },
  {
    title: "an empty chunk that is not the last one",
    code: "TM_NBD_REPLY_TYPE",
    tell: (peer, { cookie }) => peer.send(peer.chunk({ done: false, type: CHUNK.NONE, cookie })),
  },
  {
    title: "an empty chunk with payload",
    code: "TM_NBD_REPLY_LENGTH",
    tell: (peer, { cookie }) => peer.send(peer.chunk({ done: true, type: CHUNK.NONE, cookie }, "x")),
  },
  {
    title: "an error chunk with a message longer than itself",
    code: "TM_NBD_ERROR_MESSAGE",
    tell: (peer, { cookie }) =>
      peer.send(peer.chunk({ done: true, type: CHUNK.ERROR, cookie }, [32, 5], [16, 100], "short")),
  },
  {
    title: "an error chunk of 1 GiB",
    code: "TM_NBD_ERROR_MESSAGE",
    tell: (peer, { cookie }) =>
      peer.send(peer.chunk({ done: true, type: CHUNK.ERROR, cookie, length: 1 << 30 })),
  },
  {
    title: "an error chunk that is too short",
    code: "TM_NBD_ERROR_MESSAGE",
    tell: (peer, { cookie }) => peer.send(peer.chunk({ done: true, type: CHUNK.ERROR, cookie }, [32, 5])),
  },
  {
    title: "an error chunk with error 0",
    code: "TM_NBD_ERROR_VALUE",
    tell: (peer, { cookie }) =>
      peer.send(peer.chunk({ done: true, type: CHUNK.ERROR, cookie }, [32, 0], [16, 0])),
  },
  {
    title: "an error at an offset outside the request",
    code: "TM_NBD_REPLY_OFFSET",
    tell: (peer, { cookie, offset }) =>
      peer.send(
        peer.chunk({ done: true, type: CHUNK.ERROR_OFFSET, cookie }, [32, 5], [16, 0], [64, offset + LENGTH]),
      ),
  },
  {
    title: "an extent without length",
    code: "TM_NBD_EMPTY_EXTENT",
    about: "status",
    tell: (peer, { cookie }) => peer.send(peer.status({ done: true, cookie }, 5, [0, 0])),
  },
  {
    title: "an extent that begins behind the request",
    code: "TM_NBD_STATUS_LENGTH",
    about: "status",
    tell: (peer, { cookie }) => peer.send(peer.status({ done: true, cookie }, 5, [LENGTH, 0], [1, 0])),
  },
  {
    title: "a block status chunk of 4 GiB",
    code: "TM_NBD_STATUS_LENGTH",
    about: "status",
    tell: (peer, { cookie }) =>
      peer.send(peer.chunk({ done: true, type: peer.statusType, cookie, length: 0xfffffffc })),
  },
  {
    title: "a block status chunk with half a descriptor",
    code: "TM_NBD_STATUS_LENGTH",
    about: "status",
    tell: (peer, { cookie }) =>
      peer.send(peer.chunk({ done: true, type: peer.statusType, cookie }, [32, 5], [32, 512])),
  },
  {
    title: "block status of a context id that was never given",
    code: "TM_NBD_UNKNOWN_CONTEXT",
    about: "status",
    tell: (peer, { cookie }) => peer.send(peer.status({ done: true, cookie }, 6, [512, 0])),
  },
  {
    title: "block status of the same context twice",
    code: "TM_NBD_REPEATED_CONTEXT",
    about: "status",
    tell: (peer, { cookie }) => {
      peer.send(peer.status({ done: false, cookie }, 5, [512, 0]));
      peer.send(peer.status({ done: true, cookie }, 5, [512, 0]));
    },
  },
  {
    title: "block status called complete without any",
    code: "TM_NBD_STATUS_MISSING",
    about: "status",
    tell: (peer, { cookie }) => peer.send(peer.chunk({ done: true, type: CHUNK.NONE, cookie })),
  },
  {
    title: "content in answer to block status",
    code: "TM_NBD_REPLY_TYPE",
    about: "status",
    tell: (peer, { cookie, offset }) => peer.send(data(peer, cookie, offset, 512)),
  },
  {
    title: "a simple success in answer to block status",
    code: "TM_NBD_REPLY_TYPE",
    headers: "compact",
    about: "status",
    tell: (peer, { cookie }) => peer.send(simpleReply(cookie, 0)),
  },
  {
    title: "a head of the other size",
    code: "TM_NBD_REPLY_MAGIC",
    tell: (peer, { cookie, offset }) => {
      const head = { done: true, type: CHUNK.NONE, cookie };
      peer.send(peer.extended ? chunk(head) : extendedChunk({ ...head, offset }));
    },
  },
  {
    title: "block status of the other form",
    code: "TM_NBD_REPLY_TYPE",
    about: "status",
    tell: (peer, { cookie }) => {
      const type = peer.extended ? CHUNK.BLOCK_STATUS : CHUNK.BLOCK_STATUS_EXT;
      peer.send(peer.chunk({ done: true, type, cookie }, [32, 5], [32, 512], [32, 0]));
    },
  },
  {
    title: "a simple reply",
    code: "TM_NBD_REPLY_MAGIC",
    headers: "extended",
    tell: (peer, { cookie }) => peer.send(simpleReply(cookie, 5)),
  },
  {
    title: "another offset than the request's",
    code: "TM_NBD_REPLY_OFFSET",
    headers: "extended",
    tell: (peer, { cookie, offset }) =>
      peer.send(extendedChunk({ done: true, type: CHUNK.NONE, cookie, offset: offset + 512 })),
  },
  {
    title: "content of 2^64 - 1 bytes",
    code: "TM_NBD_REPLY_LENGTH",
    headers: "extended",
    tell: (peer, { cookie }) =>
      peer.send(peer.chunk({ done: true, type: CHUNK.OFFSET_DATA, cookie, length: 2n ** 64n - 1n })),
  },
  {
    title: "an error chunk of 2^63 bytes",
    code: "TM_NBD_ERROR_MESSAGE",
    headers: "extended",
    tell: (peer, { cookie }) =>
      peer.send(peer.chunk({ done: true, type: CHUNK.ERROR, cookie, length: 2n ** 63n })),
  },
  {
    title: "a block status chunk of 2^53 + 8 bytes",
    code: "TM_NBD_STATUS_LENGTH",
    about: "status",
    headers: "extended",
    tell: (peer, { cookie }) =>
      peer.send(peer.chunk({ done: true, type: peer.statusType, cookie, length: 2n ** 53n + 8n })),
  },
  {
    title: "another number of extents than it announces",
    code: "TM_NBD_STATUS_LENGTH",
    about: "status",
    headers: "extended",
    tell: (peer, { cookie }) =>
      peer.send(
        peer.chunk({ done: true, type: peer.statusType, cookie }, [32, 5], [32, 2], [64, 512], [64, 0]),
      ),
  },
  {
    title: "flags beyond 2^53",
    code: "TM_NBD_STATUS_FLAGS",
    about: "status",
    headers: "extended",
    tell: (peer, { cookie }) => {
      const extent = [[64, 512] as const, [64, 2n ** 63n] as const];
      peer.send(peer.chunk({ done: true, type: peer.statusType, cookie }, [32, 5], [32, 1], ...extent));
    },
  },
];

/** Ends of the connection, which are nobody's lie. */
const ENDS: readonly Lie[] = [
  {
    title: "the end of the connection between replies",
    code: "TM_NBD_EOF",
    tell: (peer) => peer.close(),
  },
  {
    title: "the end of the connection in a header",
    code: "TM_NBD_EOF_HEADER",
    tell: (peer, { cookie }) => {
      peer.send(peer.chunk({ done: true, type: CHUNK.OFFSET_DATA, cookie }).subarray(0, 12));
      peer.close();
    },
  },
  {
    title: "the end of the connection in the first bytes of a header",
    code: "TM_NBD_EOF_HEADER",
    tell: (peer, { cookie }) => {
      peer.send(peer.chunk({ done: true, type: CHUNK.NONE, cookie }).subarray(0, 2));
      peer.close();
    },
  },
  {
    title: "the end of the connection in content",
    code: "TM_NBD_EOF_PAYLOAD",
    tell: (peer, { cookie, offset }) => {
      peer.send(data(peer, cookie, offset, LENGTH).subarray(0, 5000));
      peer.close();
    },
  },
  {
    title: "the end of the connection in a block status payload",
    code: "TM_NBD_EOF_PAYLOAD",
    about: "status",
    tell: (peer, { cookie }) => {
      peer.send(peer.status({ done: true, cookie }, 5, [512, 0], [512, 1]).subarray(0, -8));
      peer.close();
    },
  },
  {
    title: "no reply at all",
    code: "TM_NBD_TIMEOUT",
    tell: () => undefined,
  },
  {
    title: "half a reply and then nothing",
    code: "TM_NBD_TIMEOUT",
    tell: (peer, { cookie, offset }) => peer.send(data(peer, cookie, offset, LENGTH).subarray(0, 5000)),
  },
];

/** Runs one case; every promise of the client must end, with the same error. */
async function play({
  about = "read",
  tell,
  extended,
}: Lie & { extended: boolean }): Promise<{ error: unknown; pending: number }> {
  await using server = await FakeNbdServer.start(async (peer) => {
    await peer.handshake({ extended, contexts: [{ id: 5, name: CONTEXT }] });
    const requests = [await peer.request(), await peer.request()];
    const type = about === "read" ? 0 : 7;
    tell(
      peer,
      requests.find((request) => request.type === type)!,
    );
    await peer.untilClosed();
  });
  const client = await connect(server.address, {
    exportName: "sda",
    contexts: [CONTEXT],
    requestTimeoutMs: 400,
  });
  const asked = await Promise.allSettled(
    about === "read"
      ? [client.read(4096, Buffer.alloc(LENGTH)), client.blockStatus(CONTEXT, 4096, LENGTH)]
      : [client.blockStatus(CONTEXT, 4096, LENGTH), client.read(4096, Buffer.alloc(LENGTH))],
  );
  // The client must close too: the script waits for it.
  await server.played();
  const error = await client.closed;
  const rejections = asked.filter((result) => result.status === "rejected");
  expect(rejections.length).toBeGreaterThan(0);
  for (const { reason } of rejections) expect(reason).toBe(error);
  await expect(client.read(0, Buffer.alloc(1))).rejects.toBe(error);
  return { error, pending: client.pending };
}

/** Every case with both sizes of heads, but for those that only one of them knows. */
const withBothHeaders = (cases: readonly Lie[]): readonly (Lie & { extended: boolean; heads: string })[] =>
  (["compact", "extended"] as const).flatMap((headers) =>
    cases
      .filter((lie) => lie.headers === undefined || lie.headers === headers)
      .map((lie) => ({ ...lie, extended: headers === "extended", heads: `${headers} headers` })),
  );

describe("NbdClient ends the connection and all that waits on it, with one error, when the server sends", () => {
  it.each(withBothHeaders(LIES))("$title, $heads: $code", { timeout: 5000 }, async (lie) => {
    const { error, pending } = await play(lie);
    expect(error).toBeInstanceOf(NbdProtocolError);
    expect(error).toMatchObject({ code: lie.code, message: expect.stringContaining('"sda"') as string });
    expect(pending).toBe(0);
  });

  it.each(withBothHeaders(ENDS))("$title, $heads: $code", { timeout: 5000 }, async (end) => {
    const { error, pending } = await play(end);
    expect(error).toBeInstanceOf(NbdConnectionError);
    expect(error).toMatchObject({ code: end.code, message: expect.stringContaining('"sda"') as string });
    expect(pending).toBe(0);
  });
});
