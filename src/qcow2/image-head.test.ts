import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { KiB } from "../bytes/index.js";
import { ImageDamageError, ImageWriteError, UnsupportedImageError } from "./errors.js";
import { decodeExtensions, encodeExtensions } from "./extension.js";
import { decodeHead, encodeHead, type HeadFields } from "./image-head.js";

const FIELDS: HeadFields = {
  header: {
    clusterBits: 12,
    size: 1024 * KiB,
    l1Size: 1,
    l1TableOffset: 4096,
    refcountTableOffset: 8192,
    refcountTableClusters: 1,
    refcountOrder: 4,
    compression: "zstd",
  },
  backingFile: "../20261120T065009123Z-4f2a91/vda.qcow2",
  backingFormat: "qcow2",
  identity: {
    point: "20261121T065009123Z-4f2a91",
    parent: "20261120T065009123Z-4f2a91",
    machine: "web",
    disk: "vda",
    token: "0a1b2c3d",
  },
};

describe("encodeHead()", () => {
  it("fills one cluster that decodeHead() reads back", () => {
    const cluster = encodeHead(FIELDS);
    expect(cluster.length).toBe(4096);
    expect(decodeHead(cluster, "x")).toMatchObject(FIELDS);
    const full = { ...FIELDS, backingFile: undefined, backingFormat: undefined };
    expect(decodeHead(encodeHead(full), "x")).toMatchObject({ ...full, header: { backingFileOffset: 0 } });
  });

  it("refuses an identity that exceeds the cluster", () => {
    const identity = { ...FIELDS.identity!, machine: "m".repeat(4096) };
    expect(() => encodeHead({ ...FIELDS, identity })).toThrow(ImageWriteError);
  });
});

describe("decodeHead()", () => {
  it.each<[string, string]>([
    ["is no JSON", "{"],
    ["is no object", "7"],
    ["is null", "null"],
    ["lacks a field", '{"point":"p","parent":null,"machine":"m","disk":"d"}'],
    ["has a field of another type", '{"point":"p","parent":3,"machine":"m","disk":"d","token":"t"}'],
  ])("refuses an identity that %s", (_, text) => {
    const cluster = encodeHead({ ...FIELDS, backingFile: undefined, backingFormat: undefined });
    const data = encodeExtensions([{ type: 0x74696465, data: Buffer.from(text) }]);
    cluster.fill(0, 112).set(data, 112);
    expect(() => decodeHead(cluster, "x")).toThrow(ImageDamageError);
  });

  it("ends in one of its own errors or in a head, whatever the bytes are", () => {
    const good = encodeHead(FIELDS);
    fc.assert(
      fc.property(fc.array(fc.tuple(fc.nat(500), fc.nat(255)), { minLength: 1, maxLength: 5 }), (changes) => {
        const bytes = Buffer.from(good);
        for (const [at, value] of changes) bytes[at] = value;
        try {
          expect(decodeHead(bytes, "x").header.size).toBeGreaterThanOrEqual(0);
        } catch (error) {
          if (!(error instanceof ImageDamageError) && !(error instanceof UnsupportedImageError)) throw error;
        }
      }),
      { numRuns: 1000 },
    );
  });
});

describe("decodeExtensions()", () => {
  it("reads what encodeExtensions() wrote", () => {
    const extension = fc.record({
      type: fc.integer({ min: 1, max: 0xffffffff }),
      data: fc.uint8Array({ maxLength: 40 }).map((bytes) => Buffer.from(bytes)),
    });
    fc.assert(
      fc.property(fc.array(extension), (extensions) => {
        const area = encodeExtensions(extensions);
        expect(area.length % 8).toBe(0);
        expect(decodeExtensions(Buffer.concat([area, Buffer.alloc(16, 0xff)]))).toEqual(extensions);
      }),
    );
  });

  it("ends without an end marker where the area ends", () => {
    const area = encodeExtensions([{ type: 7, data: Buffer.from("abc") }]);
    expect(decodeExtensions(area.subarray(0, 11))).toEqual([{ type: 7, data: Buffer.from("abc") }]);
  });

  it("refuses an extension that reaches beyond the area", () => {
    const area = encodeExtensions([{ type: 7, data: Buffer.alloc(16) }]);
    expect(() => decodeExtensions(area.subarray(0, 20))).toThrow(RangeError);
  });
});
