import { randomBytes, randomInt } from "node:crypto";
import { mkdir, readdir, readFile, writeFile } from "node:fs/promises";
import { dirname } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { KiB, MiB } from "../../src/bytes/index.js";
import { initRepository, type PointManifest } from "../../src/repository/index.js";
import { MemoryStorage } from "../../src/storage/index.js";
import { startTidemark, type CliResult } from "../support/cli.js";
import { checkImage, CLEAN, compareImages, qemuIo, toRaw } from "../support/image.js";
import { pointOf } from "../support/rig.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";
import { pointId, writeImages } from "./repository-points.js";

/** More than a process keeps open of it: see OPEN_FILES of storage/local.ts. */
const IMAGES = 350;
const CLUSTER = 64 * KiB;
const SIZE = 1000 * CLUSTER + 512;

/** What any command may have open at once, and in memory, with a chain however long. */
const MOST_FILES = 256 + 80;
const MOST_MEMORY = 230 * MiB;

let directory: TemporaryDirectory;
/** What the disk holds at the newest point. */
const model = Buffer.alloc(SIZE);
let newest: PointManifest;

beforeAll(async () => {
  directory = await temporaryDirectory("tm-long-");
  // In memory, and its manifests put as they are: hundreds of commits would take longer than all tests.
  const storage = new MemoryStorage();
  const repository = await initRepository(storage);
  let parent: PointManifest | undefined;
  for (let number = 1; number <= IMAGES; number += 1) {
    // Each increment has three clusters of its own, beside one that every second one of them changes.
    const wanted = [0, number % 2, 2 * number, randomInt(1001), randomInt(1001)];
    const zero = [...new Set([randomInt(1001), 7])].filter((cluster) => !wanted.includes(cluster));
    const data = new Map<number, Buffer>();
    for (const cluster of wanted) {
      const length = Math.min(CLUSTER, SIZE - cluster * CLUSTER);
      const bytes = Buffer.alloc(length, randomBytes(9000));
      bytes.copy(model, cluster * CLUSTER);
      data.set(cluster, bytes);
    }
    for (const cluster of zero) model.fill(0, cluster * CLUSTER, Math.min((cluster + 1) * CLUSTER, SIZE));
    const disk = { name: "vda", token: "00c0ffee", virtualSize: SIZE, data, zero, parent };
    parent = await writeImages(repository, { machine: "vm", id: pointId(number), disks: [disk] });
    await storage.put(`vm/${parent.id}/point.json`, Buffer.from(JSON.stringify(parent)));
  }
  if (parent === undefined) throw new Error("no point was written");
  newest = parent;
  for await (const { key, size } of storage.list("")) {
    const path = directory.file(`backups/${key}`);
    await mkdir(dirname(path), { recursive: true });
    await writeFile(path, await storage.get(key, { maxLength: size }));
  }
  await writeFile(directory.file("model.raw"), model);
}, 120_000);
afterAll(async () => {
  await directory[Symbol.asyncDispose]();
});

/** What a process had open at most, and in memory. */
interface Use {
  files: number;
  memory: number;
}

/** Looks at a process until it ends. */
function watch(pid: number): { readonly use: Use; readonly stop: () => void } {
  const use = { files: 0, memory: 0 };
  const look = async (): Promise<void> => {
    use.files = Math.max(use.files, (await readdir(`/proc/${pid}/fd`)).length);
    const [, peak] = /VmHWM:\s*(\d+) kB/.exec(await readFile(`/proc/${pid}/status`, "utf8")) ?? [];
    use.memory = Math.max(use.memory, Number(peak ?? 0) * KiB);
  };
  // It may have ended in between.
  const timer = setInterval(() => void look().catch(() => undefined), 10);
  return { use, stop: () => clearInterval(timer) };
}

/** Runs tidemark, which must succeed without holding more than it may. */
async function bounded(args: readonly string[]): Promise<CliResult> {
  await using running = startTidemark([...args, "--repo", directory.file("backups")]);
  const { use, stop } = watch(running.pid);
  const result = await running.ended.finally(stop);
  expect({ code: result.code, stderr: result.stderr }).toEqual({ code: 0, stderr: "" });
  expectBounded(use);
  return result;
}

function expectBounded({ files, memory }: Use): void {
  expect(files).toBeGreaterThan(10);
  expect(files).toBeLessThanOrEqual(MOST_FILES);
  expect(memory).toBeGreaterThan(20 * MiB);
  expect(memory).toBeLessThanOrEqual(MOST_MEMORY);
}

const reference = () => ({ path: directory.file("model.raw"), format: "raw" }) as const;

describe(`a chain of ${IMAGES} images`, () => {
  it("restores its newest point, and one in the middle as it was", async () => {
    const target = directory.file("newest.raw");
    await bounded(["restore", "vm", "--to", target, "--workers", "2", "--quiet"]);
    expect((await readFile(target)).equals(model)).toBe(true);
    // qemu-img can open chains of this length.
    const id = pointId(100);
    await bounded(["restore", `vm@${id}`, "--to", directory.file("middle.raw"), "--workers", "2", "--quiet"]);
    const bare = { path: directory.file(`backups/vm/${id}/vda.qcow2`), format: "qcow2" } as const;
    const middle = { path: directory.file("middle.raw"), format: "raw" } as const;
    expect(await compareImages(bare, middle)).toBe("identical");
  }, 60_000);

  it("is verified", async () => {
    const result = await bounded(["verify", "--json"]);
    expect(result.events().at(-1)).toMatchObject({ points: IMAGES, ok: true, problems: [] });
  }, 60_000);

  it("is served", async () => {
    const socket = directory.file("s");
    const args = ["serve", "vm", "--socket", socket, "--json", "--repo", directory.file("backups")];
    await using serving = startTidemark(args);
    const { use, stop } = watch(serving.pid);
    await serving.nextEvent(() => true);
    await run("nbdcopy", [`nbd+unix:///vda?socket=${socket}`, directory.file("served.raw")]);
    stop();
    serving.kill("SIGTERM");
    await serving.ended;
    expect((await readFile(directory.file("served.raw"))).equals(model)).toBe(true);
    expectBounded(use);
  }, 60_000);

  it("goes on: an image that it is restored to is backed up as an increment, and restored", async () => {
    const image = directory.file("disk.qcow2");
    await bounded(["restore", "vm", "--to", image, "--track", "--workers", "2", "--quiet"]);
    expect(await checkImage(image)).toMatchObject(CLEAN);
    expect(await compareImages({ path: image, format: "qcow2" }, reference())).toBe("identical");
    await qemuIo(image, "qcow2", ["write -P 9 1M 64k", "discard 20M 1M"]);
    const backup = ["backup", "--machine", "vm", "--image", `vda=${image}`, "--json"];
    const point = pointOf((await bounded(backup)).events());
    expect(point.disks[0]).toMatchObject({ kind: "incremental", parent: newest.id });
    const raw = { path: await toRaw(image, "qcow2", directory.file("held.raw")), format: "raw" } as const;
    const target = directory.file("next.raw");
    await bounded(["restore", `vm@${point.id}`, "--to", target, "--workers", "2", "--quiet"]);
    expect(await compareImages({ path: target, format: "raw" }, raw)).toBe("identical");
  }, 60_000);
});
