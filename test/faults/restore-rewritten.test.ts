import { randomBytes } from "node:crypto";
import { readFile } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { KiB } from "../../src/bytes/index.js";
import { initRepository, type PointManifest } from "../../src/repository/index.js";
import { restore } from "../../src/restore/index.js";
import { prunePoints } from "../../src/rewrite/index.js";
import { LocalStorage } from "../../src/storage/index.js";
import { pointId, writePoint } from "../interop/repository-points.js";
import { temporaryDirectory } from "../support/temporary.js";

const CLUSTER = 64 * KiB;
const SIZE = 1024 * CLUSTER;
const machine = "web";

describe("restore()", () => {
  it("goes on with the images that took the place of those it began with, file by file opened anew", async () => {
    await using directory = await temporaryDirectory();
    const storage = await LocalStorage.open(directory.file("repository"), { create: true, openFiles: 1 });
    const repository = await initRepository(storage);
    const content = Buffer.alloc(SIZE);
    let point: PointManifest | undefined;
    for (let number = 1; number <= 4; number += 1) {
      const data = new Map<number, Buffer>();
      for (let cluster = number; cluster < 1000; cluster += 4 + number)
        data.set(cluster, randomBytes(CLUSTER));
      for (const [cluster, bytes] of data) bytes.copy(content, cluster * CLUSTER);
      const disk = { name: "sda", token: "00c0ffee", virtualSize: SIZE, data, parent: point };
      point = await writePoint(repository, { machine, id: pointId(number), disks: [disk] });
    }
    const policy = { last: 1 };
    let pruning: Promise<unknown> | undefined;
    let stops = 0;
    const to = { kind: "file", path: directory.file("sda.raw") } as const;
    await restore({
      ...{ repository, machine, point: pointId(4), disks: [{ name: "sda", to }], workers: 1 },
      // Slow enough for the other to come before it.
      bandwidth: 64 * 1024 * KiB,
      observer: {
        progress: () => {
          stops += 1;
          pruning ??= prunePoints({ repository, machine, policy, now: new Date(), timeZone: "UTC" });
        },
      },
    });
    expect(stops).toBeGreaterThan(3);
    await pruning;
    expect((await repository.points(machine)).map(({ id }) => id)).toEqual([pointId(4)]);
    expect((await readFile(to.path)).equals(content)).toBe(true);
  });
});
