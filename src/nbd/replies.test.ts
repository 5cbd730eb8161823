import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { captured, chunk, CHUNK, contentAt } from "../../test/support/nbd-frames.js";
import { faultOf, type NbdRequestError } from "./errors.js";
import { ReadRequest } from "./read-request.js";
import { ReplyParser } from "./replies.js";
import type { Request } from "./request.js";

/** A connection with one read, as the parser sees it. */
function readOf(offset: number, length: number, cookie: bigint, structuredReplies = true) {
  const ended: (NbdRequestError | "ok")[] = [];
  const target = Buffer.alloc(length, 0xee);
  const request: Request = new ReadRequest("sda", offset, target, false, {
    settle: (_request, failure) => ended.push(failure ?? "ok"),
    lost: () => undefined,
  });
  const parser = new ReplyParser({
    structuredReplies,
    extendedHeaders: false,
    fault: faultOf("Connection failed"),
    find: (found) => (found === cookie ? request : "skip"),
    complete: () => request.done(),
  });
  return { parser, target, ended };
}

/** A captured session's transmission phase, and the handle of its first reply. */
function transmission(name: string, magic: string) {
  const bytes = captured(name);
  const start = bytes.indexOf(magic, 0, "hex");
  return { bytes: bytes.subarray(start), cookie: bytes.readBigUInt64BE(start + 8) };
}

describe("ReplyParser", () => {
  it("puts qemu-nbd's hole and data chunks in their places, however the bytes are split", () => {
    const { bytes, cookie } = transmission("qemu-read.server", "668e33ef");
    // Two chunks: heads of 20 bytes, a hole of 12, an offset of 8 and 512 bytes of data.
    const reply = bytes.subarray(0, 20 + 12 + 20 + 8 + 512);
    const expected = Buffer.concat([Buffer.alloc(512), Buffer.alloc(512, 0xb2)]);
    fc.assert(
      fc.property(fc.array(fc.integer({ min: 1, max: 200 }), { maxLength: 40 }), (sizes) => {
        const { parser, target, ended } = readOf(130560, 1024, cookie);
        let at = 0;
        for (const size of [...sizes, reply.length]) {
          parser.push(reply.subarray(at, (at += size)));
        }
        expect(ended).toEqual(["ok"]);
        expect(target.equals(expected)).toBe(true);
        expect(parser.inside).toBeUndefined();
      }),
    );
  });

  it("reads qemu-nbd's refusal with its text", () => {
    const { bytes, cookie } = transmission("qemu-refusal.server", "668e33ef");
    const { parser, ended } = readOf(262144, 512, cookie);
    parser.push(bytes);
    expect(ended).toMatchObject([
      {
        errno: 22,
        errorName: "EINVAL",
        code: "TM_NBD_REQUEST",
        message: expect.stringContaining("past EOF") as string,
      },
    ]);
  });

  it("reads nbdkit's simple reply with content", () => {
    const { bytes, cookie } = transmission("nbdkit-simple.server", "67446698");
    const { parser, target, ended } = readOf(512, 512, cookie, false);
    parser.push(bytes);
    expect(ended).toEqual(["ok"]);
    // nbdkit's pattern: each 8 bytes are their own offset
    for (let at = 0; at < 512; at += 8) expect(target.readBigUInt64BE(at)).toBe(BigInt(512 + at));
  });

  it("drops the chunks of a handle that is to be skipped, with their payload", () => {
    const { parser, target, ended } = readOf(0, 16, 1n);
    parser.push(chunk({ done: true, type: CHUNK.BLOCK_STATUS, cookie: 9 }, Buffer.alloc(5000)));
    parser.push(chunk({ done: true, type: CHUNK.OFFSET_DATA, cookie: 1 }, [64, 0], contentAt(0, 16)));
    expect(ended).toEqual(["ok"]);
    expect(target.equals(contentAt(0, 16))).toBe(true);
  });

  it("tells where the stream stands", () => {
    const { parser } = readOf(0, 16, 1n);
    const bytes = chunk({ done: true, type: CHUNK.OFFSET_DATA, cookie: 1 }, [64, 0], contentAt(0, 16));
    expect(parser.inside).toBeUndefined();
    parser.push(bytes.subarray(0, 3));
    expect(parser.inside).toEqual({ part: "header", have: 3, need: 20 });
    parser.push(bytes.subarray(3, 21));
    expect(parser.inside).toEqual({ part: "payload", have: 1, need: 8 });
    parser.push(bytes.subarray(21, 30));
    expect(parser.inside).toEqual({ part: "payload", have: 2, need: 16 });
  });
});

describe("ReadRequest", () => {
  const codeOf = (code: string) => expect.objectContaining({ code }) as Error;
  const data = (offset: number, length: number, done = false) =>
    chunk({ done, type: CHUNK.OFFSET_DATA, cookie: 1 }, [64, offset], contentAt(offset, length));

  it("accepts chunks in any order", () => {
    fc.assert(
      fc.property(fc.shuffledSubarray([0, 1, 2, 3, 4, 5, 6, 7], { minLength: 8 }), (order) => {
        const { parser, target, ended } = readOf(100, 64, 1n);
        for (const index of order) parser.push(data(100 + index * 8, 8));
        parser.push(chunk({ done: true, type: CHUNK.NONE, cookie: 1 }));
        expect(ended).toEqual(["ok"]);
        expect(target.equals(contentAt(100, 64))).toBe(true);
      }),
    );
  });

  it("refuses a reply that is complete and leaves a gap", () => {
    const { parser } = readOf(0, 64, 1n);
    parser.push(data(0, 8));
    parser.push(data(16, 48));
    expect(() => parser.push(chunk({ done: true, type: CHUNK.NONE, cookie: 1 }))).toThrow(
      codeOf("TM_NBD_SHORT_READ"),
    );
  });

  it.each([
    [0, 8],
    [0, 64],
    [4, 2],
    [56, 8],
    [30, 10],
  ])("refuses content at %i of %i bytes that came before", (offset, length) => {
    const { parser } = readOf(0, 64, 1n);
    parser.push(data(0, 8));
    parser.push(data(32, 32));
    expect(() => parser.push(data(offset, length))).toThrow(codeOf("TM_NBD_REPLY_OVERLAP"));
  });

  it("refuses a reply in more pieces than any server needs", () => {
    const { parser } = readOf(0, 65536, 1n);
    const pushAll = () => {
      for (let at = 0; at < 65536; at += 2) parser.push(data(at, 1));
    };
    expect(pushAll).toThrow(codeOf("TM_NBD_REPLY_FRAGMENTS"));
  });
});
