import { describe, expect, it } from "vitest";
import { frame } from "../../test/support/nbd-frames.js";
import { ByteReader } from "../bytes/index.js";
import { faultOf } from "./errors.js";
import { decodeInfoBlockSize, decodeInfoExport } from "./export-info.js";

const fault = faultOf("Cannot negotiate");
const blockSize = (...sizes: readonly [number, number, number]) =>
  decodeInfoBlockSize(new ByteReader(frame([32, sizes[0]], [32, sizes[1]], [32, sizes[2]])), fault);

describe("decodeInfoExport()", () => {
  const info = (size: bigint, flags: number) =>
    decodeInfoExport(new ByteReader(frame([64, size], [16, flags])), fault);

  it("names qemu-nbd's flags", () => {
    const { size, flags } = info(262144n, 0x058f);
    const set = Object.entries(flags).flatMap(([name, value]) => (value ? [name] : []));
    expect(size).toBe(262144);
    expect(set).toEqual(["readOnly", "sendFlush", "sendFua", "sendDf", "canMultiConn", "sendCache"]);
  });

  it("refuses sizes that numbers cannot hold", () => {
    expect(info(2n ** 53n - 1n, 1).size).toBe(Number.MAX_SAFE_INTEGER);
    const refusal = expect.objectContaining({ code: "TM_NBD_EXPORT_SIZE" }) as Error;
    expect(() => info(2n ** 53n, 1)).toThrow(refusal);
    expect(() => info(2n ** 63n, 1)).toThrow(refusal);
  });

  it("refuses flags without NBD_FLAG_HAS_FLAGS", () => {
    expect(() => info(0n, 2)).toThrow(expect.objectContaining({ code: "TM_NBD_EXPORT_FLAGS" }));
  });
});

describe("decodeInfoBlockSize()", () => {
  it.each([
    [1, 4096, 33554432],
    [4096, 4096, 65536],
    [512, 65536, 0xffffffff],
    [65536, 65536, 65536],
  ] as const)("accepts %i/%i/%i", (minimum, preferred, maximum) => {
    expect(blockSize(minimum, preferred, maximum)).toEqual({ minimum, preferred, maximum });
  });

  it.each([
    [0, 4096, 65536],
    [3, 4096, 65536],
    [131072, 131072, 262144],
    [512, 5000, 65536],
    [512, 256, 65536],
    [512, 0x80000001, 65536],
    [512, 4096, 0],
    [512, 4096, 1000],
    [4096, 4096, 512],
  ] as const)("refuses %i/%i/%i", (minimum, preferred, maximum) => {
    expect(() => blockSize(minimum, preferred, maximum)).toThrow(
      expect.objectContaining({ code: "TM_NBD_BLOCK_SIZE" }),
    );
  });
});
