import { readdir, rm, stat, writeFile } from "node:fs/promises";
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest";
import { startTidemark, type RunningTidemark } from "../support/cli.js";
import { residueOf } from "../interop/machine-fixture.js";
import { run } from "../support/tools.js";
import { GuardedRig } from "./guard-fixture.js";

const MiB = 1024 * 1024;

/**
 * Loaded before the program: from some point on, what it writes through file handles (the repository's objects, and
 * nothing else) gets no answer. `fifo`: threads wait in the kernel, as for a network share that is gone: one, or all that
 * there are.
 */
const HANG = `
import { open } from "node:fs/promises";
import { writeFileSync } from "node:fs";
const { HANG_AFTER, HANG_MARK, HANG_FIFO, HANG_THREADS = "1" } = process.env;
const handle = await open("/dev/null");
const prototype = Object.getPrototypeOf(handle);
await handle.close();
const { write } = prototype;
let left = Number(HANG_AFTER);
let hanging = false;
prototype.write = function (buffer, offset, length, position) {
  left -= length;
  if (left > 0) return write.call(this, buffer, offset, length, position);
  if (HANG_FIFO !== undefined && !hanging) for (let n = Number(HANG_THREADS); n > 0; n -= 1) void open(HANG_FIFO, "w");
  hanging = true;
  writeFileSync(HANG_MARK, "");
  return new Promise(() => undefined);
};
`;

let guarded: GuardedRig;
let hangs = 0;

beforeAll(async () => {
  guarded = await GuardedRig.create({ iothread: true }, undefined, 24 * MiB);
  await writeFile(guarded.rig.directory.file("hang.mjs"), HANG);
  await run("mkfifo", [guarded.rig.directory.file("fifo")]);
}, 60_000);

afterAll(async () => {
  await guarded[Symbol.asyncDispose]();
});

/** Starts a backup, and waits until its repository does not answer any more. */
async function startHanging(
  after: number,
  extra: Readonly<Record<string, string>> = {},
): Promise<RunningTidemark> {
  const { rig } = guarded;
  hangs += 1;
  await rig.machine.qemuIo("vda", `write -P ${hangs} 6M 16M`);
  await rig.machine.waitForGuestWriting(200);
  const mark = rig.directory.file(`mark-${hangs}`);
  const env = {
    TIDEMARK_RUNTIME_DIR: rig.directory.file("run"),
    NODE_OPTIONS: `--import=${rig.directory.file("hang.mjs")}`,
    ...{ HANG_AFTER: String(after), HANG_MARK: mark, ...extra },
  };
  const running = startTidemark(rig.backupArguments(["--level", "1"]), { env });
  await vi.waitFor(() => stat(mark), 20_000);
  return running;
}

/** The machine has nothing of a run in it any more, soon. */
async function expectFreed(): Promise<void> {
  await vi.waitFor(
    async () => {
      const { nodes, jobs, exports } = await residueOf(guarded.rig.machine.monitor);
      expect({ nodes, jobs, exports }).toEqual({ nodes: [], jobs: [], exports: [] });
    },
    { timeout: 4000, interval: 50 },
  );
}

/** The next backup is right, and what was unfinished is gone from the repository. */
async function expectNextRight(): Promise<void> {
  await guarded.expectNothingLeft();
  const machine = `${guarded.rig.repository}/vm`;
  for (const name of await readdir(machine)) {
    // An attempt at the lock stays for an hour: it could be that of another run, which is alive.
    if (/^\.tidemark-[0-9a-f]+\.partial$/.test(name)) await rm(`${machine}/${name}`);
  }
  await guarded.expectNextRight();
}

describe("a backup whose repository does not answer any more", () => {
  it.each([
    ["in an image", 100_000],
    ["in its lock", 1],
  ])("%s: SIGTERM frees the machine at once, and the run ends with 130 soon", async (_, after) => {
    await using running = await startHanging(after);
    const started = performance.now();
    running.kill("SIGTERM");
    await expectFreed();
    const result = await running.ended;
    expect(performance.now() - started).toBeLessThan(10_000);
    expect(result.code).toBe(130);
    expect(result.events().at(-1)).toMatchObject({ event: "error", code: "TM_INTERRUPTED", exitCode: 130 });
    await expectNextRight();
  });

  it("a second signal does not wait for it, and is as safe", async () => {
    await using running = await startHanging(100_000);
    running.kill("SIGINT");
    await expectFreed();
    const started = performance.now();
    running.kill("SIGINT");
    expect(await running.ended).toMatchObject({ code: 130 });
    expect(performance.now() - started).toBeLessThan(3000);
    await expectNextRight();
  });

  // Four is what Node has for files, those of the machine included.
  it.each(["1", "4"])(
    "with %s threads that wait in the kernel: the process ends by the signal itself, all done",
    async (threads) => {
      const fifo = guarded.rig.directory.file("fifo");
      await using running = await startHanging(100_000, { HANG_FIFO: fifo, HANG_THREADS: threads });
      const started = performance.now();
      running.kill("SIGTERM");
      await expectFreed();
      const result = await running.ended;
      expect(performance.now() - started).toBeLessThan(15_000);
      // Shells show it as 130.
      expect(result).toMatchObject({ code: null, signal: "SIGINT" });
      expect(result.events().at(-1)).toMatchObject({ event: "error", code: "TM_INTERRUPTED", exitCode: 130 });
      await expectNextRight();
    },
  );
});
