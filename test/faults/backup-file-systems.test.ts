import { mkdir, readdir, readFile, rm } from "node:fs/promises";
import { describe, expect, it, vi } from "vitest";
import { mounted, newFileSystem } from "../support/mount.js";
import { temporaryDirectory } from "../support/temporary.js";
import { writeNoise } from "../support/image.js";
import { run } from "../support/tools.js";
import { GuardedRig, isLong } from "./guard-fixture.js";

const MiB = 1024 * 1024;

/** A guest that overwrites some 5 MiB a second, and needs 8 s for its round. */
const STEADY = { trailBlocks: 300, stepsPerTick: 2 };

describe("a backup whose scratch is on a file system that is too small", () => {
  const ways: readonly (readonly [string, readonly string[]])[] = [
    ["by its own limit, half of the free space", []],
    ["by the guard, where the limit is larger than the file system", ["--scratch-limit", "1GiB"]],
  ];

  it.each(isLong ? ways : ways.slice(0, 1))(
    "ends %s: the guest sees no error, and the next increment is right",
    async (_, extra) => {
      await using guarded = await GuardedRig.create({ iothread: true }, STEADY, 24 * MiB);
      const { rig } = guarded;
      const scratch = rig.directory.file("scratch");
      await mkdir(scratch);
      await using _mount = await mounted(scratch, "-t", "tmpfs", "-o", "size=16m", "none");
      // Zeroes take no room in a scratch file: there must be data to overwrite.
      for (const disk of ["vda", "vdb"]) await rig.machine.qemuIo(disk, "write -P 7 2M 17M");
      await rig.machine.waitForGuestWriting(200);
      // It may be full before anything is copied.
      await using running = guarded.start(["--bandwidth", "1MiB/s", "--scratch", scratch, ...extra]);
      const result = await running.ended;
      expect(result.code).toBe(1);
      expect(result.events().at(-1)).toMatchObject({
        event: "error",
        code: "TM_SCRATCH_FULL",
        hint: expect.stringContaining("--scratch") as string,
      });
      const { events } = rig.machine.monitor;
      expect(events.filter(({ event }) => event === "BLOCK_IO_ERROR")).toEqual([]);
      expect(await readdir(scratch)).toEqual([]);
      await guarded.expectNothingLeft();
      await guarded.expectNextRight();
    },
  );
});

describe("a backup whose repository is on a file system that is too small", () => {
  it("says so, leaves nothing in the machine nor there, and goes on once there is room", async () => {
    await using guarded = await GuardedRig.create({ iothread: true }, undefined, 24 * MiB);
    const { rig } = guarded;
    const before = rig.directory.file("before");
    await run("cp", ["-a", rig.repository, before]);
    await rm(rig.repository, { recursive: true });
    await mkdir(rig.repository);
    const taken = Number((await run("du", ["-sk", before])).stdout.split("\t")[0]);
    const size = (KiB: number): string => `size=${KiB}k`;
    await using _mount = await mounted(rig.repository, "-t", "tmpfs", "-o", size(taken + 2048), "none");
    await run("cp", ["-a", `${before}/.`, rig.repository]);
    await rm(before, { recursive: true });
    // Noise: it takes as much room there as on the disk.
    const noise = await writeNoise(rig.directory.file("noise"), 6 * MiB, 3);
    await rig.machine.qemuIo("vda", `write -s ${noise} 6M 6M`);
    const result = await rig.run(rig.backupArguments());
    expect(result.code).toBe(1);
    expect(result.events().at(-1)).toMatchObject({
      event: "error",
      message: expect.stringContaining("no space is left") as string,
      hint: expect.any(String) as string,
    });
    await guarded.expectNothingLeft();
    await guarded.expectTidyRepository();
    await run("mount", ["-o", `remount,${size(200 * 1024)}`, rig.repository]);
    await guarded.expectNextRight();
  });
});

describe("a backup whose repository is unmounted under it", () => {
  it("says that it is gone, leaves nothing in the machine, and the next increment is right", async () => {
    await using guarded = await GuardedRig.create({ iothread: true }, undefined, 24 * MiB);
    const { rig } = guarded;
    await using elsewhere = await temporaryDirectory();
    const store = elsewhere.file("store");
    await mkdir(store);
    await using _store = await mounted(store, "-t", "tmpfs", "-o", "size=200m", "none");
    await run("cp", ["-a", `${rig.repository}/.`, store]);
    await rm(rig.repository, { recursive: true });
    await mkdir(rig.repository);
    const here = await mounted(rig.repository, "--bind", store);
    await rig.machine.qemuIo("vda", "write -P 9 6M 6M");
    await using running = await guarded.startCopying();
    await here[Symbol.asyncDispose]();
    const result = await running.ended;
    expect(result.code).toBe(1);
    expect(result.events().at(-1)).toMatchObject({
      event: "error",
      code: expect.stringMatching(/^TM_STORAGE_(GONE|IO)$/) as string,
      hint: expect.stringContaining("mount") as string,
    });
    // Nothing was written beside the point where it was mounted.
    expect(await readdir(rig.repository)).toEqual([]);
    await using _again = await mounted(rig.repository, "--bind", store);
    await guarded.expectNothingLeft();
    await guarded.expectNextRight();
  });
});

/** States of a process's threads, as in /proc: "D" waits in the kernel, and not even SIGKILL ends that. */
async function threadStates(pid: number): Promise<string[]> {
  const threads = await readdir(`/proc/${pid}/task`);
  const stats = await Promise.all(
    threads.map((thread) => readFile(`/proc/${pid}/task/${thread}/stat`, "utf8").catch(() => "")),
  );
  return stats.map((stat) => stat.slice(stat.lastIndexOf(")") + 2, stat.lastIndexOf(")") + 3));
}

describe("a backup that is killed while a thread of it waits for its repository's disk", () => {
  it("is ended by its guard, although the kernel still has it, and its monitor is free again", async () => {
    await using guarded = await GuardedRig.create({ iothread: true }, undefined, 24 * MiB);
    const { rig } = guarded;
    const aside = rig.directory.file("aside");
    await run("mv", [rig.repository, aside]);
    await using _mount = await newFileSystem("ext4", rig.repository, 128 * MiB);
    await run("cp", ["-a", `${aside}/.`, rig.repository]);
    await rm(aside, { recursive: true });
    await rig.machine.qemuIo("vda", "write -P 9 6M 16M");
    await using running = await guarded.startCopying();
    // As on a disk that does not answer: whoever writes waits until it does, and nothing ends that.
    await run("fsfreeze", ["-f", rig.repository]);
    try {
      await vi.waitFor(async () => expect(await threadStates(running.pid)).toContain("D"), 15_000);
      running.kill("SIGKILL");
      await vi.waitFor(async () => expect(await threadStates(running.pid)).toContain("Z"), 5000);
      await guarded.expectNothingLeft();
      await rig.tidemark(["status", "--qmp", rig.proxy.socket]);
      expect(await threadStates(running.pid)).toContain("D");
    } finally {
      await run("fsfreeze", ["-u", rig.repository]);
    }
    expect(await running.ended).toMatchObject({ signal: "SIGKILL" });
    await guarded.expectNextRight();
  });
});
