import { describe, expect, it } from "vitest";
import { captured } from "../../test/support/nbd-frames.js";
import {
  decodeChunkHeader,
  decodeExtendedChunkHeader,
  decodeGreeting,
  decodeOptionReplyHeader,
  decodeSimpleReply,
  encodeClientFlags,
  encodeExtendedRequest,
  encodeGoData,
  encodeOption,
  encodeRequest,
} from "./frames.js";
import { decodeMetaContext, dirtyBitmapContext, encodeSetMetaContext } from "./meta-context.js";

/** Cuts a captured stream into pieces of the given sizes. */
function cut(bytes: Buffer, ...sizes: readonly number[]): Buffer[] {
  let at = 0;
  return sizes.map((size) => bytes.subarray(at, (at += size)));
}

describe("decodeGreeting()", () => {
  it("reads the greeting of qemu-nbd", () => {
    const [head] = cut(captured("qemu-read.server"), 18);
    expect(decodeGreeting(head!)).toEqual({
      initMagic: 0x4e42444d41474943n,
      optionMagic: 0x49484156454f5054n,
      handshakeFlags: 3,
    });
  });
});

describe("decodeOptionReplyHeader()", () => {
  it("reads qemu-nbd's replies to structured replies and to a context", () => {
    const [, ack, context, payload] = cut(captured("qemu-dirty-bitmap.server"), 18, 20, 20, 24);
    const magic = 0x3e889045565a9n;
    expect(decodeOptionReplyHeader(ack!)).toEqual({ magic, option: 8, type: 1, length: 0 });
    expect(decodeOptionReplyHeader(context!)).toEqual({ magic, option: 10, type: 4, length: 24 });
    expect(decodeMetaContext(payload!)).toEqual({ id: 2, name: "qemu:dirty-bitmap:b0" });
  });
});

describe("encodeOption(), encodeSetMetaContext(), encodeGoData(), encodeRequest()", () => {
  it("write what libnbd writes in the same session", () => {
    const ours = Buffer.concat([
      encodeClientFlags(3),
      encodeOption(8, Buffer.alloc(0)),
      encodeOption(10, encodeSetMetaContext("sda", ["qemu:dirty-bitmap:b0"])),
      encodeOption(7, encodeGoData("sda", [3])),
      encodeRequest({ flags: 0, type: 7, cookie: 1n, offset: 0, length: 262144 }),
      encodeRequest({ flags: 0, type: 2, cookie: 2n, offset: 0, length: 0 }),
    ]);
    expect(ours.toString("hex")).toBe(captured("qemu-dirty-bitmap.client").toString("hex"));
  });

  it("write what QEMU's client writes for a read", () => {
    const sent = captured("qemu-read.client");
    const first = sent.subarray(sent.length - 3 * 28, sent.length - 2 * 28);
    const cookie = first.readBigUInt64BE(8);
    expect(encodeRequest({ flags: 0, type: 0, cookie, offset: 130560, length: 1024 })).toEqual(first);
  });

  it("keeps offsets beyond 32 bits exact", () => {
    const offset = 2 ** 52 + 512;
    const bytes = encodeRequest({ flags: 4, type: 0, cookie: 9n, offset, length: 0xffff0000 });
    expect(bytes.toString("hex")).toBe(
      "25609513" + "0004" + "0000" + "0000000000000009" + "0010000000000200" + "ffff0000",
    );
  });
});

describe("encodeExtendedRequest() and decodeExtendedChunkHeader()", () => {
  it("have 64-bit lengths, and the offset in both directions", () => {
    const request = { flags: 0x20, type: 1, cookie: 9n, offset: 2 ** 52, length: 2 ** 51 };
    expect(encodeExtendedRequest(request).toString("hex")).toBe(
      "21e41c71" + "0020" + "0001" + "0000000000000009" + "0010000000000000" + "0008000000000000",
    );
    const reply = "6e8a278c" + "0001" + "0006" + "0000000000000009" + "0010000000000000" + "0000000000000018";
    expect(decodeExtendedChunkHeader(Buffer.from(reply, "hex"))).toEqual({
      ...{ flags: 1, type: 6, cookie: 9n, offset: 2n ** 52n, length: 24 },
    });
  });

  it("show a length of 2^64 - 1 bytes as one that nothing accepts", () => {
    const reply = Buffer.alloc(32, 0xff);
    expect(decodeExtendedChunkHeader(reply).length).toBe(Number.MAX_SAFE_INTEGER);
  });
});

describe("decodeChunkHeader() and decodeSimpleReply()", () => {
  it("read the head of qemu-nbd's hole chunk", () => {
    const bytes = captured("qemu-read.server");
    const at = bytes.indexOf("668e33ef", 0, "hex");
    expect(decodeChunkHeader(bytes.subarray(at, at + 20))).toEqual({
      flags: 0,
      type: 2,
      cookie: 0x560ac754c050n,
      length: 12,
    });
  });

  it("read the head of nbdkit's simple reply", () => {
    const bytes = captured("nbdkit-simple.server");
    const at = bytes.indexOf("67446698", 0, "hex");
    expect(decodeSimpleReply(bytes.subarray(at, at + 16))).toEqual({ error: 0, cookie: 0x55c838154ff0n });
  });
});

describe("dirtyBitmapContext()", () => {
  it("names QEMU's context", () => {
    expect(dirtyBitmapContext("b0")).toBe("qemu:dirty-bitmap:b0");
  });

  it("refuses the empty name, which would select all bitmaps, and names too long for QEMU", () => {
    expect(() => dirtyBitmapContext("")).toThrow("0 bytes");
    expect(() => dirtyBitmapContext("é".repeat(512))).toThrow("1024 bytes");
    expect(dirtyBitmapContext("x".repeat(1023))).toHaveLength(18 + 1023);
  });
});
