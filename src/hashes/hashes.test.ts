import { createCipheriv, randomBytes } from "node:crypto";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { KiB } from "../bytes/index.js";
import { MemoryStorage } from "../storage/index.js";
import { CLUSTER_DATA, CLUSTER_UNKNOWN, CLUSTER_ZERO, HashChain } from "./chain.js";
import { ClusterHasher, newHashKey } from "./cluster-hash.js";
import { HashDamageError } from "./errors.js";
import { ExpectedClusters } from "./expected.js";
import { CLUSTERS_PER_BLOCK, HASH_BYTES, HASHES_HEADER_BYTES } from "./layout.js";
import { HashReader, type HashFileFacts } from "./reader.js";
import { HashWriter } from "./writer.js";

const CLUSTER = 4 * KiB;
const KEY = Buffer.alloc(16, 1);
const hasher = new ClusterHasher(KEY);

/** What an image holds of its clusters, by number: content, or "zero". */
type Held = ReadonlyMap<number, Buffer | "zero">;

interface Written {
  readonly bytes: Buffer;
  readonly facts: HashFileFacts;
}

/** Writes hashes through a storage; the windows of `seals` tell when what is below is promised. */
async function write(
  held: Held,
  virtualSize: number,
  options: { key?: Buffer; seal?: boolean } = {},
): Promise<Written> {
  const { key = KEY, seal = false } = options;
  const storage = new MemoryStorage();
  const sink = await storage.create("x", { headLength: HASHES_HEADER_BYTES });
  const writer = HashWriter.create(sink, { virtualSize, clusterSize: CLUSTER, key });
  const own = new ClusterHasher(key);
  for (const [cluster, content] of [...held].sort(([a], [b]) => a - b)) {
    if (seal) await writer.seal(cluster);
    if (content === "zero") writer.zero(cluster, 1);
    else writer.add([cluster], own.hash(content));
  }
  const summary = await writer.finish();
  const zeroClusters = [...held.values()].filter((content) => content === "zero").length;
  return {
    bytes: await storage.get("x", { maxLength: 2 ** 30 }),
    facts: {
      ...{ name: "x", ...summary, virtualSize, clusterSize: CLUSTER },
      ...{ dataClusters: held.size - zeroClusters, zeroClusters },
    },
  };
}

async function open({ bytes, facts }: Written): Promise<HashReader> {
  const read = (offset: number, length: number): Promise<Buffer> =>
    Promise.resolve(Buffer.from(bytes.subarray(offset, offset + length)));
  return await HashReader.open({ length: bytes.length, read }, facts);
}

const filled = (byte: number): Buffer => Buffer.alloc(CLUSTER, byte);

describe("ClusterHasher", () => {
  it("makes the tag that NIST's GCM has for additional data alone", () => {
    // The GCM specification's test case 1: no data at all, a key and a nonce of zeroes.
    const tag = new ClusterHasher(Buffer.alloc(16)).hash(Buffer.alloc(0));
    expect(tag.toString("hex")).toBe("58e2fccefa7e3061367f1d57a4e7455a");
    const cipher = createCipheriv("aes-128-gcm", KEY, Buffer.alloc(12)).setAAD(filled(3));
    cipher.final();
    expect(hasher.hash(filled(3)).equals(cipher.getAuthTag())).toBe(true);
  });

  it("tells contents, and keys, apart", () => {
    const content = randomBytes(CLUSTER);
    const hash = hasher.hash(content);
    expect(hasher.hash(Buffer.from(content)).equals(hash)).toBe(true);
    expect(new ClusterHasher(newHashKey()).hash(content).equals(hash)).toBe(false);
    content.writeUInt8(content.readUInt8(CLUSTER - 1) ^ 1, CLUSTER - 1);
    expect(hasher.hash(content).equals(hash)).toBe(false);
  });
});

