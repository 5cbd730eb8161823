import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { RefcountBuilder } from "./refcounts.js";

const CLUSTER = 512; // 256 entries a block: 128 KiB of file
const ENTRIES = CLUSTER / 2;

describe("RefcountBuilder", () => {
  it("counts what a plain array counts, itself included, wherever blocks leave", () => {
    const file = fc.array(
      fc.record({
        length: fc.integer({ min: 13, max: 40 * CLUSTER }),
        isTaken: fc.boolean(),
        gap: fc.nat(3 * CLUSTER),
      }),
      { maxLength: 60 },
    );
    fc.assert(
      fc.property(file, (frames) => {
        const refcounts = new RefcountBuilder(CLUSTER);
        const model: number[] = [];
        const blocks = new Map<number, Buffer>();
        const offsets = new Map<number, number>();
        const count = (offset: number, length: number): void => {
          refcounts.count(offset, length);
          for (let c = Math.floor(offset / CLUSTER); c * CLUSTER < offset + length; c += 1) {
            model[c] = (model[c] ?? 0) + 1;
          }
        };
        count(0, CLUSTER);
        let position = CLUSTER;
        for (const { length, isTaken, gap } of frames) {
          count(position, length);
          position += length + gap;
          if (!isTaken) continue;
          position = Math.ceil(position / CLUSTER) * CLUSTER;
          for (const { index, bytes } of [...refcounts.takeComplete(position)]) {
            blocks.set(index, bytes);
            offsets.set(index, position);
            refcounts.place(index, position);
            count(position, CLUSTER);
            position += CLUSTER;
          }
        }
        position = Math.ceil(position / CLUSTER) * CLUSTER;
        const end = refcounts.finish(position);
        for (const { index, bytes } of end.blocks) {
          blocks.set(index, bytes);
          offsets.set(index, position);
          model[position / CLUSTER] = 1;
          position += CLUSTER;
        }
        expect(end.tableOffset).toBe(position);
        for (let i = 0; i < end.tableClusters; i += 1) model[position / CLUSTER + i] = 1;

        expect(end.table.length).toBe(end.tableClusters * CLUSTER);
        for (let index = 0; index * ENTRIES < model.length; index += 1) {
          expect(Number(end.table.readBigUInt64BE(index * 8))).toBe(offsets.get(index));
        }
        for (const [index, bytes] of blocks) {
          for (let slot = 0; slot < ENTRIES; slot += 1) {
            const found = bytes.readUInt16BE(slot * 2);
            if (found !== (model[index * ENTRIES + slot] ?? 0)) {
              expect([index, slot, found]).toEqual([index, slot, model[index * ENTRIES + slot] ?? 0]);
            }
          }
        }
      }),
      { numRuns: 100 },
    );
  });

  it("adds a block when the blocks and the table themselves cross into it", () => {
    for (let clusters = ENTRIES - 6; clusters <= ENTRIES + 2; clusters += 1) {
      const refcounts = new RefcountBuilder(CLUSTER);
      refcounts.count(0, clusters * CLUSTER);
      const end = refcounts.finish(clusters * CLUSTER);
      const last = end.tableOffset / CLUSTER + end.tableClusters - 1;
      expect(end.blocks.length).toBe(Math.floor(last / ENTRIES) + 1);
    }
  });

  it("refuses more references than an entry of 16 bits can hold", () => {
    const refcounts = new RefcountBuilder(CLUSTER);
    for (let i = 0; i < 65535; i += 1) refcounts.count(100, 1);
    expect(() => refcounts.count(100, 1)).toThrow(/more than 65535 references/);
  });
});
