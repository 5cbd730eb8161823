import { randomBytes } from "node:crypto";
import { describe, expect, it } from "vitest";
import { KiB, MiB } from "../../src/bytes/index.js";
import { DamageError } from "../../src/errors/index.js";
import { ImageChain, ImageReader, UnsupportedImageError } from "../../src/qcow2/index.js";
import { MemoryImage, writeTo, type ImagePlan } from "../support/qcow2.js";

const CLUSTER = 4 * KiB;

/** Reads an image and its parent whole; what was thrown where it cannot be read. */
async function readAll(top: MemoryImage, base: MemoryImage): Promise<unknown> {
  try {
    const images = [
      await ImageReader.open(top, { name: "top" }),
      await ImageReader.open(base, { name: "base" }),
    ];
    const chain = ImageChain.of(images);
    // A flipped bit of the size is no reason to allocate it: a manifest would say so first.
    if (chain.virtualSize > 4 * MiB) return "another size";
    return await chain.read(0, chain.virtualSize);
  } catch (error) {
    return error;
  }
}

describe("a chain with one flipped byte", () => {
  it("never reads wrong bytes where the byte is payload", async () => {
    const steps = (layer: number): ImagePlan["steps"] =>
      Array.from({ length: 60 }, (_, index) => {
        const bytes =
          index % 2 === 0 ? randomBytes(CLUSTER) : Buffer.alloc(CLUSTER, `layer ${layer} of ${index} `);
        return [index * 2 + layer, bytes] as const;
      });
    const [base, top] = [new MemoryImage(CLUSTER), new MemoryImage(CLUSTER)];
    await writeTo(base, { virtualSize: 1 * MiB, clusterSize: CLUSTER, steps: steps(0) });
    const { segments } = await writeTo(top, { virtualSize: 1 * MiB, clusterSize: CLUSTER, steps: steps(1) });
    const good = await readAll(top, base);
    if (!Buffer.isBuffer(good)) throw new Error("the chain cannot be read", { cause: good });
    const [data] = segments;
    let refused = 0;
    for (let i = 0; i < 500; i += 1) {
      const at = data!.offset + Math.floor((i * data!.length) / 500);
      const flip = 1 << (i % 8);
      top.bytes[at]! ^= flip;
      const outcome = await readAll(top, base);
      top.bytes[at]! ^= flip;
      if (Buffer.isBuffer(outcome)) expect(outcome.equals(good), `byte ${at}`).toBe(true);
      else expect(outcome).toBeInstanceOf(DamageError);
      if (outcome instanceof DamageError) {
        expect(outcome.damage.object).toBe("top");
        refused += 1;
      }
    }
    // Some bytes pad the last frame's sector, and a frame's header has bits that mean nothing.
    expect(refused).toBeGreaterThan(480);
  });

  it("ends in an error of its own, or in an answer, wherever the byte is in the header or a table", async () => {
    const [base, top] = [new MemoryImage(CLUSTER), new MemoryImage(CLUSTER)];
    const virtualSize = 64 * CLUSTER + 512;
    await writeTo(base, { virtualSize, clusterSize: CLUSTER, steps: [[0, Buffer.alloc(CLUSTER, 1)]] });
    const { segments } = await writeTo(top, {
      ...{ virtualSize, clusterSize: CLUSTER, backing: "base.qcow2" },
      steps: [
        [1, Buffer.alloc(CLUSTER, 2)],
        [2, "zero"],
        [64, Buffer.alloc(CLUSTER, 3)],
      ],
    });
    // Every byte of the used part of each cluster, and a sample of the rest.
    const outcomes = { answers: 0, damage: 0, unsupported: 0 };
    for (const { offset, length } of segments.filter((segment) => segment.kind !== "data")) {
      for (let at = offset; at < offset + length; at += at % CLUSTER < 512 ? 1 : 16) {
        const flip = [0x01, 0x80, 0xff][at % 3]!;
        top.bytes[at]! ^= flip;
        const outcome = await readAll(top, base);
        top.bytes[at]! ^= flip;
        if (Buffer.isBuffer(outcome) || outcome === "another size") outcomes.answers += 1;
        else if (outcome instanceof UnsupportedImageError) outcomes.unsupported += 1;
        else if (outcome instanceof DamageError) outcomes.damage += 1;
        else throw new Error(`byte ${at} ^ ${flip}`, { cause: outcome });
      }
    }
    expect(outcomes.damage).toBeGreaterThan(200);
    expect(outcomes.unsupported).toBeGreaterThan(5);
  });
});