describe("HashWriter and HashReader", () => {
  const last = 3 * CLUSTERS_PER_BLOCK + 5;
  const held: Held = new Map<number, Buffer | "zero">([
    [0, filled(1)],
    [1, "zero"],
    [CLUSTERS_PER_BLOCK - 1, filled(2)],
    [CLUSTERS_PER_BLOCK, filled(3)],
    [last, filled(4)],
  ]);
  const virtualSize = (last + 1) * CLUSTER - 512;

  it("take little more than 16 bytes a cluster, and the same whether sealed early or late", async () => {
    const all = new Map(
      Array.from({ length: 2 * CLUSTERS_PER_BLOCK }, (_, cluster) => [cluster, filled(cluster)]),
    );
    const early = await write(all, all.size * CLUSTER, { seal: true });
    const late = await write(all, all.size * CLUSTER);
    expect(early.bytes.equals(late.bytes)).toBe(true);
    expect(early.bytes.length / all.size).toBeLessThan(16.3);
    expect(early.bytes.length).toBe(early.facts.bytes);
  });

  it("refuse a cluster beyond the disk, below the seal, or given twice", async () => {
    const sink = await new MemoryStorage().create("x", { headLength: HASHES_HEADER_BYTES });
    const writer = HashWriter.create(sink, { virtualSize, clusterSize: CLUSTER, key: KEY });
    const hash = Buffer.alloc(HASH_BYTES);
    writer.add([CLUSTERS_PER_BLOCK], hash);
    expect(() => writer.add([CLUSTERS_PER_BLOCK], hash)).toThrow(RangeError);
    expect(() => writer.zero(CLUSTERS_PER_BLOCK, 1)).toThrow(RangeError);
    expect(() => writer.add([last + 1], hash)).toThrow(RangeError);
    expect(() => writer.add([1, 2], hash)).toThrow(RangeError);
    await writer.seal(2 * CLUSTERS_PER_BLOCK);
    expect(() => writer.zero(CLUSTERS_PER_BLOCK + 7, 1)).toThrow(RangeError);
  });

  it("notice every byte that differs, and every other length", async () => {
    const written = await write(held, virtualSize);
    for (let at = 0; at < written.bytes.length; at += 1) {
      const bytes = Buffer.from(written.bytes);
      bytes.writeUInt8(bytes.readUInt8(at) ^ (1 << (at % 8)), at);
      const reader = await open({ ...written, bytes }).catch((error: unknown) => error);
      if (!(reader instanceof HashReader)) {
        expect(reader, `byte ${at}`).toBeInstanceOf(HashDamageError);
        continue;
      }
      const blocks = await Promise.allSettled([0, 1, 2, 3].map((number) => reader.block(number)));
      const refused = blocks.flatMap((block) =>
        block.status === "rejected" ? [block.reason as unknown] : [],
      );
      expect(refused, `byte ${at}`).toEqual([expect.any(HashDamageError)]);
    }
    for (const bytes of [
      written.bytes.subarray(0, -1),
      Buffer.concat([written.bytes, Buffer.alloc(1)]),
      Buffer.alloc(0),
    ])
      await expect(open({ ...written, bytes })).rejects.toThrow(HashDamageError);
  });

  it("notice a file of another image, which vouches for itself", async () => {
    const written = await write(held, virtualSize);
    const other = await write(new Map([[0, filled(9)]]), virtualSize);
    await expect(open({ bytes: other.bytes, facts: written.facts })).rejects.toThrow(HashDamageError);
    for (const changes of [
      { dataClusters: 3 },
      { zeroClusters: 0 },
      { virtualSize: 512 },
      { clusterSize: 512 },
    ])
      await expect(open({ bytes: written.bytes, facts: { ...written.facts, ...changes } })).rejects.toThrow(
        HashDamageError,
      );
  });

  it("keep an empty disk", async () => {
    const reader = await open(await write(new Map(), 0));
    expect(await reader.block(0)).toBeUndefined();
    expect(await HashChain.of([reader])?.window(0, 0)).toMatchObject({ first: 0 });
  });
});

