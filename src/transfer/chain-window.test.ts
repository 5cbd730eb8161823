import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { KiB, MiB } from "../bytes/index.js";
import type { ChainMapping } from "../qcow2/index.js";
import { mostOfRead, planWindows, type Window } from "./chain-window.js";

const CLUSTER = 64 * KiB;

/** One cluster, or zeroes, as a random chain has them. */
type Cell = { readonly image: number; readonly at: number; readonly stored: number } | "zero";

const cell: fc.Arbitrary<Cell> = fc.oneof(
  fc.constant("zero" as const),
  fc.record({
    image: fc.integer({ min: 0, max: 3 }),
    at: fc.integer({ min: 1, max: 200_000 }).map((number) => number * 97),
    stored: fc.integer({ min: 1, max: 2 * CLUSTER }),
  }),
);

/** The cells as one cluster each, from `start` on. */
async function* mappingsOf(cells: readonly Cell[], start = 0): AsyncGenerator<ChainMapping> {
  for (const [index, item] of cells.entries()) {
    const place = { offset: start + index * CLUSTER, length: CLUSTER };
    if (item === "zero") yield { ...place, kind: "zero" };
    else {
      const { image, at, stored: storedLength } = item;
      yield { ...place, kind: "compressed", image, at, storedLength, skip: 0 };
    }
  }
  await Promise.resolve();
}

async function plan(cells: readonly Cell[], capacity: number): Promise<Window[]> {
  const windows: Window[] = [];
  for await (const window of planWindows(mappingsOf(cells), capacity)) windows.push(window);
  return windows;
}

describe("planWindows()", () => {
  it("covers the disk in order, and gives every cluster's frame its own place in memory", async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(cell, { maxLength: 80 }),
        fc.integer({ min: 1, max: 20 }),
        async (cells, most) => {
          const capacity = most * CLUSTER;
          let next = 0;
          for (const { parts, reads } of await plan(cells, capacity)) {
            /** By their place in memory. */
            const frames = new Map(
              reads.flatMap(({ image, content }) =>
                "frames" in content
                  ? content.frames.map((frame) => [frame.into, { image, ...frame }] as const)
                  : [],
              ),
            );
            for (const { offset, length, from } of parts) {
              expect(offset).toBe(next);
              next += length;
              for (let done = 0; done < length; done += CLUSTER) {
                const wanted = cells[(offset + done) / CLUSTER];
                if (from === undefined) {
                  expect(wanted).toBe("zero");
                  continue;
                }
                expect(from + length).toBeLessThanOrEqual(capacity);
                const { image, at, storedLength: stored } = frames.get(from + done) ?? {};
                expect({ image, at, stored }).toEqual(wanted);
                frames.delete(from + done);
              }
            }
            expect(frames.size).toBe(0);
            for (const { at, length, content } of reads) {
              expect(length).toBeLessThanOrEqual(mostOfRead(CLUSTER));
              for (const frame of "frames" in content ? content.frames : []) {
                expect(frame.at).toBeGreaterThanOrEqual(at);
                expect(frame.at + frame.storedLength).toBeLessThanOrEqual(at + length);
              }
            }
            const order = reads.map(({ image, at }) => image * 1e9 + at);
            expect(order).toEqual(order.toSorted((a, b) => a - b));
          }
          expect(next).toBe(cells.length * CLUSTER);
        },
      ),
    );
  });

  it("reads each image once, where an increment's clusters lie scattered over the disk", async () => {
    // Every fourth cluster is the increment's; in both files frames lie in the order of the disk.
    const places = [0, 0];
    const cells = Array.from({ length: 16 }, (_, index): Cell => {
      const image = index % 4 === 0 ? 0 : 1;
      const at = (places[image] ?? 0) + CLUSTER;
      places[image] = at;
      return { image, at, stored: 1000 };
    });
    const [window, ...more] = await plan(cells, MiB);
    expect(more).toHaveLength(0);
    expect(window?.reads.map(({ image, at }) => ({ image, at }))).toEqual([
      { image: 0, at: CLUSTER },
      { image: 1, at: CLUSTER },
    ]);
    expect(window?.parts).toEqual([{ offset: 0, length: MiB, from: 0 }]);
  });

  it("does not read what lies between frames far apart in the file", async () => {
    const far = [1000, 1000 + 65 * KiB, 10 * MiB].map((at): Cell => ({ image: 0, at, stored: 2000 }));
    const [window] = await plan(far, MiB);
    expect(window?.reads.map(({ at, length }) => ({ at, length }))).toEqual([
      { at: 1000, length: 65 * KiB + 2000 },
      { at: 10 * MiB, length: 2000 },
    ]);
  });

  it("counts data, not zeroes: a disk that is a hole of 16 TiB is one window", async () => {
    const hole: ChainMapping = { offset: 0, length: 2 ** 44, kind: "zero" };
    const windows: Window[] = [];
    for await (const window of planWindows(
      (async function* () {
        yield hole;
        await Promise.resolve();
      })(),
      MiB,
    ))
      windows.push(window);
    expect(windows).toEqual([{ parts: [{ offset: 0, length: 2 ** 44, from: undefined }], reads: [] }]);
  });

  it("takes a part of a cluster, and plain bytes in pieces", async () => {
    async function* mappings(): AsyncGenerator<ChainMapping> {
      yield {
        offset: 100,
        length: 200,
        kind: "compressed",
        image: 0,
        at: 5000,
        storedLength: 512,
        skip: 100,
      };
      yield { offset: 300, length: 3 * MiB, kind: "plain", image: 1, at: 7000 };
      await Promise.resolve();
    }
    const windows: Window[] = [];
    for await (const window of planWindows(mappings(), 16 * MiB)) windows.push(window);
    expect(windows).toHaveLength(1);
    expect(windows[0]?.reads).toEqual([
      {
        image: 0,
        at: 5000,
        length: 512,
        content: { frames: [{ at: 5000, storedLength: 512, skip: 100, length: 200, into: 0 }] },
      },
      ...[0, 1, 2].map((number) => ({
        ...{ image: 1, at: 7000 + number * MiB, length: MiB },
        content: { into: 200 + number * MiB },
      })),
    ]);
  });
});
