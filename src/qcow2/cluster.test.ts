import { randomBytes } from "node:crypto";
import { deflateRawSync } from "node:zlib";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { KiB, MiB } from "../bytes/index.js";
import { ClusterDecoder, frameBound, FrameEncoder, isChecksummedFrame } from "./cluster.js";
import { ClusterDamageError } from "./errors.js";
import type { Compression } from "./layout.js";

const ORIGIN = { object: "web/p/vda.qcow2", at: 65536 };

function frameOf(cluster: Uint8Array, level = 3): Buffer {
  const into = Buffer.alloc(frameBound(cluster.length));
  return into.subarray(0, new FrameEncoder(level).encode(cluster, into, 0));
}

function decode(
  stored: Uint8Array,
  clusterSize: number,
  compression: Compression,
  requireChecksum = false,
): Buffer {
  const into = Buffer.alloc(clusterSize);
  new ClusterDecoder({ clusterSize, compression, requireChecksum }).decode(stored, into, ORIGIN);
  return into;
}

describe("FrameEncoder.encode()", () => {
  it("makes frames that the decoder reads, with anything behind them", () => {
    const content = fc.oneof(
      fc.uint8Array({ minLength: 4096, maxLength: 4096 }),
      fc.nat(255).map((fill) => new Uint8Array(4096).fill(fill)),
    );
    fc.assert(
      fc.property(
        content,
        fc.uint8Array({ maxLength: 600 }),
        fc.constantFrom(1, 3, 9),
        (cluster, behind, level) => {
          const frame = frameOf(cluster, level);
          expect(isChecksummedFrame(frame)).toBe(true);
          const stored = Buffer.concat([frame, behind]);
          expect(decode(stored, 4096, "zstd", true).equals(cluster)).toBe(true);
        },
      ),
      { numRuns: 50 },
    );
  });

  it.each([4 * KiB, 64 * KiB, 256 * KiB, 2 * MiB])(
    "fits clusters of %i random bytes in frameBound()",
    (size) => {
      const cluster = randomBytes(size);
      const frame = frameOf(cluster);
      expect(frame.length).toBeLessThanOrEqual(size + 64);
      expect(decode(frame, size, "zstd", true).equals(cluster)).toBe(true);
    },
  );

  it("writes at the place given and nowhere before", () => {
    const cluster = Buffer.alloc(4096, 7);
    const into = Buffer.alloc(100 + frameBound(4096), 0xee);
    const length = new FrameEncoder(1).encode(cluster, into, 100);
    expect(into.subarray(0, 100).equals(Buffer.alloc(100, 0xee))).toBe(true);
    expect(decode(into.subarray(100, 100 + length), 4096, "zstd").equals(cluster)).toBe(true);
  });
});

describe("ClusterDecoder.decode()", () => {
  it.each([
    ["text", Buffer.alloc(4096, "tidemark ")],
    ["noise", randomBytes(4096)],
  ])(
    "never yields other bytes when one bit of a frame of %s is flipped",
    (_, cluster) => {
      const frame = frameOf(cluster);
      const decoder = new ClusterDecoder({ clusterSize: 4096, compression: "zstd", requireChecksum: true });
      const into = Buffer.alloc(4096);
      let refused = 0;
      for (let bit = 0; bit < frame.length * 8; bit += 1) {
        const damaged = Buffer.from(frame);
        damaged[bit >> 3]! ^= 1 << (bit & 7);
        try {
          decoder.decode(damaged, into, ORIGIN);
          expect(into.equals(cluster)).toBe(true);
        } catch (error) {
          if (!(error instanceof ClusterDamageError)) throw error;
          refused += 1;
        }
      }
      expect(refused).toBeGreaterThan(frame.length * 8 - 8);
    },
    20_000,
  );

  it("names the image and the byte", () => {
    expect(() => decode(Buffer.alloc(100), 4096, "zstd")).toThrow(/byte 65536 of image "web\/p\/vda.qcow2"/);
  });

  it("refuses a frame that is cut, too short or too long for a cluster", () => {
    const frame = frameOf(Buffer.alloc(4096, "abc"));
    expect(() => decode(frame.subarray(0, -1), 4096, "zstd")).toThrow(ClusterDamageError);
    expect(() => decode(Buffer.alloc(0), 4096, "zstd")).toThrow(ClusterDamageError);
    expect(() => decode(frame, 8192, "zstd")).toThrow(ClusterDamageError);
    expect(() => decode(frame, 2048, "zstd")).toThrow(ClusterDamageError);
  });

  it("reads a cluster of several frames, as QEMU does", () => {
    const [a, b] = [Buffer.alloc(2048, 1), Buffer.alloc(2048, 2)];
    const stored = Buffer.concat([frameOf(a), frameOf(b), Buffer.alloc(7, 0xff)]);
    expect(decode(stored, 4096, "zstd").equals(Buffer.concat([a, b]))).toBe(true);
  });

  it("refuses a frame without a checksum only where one is required", () => {
    const cluster = Buffer.alloc(4096, 9);
    const frame = Buffer.from(frameOf(cluster));
    frame[4]! &= ~0b100; // without the flag, the checksum is what follows the frame
    expect(decode(frame, 4096, "zstd").equals(cluster)).toBe(true);
    expect(() => decode(frame, 4096, "zstd", true)).toThrow(/no zstd frame with a content checksum/);
  });

  it("reads raw deflate with a window of 12 bits, with anything behind it", () => {
    const cluster = Buffer.alloc(65536, "some text that repeats ");
    const stored = Buffer.concat([deflateRawSync(cluster, { windowBits: 12 }), Buffer.alloc(500, 0xaa)]);
    expect(decode(stored, 65536, "zlib").equals(cluster)).toBe(true);
    expect(() => decode(stored.subarray(0, 20), 65536, "zlib")).toThrow(ClusterDamageError);
    expect(() => decode(stored, 4096, "zlib")).toThrow(ClusterDamageError);
  });
});