describe("HashChain", () => {
  it("is none of hashes of different keys, nor of nothing", async () => {
    const one = await open(await write(new Map(), CLUSTER));
    const other = await open(await write(new Map(), CLUSTER, { key: Buffer.alloc(16, 2) }));
    expect(HashChain.of([one, other])).toBeUndefined();
    expect(HashChain.of([])).toBeUndefined();
  });

  it("does not know what a damaged block, and those below it, would have said", async () => {
    const last = CLUSTERS_PER_BLOCK;
    const size = (last + 1) * CLUSTER;
    const bottom = await write(
      new Map([
        [1, filled(1)],
        [last, filled(2)],
      ]),
      size,
    );
    const middle = await write(new Map<number, Buffer>([[2, filled(3)]]), size);
    const top = await write(new Map([[0, filled(4)]]), size);
    middle.bytes.writeUInt8(9, HASHES_HEADER_BYTES + 1);
    const damages: HashDamageError[] = [];
    const readers = [await open(top), await open(middle), await open(bottom)];
    const window = await HashChain.of(readers)?.window(0, last + 1, {
      onDamage: (error) => damages.push(error),
    });
    expect(damages.map(({ code }) => code)).toEqual(["TM_HASHES_DAMAGED"]);
    expect(window?.states.subarray(0, 4)).toEqual(
      Uint8Array.of(CLUSTER_DATA, CLUSTER_UNKNOWN, CLUSTER_UNKNOWN, CLUSTER_UNKNOWN),
    );
    expect(window?.states[last]).toBe(CLUSTER_DATA);
  });

  it("agrees with the bytes of random chains of images that grow and shrink", async () => {
    // Clusters around the border of two blocks, and disks that end anywhere there.
    const start = CLUSTERS_PER_BLOCK - 6;
    const layer = fc.record({
      sectors: fc.integer({ min: (start * CLUSTER) / 512, max: ((start + 12) * CLUSTER) / 512 }),
      writes: fc.array(fc.record({ place: fc.nat(11), byte: fc.nat(3) }), { maxLength: 10 }),
    });
    const property = fc.asyncProperty(fc.array(layer, { minLength: 1, maxLength: 5 }), async (layers) => {
      // Always as long as the longest disk: beyond a disk's end it is zero.
      let model: Buffer = Buffer.alloc(12 * CLUSTER);
      const readers: HashReader[] = [];
      for (const { sectors, writes } of layers) {
        const virtualSize = sectors * 512;
        const size = Math.max(0, virtualSize - start * CLUSTER);
        const next = Buffer.from(model).fill(0, size);
        const held = new Map<number, Buffer | "zero">();
        for (const { place, byte } of writes) {
          if (place * CLUSTER >= size) continue;
          next.fill(byte, place * CLUSTER, Math.min((place + 1) * CLUSTER, size));
          const content = next.subarray(place * CLUSTER, (place + 1) * CLUSTER);
          held.set(start + place, byte === 0 ? "zero" : content);
        }
        readers.unshift(await open(await write(held, virtualSize, { seal: true })));
        model = next;
      }
      const window = await HashChain.of(readers)?.window(start, 12);
      for (let cluster = 0; cluster < 12; cluster += 1) {
        const content = model.subarray(cluster * CLUSTER, (cluster + 1) * CLUSTER);
        const state = window?.states[cluster];
        const hash = window?.hashes.subarray(cluster * HASH_BYTES, (cluster + 1) * HASH_BYTES);
        if (state === CLUSTER_ZERO) expect(content.equals(Buffer.alloc(CLUSTER))).toBe(true);
        else if (state === CLUSTER_DATA)
          expect(hasher.hash(content).equals(hash ?? Buffer.alloc(0))).toBe(true);
        // Unknown is only what an end of a disk lies in.
        else
          expect(
            layers.some(({ sectors }) => Math.floor((sectors * 512) / CLUSTER) === start + cluster),
          ).toBe(true);
      }
    });
    await fc.assert(property, { numRuns: 150 });
  });
});

describe("ExpectedClusters", () => {
  it("says of each cluster what the window says, and nothing of others", () => {
    const hashes = randomBytes(3 * HASH_BYTES);
    const states = Uint8Array.of(CLUSTER_ZERO, CLUSTER_DATA, CLUSTER_UNKNOWN);
    const hashOf = (index: number): Buffer => hashes.subarray(index * HASH_BYTES, (index + 1) * HASH_BYTES);
    const packed = ExpectedClusters.pack({ first: 10, states, hashes }, [12, 11, 10, 99]);
    const expected = new ExpectedClusters(packed);
    const clusters = [0, 1, 2, 3];
    expect(clusters.map((position) => expected.isZero(position))).toEqual([false, false, true, false]);
    expect(clusters.map((position) => expected.equals(position, hashOf(1)))).toEqual([
      false,
      true,
      false,
      false,
    ]);
    expect([2, 0].map((index) => expected.equals(0, hashOf(index)))).toEqual([false, false]);
  });
});
