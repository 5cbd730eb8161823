import { randomBytes } from "node:crypto";
import { readFile } from "node:fs/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { KiB } from "../../src/bytes/index.js";
import { initRepository, type PointManifest, type Repository } from "../../src/repository/index.js";
import { deletePoint, flattenPoint } from "../../src/rewrite/index.js";
import { servePoint, type PointServer } from "../../src/serve/index.js";
import { LocalStorage } from "../../src/storage/index.js";
import { pointId, writePoint } from "../interop/repository-points.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";

const CLUSTER = 64 * KiB;
const SIZE = 256 * CLUSTER;
const machine = "web";

let directory: TemporaryDirectory;
let repository: Repository;
let server: PointServer;
let problems: unknown[];
const content = Buffer.alloc(SIZE);

/** Four points, the last of which is served, by a process that cannot keep more than one of their files open. */
beforeEach(async () => {
  directory = await temporaryDirectory();
  const path = directory.file("repository");
  repository = await initRepository(await LocalStorage.open(path, { create: true, openFiles: 1 }));
  let point: PointManifest | undefined;
  content.fill(0);
  for (let number = 1; number <= 4; number += 1) {
    const data = new Map<number, Buffer>();
    for (let cluster = number; cluster < 100; cluster += 4 + number) data.set(cluster, randomBytes(CLUSTER));
    for (const [cluster, bytes] of data) bytes.copy(content, cluster * CLUSTER);
    const disk = { name: "sda", token: "00c0ffee", virtualSize: SIZE, data, parent: point };
    point = await writePoint(repository, { machine, id: pointId(number), disks: [disk] });
  }
  problems = [];
  server = await servePoint({
    repository,
    point: point!,
    address: { transport: "unix", path: directory.file("socket") },
    onProblem: (problem) => problems.push(problem),
  });
});

afterEach(async () => {
  await server.close();
  await directory[Symbol.asyncDispose]();
});

const uri = (): string => `nbd+unix:///sda?socket=${directory.file("socket")}`;

async function map(context: string): Promise<{ offset: number; length: number; type: number }[]> {
  const { stdout } = await run("nbdinfo", ["--json", `--map=${context}`, uri()]);
  return JSON.parse(stdout) as { offset: number; length: number; type: number }[];
}

describe("servePoint()", () => {
  it("goes on with the images that took the place of those it began with, for all who read at once", async () => {
    const before = await map("base:allocation");
    expect((await map("qemu:dirty-bitmap:changed")).map(({ type }) => type)).toContain(0);
    await deletePoint({ repository, machine, point: pointId(3) });
    expect(await map("base:allocation")).toEqual(before);

    await flattenPoint({ repository, machine, point: pointId(4) });
    await run("nbdcopy", ["--connections=4", "--requests=16", uri(), directory.file("copy")]);
    expect((await readFile(directory.file("copy"))).equals(content)).toBe(true);
    expect(await map("base:allocation")).toEqual(before);
    expect(problems).toEqual([]);
  });

  it("calls everything changed once the point's image is full", async () => {
    await flattenPoint({ repository, machine, point: pointId(4) });
    await run("nbdcopy", [uri(), directory.file("copy")]);
    const changed = await map("qemu:dirty-bitmap:changed");
    expect(new Set(changed.map(({ type }) => type))).toEqual(new Set([1]));
  });
});
