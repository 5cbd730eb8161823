import { readdir } from "node:fs/promises";
import { afterAll, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { deferred } from "../../src/flow/index.js";
import { startTidemark, type RunningTidemark } from "../support/cli.js";
import { guardsOf, waitForGuards } from "../support/guards.js";
import { Rig } from "../support/rig.js";
import { treeOf, worldOf } from "./world.js";
import { writeNoise } from "../support/image.js";

const MiB = 1024 * 1024;

let rig: Rig;
let images: Record<string, string>;
let seed = 0;

beforeAll(async () => {
  rig = await Rig.create();
  const vda = await rig.image("a.qcow2", "qcow2", 24 * MiB);
  const vdb = await rig.image("b.raw", "raw", 4 * MiB);
  images = { vda, vdb };
  await rig.start(
    [
      { path: vda, format: "qcow2", id: "vda" },
      { path: vdb, format: "raw", id: "vdb" },
    ],
    { guest: "none", deadline: 400_000 },
  );
  await rig.backup();
}, 60_000);

afterAll(async () => {
  await rig[Symbol.asyncDispose]();
});

beforeEach(async () => {
  seed += 1;
  const noise = await writeNoise(rig.directory.file("noise"), 16 * MiB, seed);
  await rig.machine.qemuIo("vda", `write -s ${noise} 1M 16M`);
  await rig.machine.qemuIo("vdb", `write -P ${seed} 1M 1M`);
});

/** Starts a backup that would take a quarter of a minute, and waits until it has copied something. */
async function halfway(): Promise<RunningTidemark> {
  const env = { TIDEMARK_RUNTIME_DIR: rig.directory.file("run") };
  const running = startTidemark(rig.backupArguments(["--bandwidth", "1MiB/s"]), { env });
  await running.nextEvent(({ event, done }) => event === "progress" && Number(done) > 0);
  return running;
}

/** As the end of a whole service, or of the host's memory, does. The guard first: it would be quicker than a test. */
async function killBoth(running: RunningTidemark): Promise<void> {
  running.kill("SIGSTOP");
  for (const pid of await guardsOf(rig)) process.kill(pid, "SIGKILL");
  running.kill("SIGKILL");
  await waitForGuards(rig, 0);
}

const OURS = /^(node|job|export|bitmap) tm-|^job|^export/;

/** The next backup continues where the last one that was stored left off, and holds what the machine held. */
async function expectNextRight(): Promise<void> {
  const points = await readdir(`${rig.repository}/vm`);
  const point = await rig.backup();
  expect(points).toContain(point.parent);
  expect(point.disks.map(({ kind }) => kind)).toEqual(["incremental", "incremental"]);
  expect(point.disks[0]?.dirtyBytes).toBeGreaterThanOrEqual(16 * MiB);
  expect(point.disks[1]?.dirtyBytes).toBe(MiB);
  expect(await rig.verify(point, images)).toEqual({ vda: "identical", vdb: "identical" });
}

interface Leftover {
  readonly kind: string;
  readonly name: string;
  readonly run: string | null;
}

const repository = (): string[] => ["--machine", "vm", "--repo", rig.repository];

async function leftovers(): Promise<Leftover[]> {
  const status = await rig.tidemark(["status", "--qmp", rig.proxy.socket, ...repository(), "--json"]);
  return (status.json() as { leftovers: Leftover[] }).leftovers;
}

async function cleanup(...options: string[]): Promise<{ dryRun: boolean; removed: Leftover[] }> {
  const args = ["cleanup", "--qmp", rig.proxy.socket, ...repository(), "--json", ...options];
  return (await rig.tidemark(args)).json() as { dryRun: boolean; removed: Leftover[] };
}

describe("a backup that is interrupted", () => {
  it.each(["SIGINT", "SIGTERM", "SIGHUP"] as const)(
    "by %s: exit 130, nothing left, and the next backup is an increment and right",
    async (signal) => {
      const before = await treeOf(rig.repository);
      await using running = await halfway();
      const started = performance.now();
      running.kill(signal);
      // Impatience changes nothing.
      running.kill(signal);
      const result = await running.ended;
      expect(performance.now() - started).toBeLessThan(5000);
      expect({ code: result.code, stderr: result.stderr }).toEqual({ code: 130, stderr: "" });
      expect(result.events().at(-1)).toEqual({
        event: "error",
        code: "TM_INTERRUPTED",
        message: `Interrupted by ${signal}`,
        hint: null,
        exitCode: 130,
      });
      const { repository: after, qemu, files } = await worldOf(rig);
      expect(after).toEqual(before);
      expect(qemu.filter((line) => OURS.test(line))).toEqual([]);
      expect(files).toEqual([]);
      expect(await leftovers()).toEqual([]);
      await expectNextRight();
    },
  );

  it("before it has frozen anything: the same", async () => {
    const before = await worldOf(rig);
    const frozen = rig.proxy.onCommand("transaction", () => undefined);
    const reached = deferred<undefined>();
    // Held until the signal has been sent.
    const discovery = rig.proxy.onCommand("query-block", () => {
      running.kill("SIGINT");
      reached.resolve(undefined);
      return undefined;
    });
    const env = { TIDEMARK_RUNTIME_DIR: rig.directory.file("run") };
    await using running = startTidemark(rig.backupArguments(), { env });
    await reached.promise;
    expect(await running.ended).toMatchObject({ code: 130 });
    expect(frozen.fired).toBe(0);
    frozen.remove();
    discovery.remove();
    expect(await worldOf(rig)).toEqual(before);
  });
});

describe("a backup that is killed together with its guard", () => {
  it("cleanup lists what it left, removes it when told to, and status knows", async () => {
    const running = await halfway();
    await killBoth(running);
    expect(await running.ended).toMatchObject({ signal: "SIGKILL" });

    const left = await leftovers();
    const kinds = new Set(left.map(({ kind }) => kind));
    expect([...kinds].sort()).toEqual(["bitmap", "export", "file", "job", "node"]);
    expect(new Set(left.map(({ run }) => run)).size).toBe(1);
    const before = await worldOf(rig);
    expect(before.qemu.filter((line) => OURS.test(line)).length).toBeGreaterThan(0);
    expect(before.files.length).toBeGreaterThan(0);

    expect(await cleanup("--dry-run")).toEqual({ dryRun: true, removed: left });
    expect(await worldOf(rig)).toEqual(before);

    const { dryRun, removed } = await cleanup();
    expect({ dryRun, removed }).toEqual({ dryRun: false, removed: left });
    const { repository: stored, qemu, files } = await worldOf(rig);
    expect(stored).toEqual(before.repository);
    expect(qemu.filter((line) => OURS.test(line))).toEqual([]);
    expect(files).toEqual([]);
    expect(await leftovers()).toEqual([]);
    expect((await cleanup()).removed).toEqual([]);
    await expectNextRight();
  });

  it("is cleaned up by one who knows nothing of it, if told to, its NBD server too", async () => {
    const running = await halfway();
    await killBoth(running);
    await running.ended;
    const env = { TIDEMARK_RUNTIME_DIR: rig.directory.file("elsewhere") };
    const args = ["cleanup", "--qmp", rig.proxy.socket];
    expect((await rig.run(args, { env })).code).toBe(5);
    await rig.tidemark([...args, "--unknown-runs"], { env });
    await expectNextRight();
    await rig.backup();
    expect(await leftovers()).toEqual([]);
  });

  it("is followed by a right increment without any cleanup, which takes its leftovers away", async () => {
    const running = await halfway();
    await killBoth(running);
    await running.ended;
    expect((await leftovers()).length).toBeGreaterThan(0);
    await expectNextRight();
    // Only now is the dead run's checkpoint known to be of no use: one bitmap on each disk.
    const useless = await leftovers();
    expect(useless.map(({ kind, run }) => ({ kind, run }))).toEqual([
      { kind: "bitmap", run: null },
      { kind: "bitmap", run: null },
    ]);
    expect((await cleanup("--dry-run")).removed).toEqual(useless);
    await rig.backup();
    expect(await leftovers()).toEqual([]);
    const { repository: stored, qemu, files } = await worldOf(rig);
    expect(qemu.filter((line) => OURS.test(line))).toEqual([]);
    expect(qemu.filter((line) => line.startsWith("bitmap "))).toHaveLength(2);
    expect(files).toEqual([]);
    const names = stored.map((line) => line.split(" ")[0] ?? "");
    const folders = names.filter((name) => /^vm\/[^/]+\/$/.test(name));
    expect(folders.filter((folder) => !names.includes(`${folder}point.json`))).toEqual([]);
  });
});
