import { describe, expect, it } from "vitest";
import { captured, frame } from "../../test/support/nbd-frames.js";
import {
  clipRuns,
  decodeBlockStatus,
  isStatusLength,
  joinRuns,
  MAX_DESCRIPTORS,
  MAX_STATUS_PAYLOAD,
  type BlockRun,
} from "./block-status.js";
import { faultOf } from "./errors.js";

const fault = faultOf("Cannot read map");

/** The payload of the only chunk of a captured session. */
function statusPayload(name: string): Buffer {
  const bytes = captured(name);
  return bytes.subarray(bytes.indexOf("668e33ef", 0, "hex") + 20);
}

async function* batches(...lists: readonly BlockRun[][]): AsyncGenerator<readonly BlockRun[]> {
  for (const list of lists) {
    await Promise.resolve();
    yield list;
  }
}

describe("decodeBlockStatus()", () => {
  it("reads qemu-nbd's base:allocation as nbdinfo printed it", () => {
    const runs = decodeBlockStatus(statusPayload("qemu-base-allocation.server"), false, 0, 262144, fault);
    expect(runs.map((run) => [run.offset, run.length, run.flags])).toEqual([
      [0, 4096, 0],
      [4096, 61440, 2],
      [65536, 65536, 3],
      [131072, 4096, 0],
      [135168, 61440, 2],
      [196608, 65536, 3],
    ]);
  });

  it("reads qemu-nbd's dirty bitmap as nbdinfo printed it", () => {
    const runs = decodeBlockStatus(statusPayload("qemu-dirty-bitmap.server"), false, 0, 262144, fault);
    expect(runs).toEqual([
      { offset: 0, length: 131072, flags: 0 },
      { offset: 131072, length: 131072, flags: 1 },
    ]);
  });

  it("clips a last extent that reaches past the request", () => {
    const payload = frame([32, 7], [32, 512], [32, 1], [32, 0xffffffff], [32, 0]);
    expect(decodeBlockStatus(payload, false, 1000, 1024, fault)).toEqual([
      { offset: 1000, length: 512, flags: 1 },
      { offset: 1512, length: 512, flags: 0 },
    ]);
  });

  it("refuses an extent without length", () => {
    const payload = frame([32, 7], [32, 512], [32, 1], [32, 0], [32, 0]);
    expect(() => decodeBlockStatus(payload, false, 0, 1024, fault)).toThrow(
      expect.objectContaining({ code: "TM_NBD_EMPTY_EXTENT" }),
    );
  });

  it("reads 64-bit lengths and flags, and clips a last extent of 2^64 - 1 bytes", () => {
    const size = 2 ** 50;
    const last = [[64, 2n ** 64n - 1n] as const, [64, 2 ** 40] as const];
    const payload = frame([32, 7], [32, 2], [64, 2 ** 41], [64, 3], ...last);
    expect(decodeBlockStatus(payload, true, 512, size, fault)).toEqual([
      { offset: 512, length: 2 ** 41, flags: 3 },
      { offset: 512 + 2 ** 41, length: size - 2 ** 41, flags: 2 ** 40 },
    ]);
  });

  it.each([
    [
      "a count that is not that of its extents",
      "TM_NBD_STATUS_LENGTH",
      [
        [32, 2],
        [64, 512],
        [64, 0],
      ],
    ],
    [
      "no count",
      "TM_NBD_STATUS_LENGTH",
      [
        [32, 0],
        [64, 512],
        [64, 0],
      ],
    ],
    [
      "an extent without length",
      "TM_NBD_EMPTY_EXTENT",
      [
        [32, 1],
        [64, 0],
        [64, 0],
      ],
    ],
    [
      "flags that a number cannot hold",
      "TM_NBD_STATUS_FLAGS",
      [
        [32, 1],
        [64, 512],
        [64, 2n ** 63n],
      ],
    ],
  ] as const)("refuses in the extended form %s", (_what, code, fields) => {
    const payload = frame([32, 7], ...fields);
    expect(() => decodeBlockStatus(payload, true, 0, 1024, fault)).toThrow(expect.objectContaining({ code }));
  });

  it("refuses an extent that begins behind the request", () => {
    const payload = frame([32, 7], [32, 1024], [32, 1], [32, 1], [32, 0]);
    expect(() => decodeBlockStatus(payload, false, 0, 1024, fault)).toThrow(
      expect.objectContaining({ code: "TM_NBD_STATUS_LENGTH" }),
    );
  });
});

describe("isStatusLength()", () => {
  it("accepts a context id and one or more whole descriptors, up to the bound", () => {
    const most = 4 + 8 * MAX_DESCRIPTORS;
    const lengths = [0, 4, 8, 11, 12, 13, 20, most, most + 8, 0xfffffffc];
    expect(lengths.filter((length) => isStatusLength(length, false))).toEqual([12, 20, most]);
  });

  it("accepts a longer head and longer descriptors in the extended form", () => {
    const most = MAX_STATUS_PAYLOAD;
    const lengths = [0, 8, 12, 20, 23, 24, 25, 32, 40, most, most + 16, Number.MAX_SAFE_INTEGER];
    expect(lengths.filter((length) => isStatusLength(length, true))).toEqual([24, 40, most]);
  });
});

describe("clipRuns()", () => {
  it("keeps the parts inside the range and drops the rest", () => {
    const runs = [
      { offset: 0, length: 10, flags: 0 },
      { offset: 10, length: 10, flags: 1 },
      { offset: 20, length: 10, flags: 0 },
    ];
    expect(clipRuns(runs, 10, 15)).toEqual([
      { offset: 10, length: 10, flags: 1 },
      { offset: 20, length: 5, flags: 0 },
    ]);
  });
});

describe("joinRuns()", () => {
  it("joins neighbours with equal flags, also across batches, and nothing else", async () => {
    const run = (offset: number, length: number, flags: number): BlockRun => ({ offset, length, flags });
    const joined = joinRuns(
      batches([run(0, 1, 0), run(1, 2, 0)], [run(3, 4, 0), run(7, 1, 1)], [run(9, 1, 1), run(10, 1, 3)]),
    );
    const result: BlockRun[] = [];
    for await (const item of joined) result.push(item);
    expect(result).toEqual([run(0, 7, 0), run(7, 1, 1), run(9, 1, 1), run(10, 1, 3)]);
  });
});
