import { chmod, mkdir, mkdtemp, readdir, rm, symlink, utimes, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { thisProcess, type ProcessIdentity } from "../../process/index.js";
import { RunBusyError } from "../errors.js";
import { Run } from "./run.js";
import { readRecords, writeRecord, type RunRecord } from "./run-record.js";

let directory: string;
const MONITOR = { address: "localhost:1", key: "tcp:localhost:1" };

beforeEach(async () => {
  directory = join(await mkdtemp(join(tmpdir(), "run-")), "runs");
});

afterEach(async () => {
  await rm(join(directory, ".."), { recursive: true });
});

/** The record of a run that another process has, or had. */
async function plant(holder: Partial<ProcessIdentity>, changes: Partial<RunRecord> = {}): Promise<void> {
  writeRecord(directory, {
    version: 1,
    run: "01234567",
    holder: { ...(await thisProcess()), ...holder },
    machine: MONITOR,
    server: null,
    files: [],
    ...changes,
  });
}

describe("Run.acquire()", () => {
  it("gives a machine to one run at a time", async () => {
    const run = await Run.acquire(directory, MONITOR);
    await expect(Run.acquire(directory, MONITOR)).rejects.toThrow(RunBusyError);
    const other = await Run.acquire(directory, { ...MONITOR, key: "tcp:localhost:2" });
    other.release();
    run.release();
    const next = await Run.acquire(directory, MONITOR);
    next.release();
    expect(await readdir(directory)).toEqual([]);
  });

  it("never gives it to two of many that come at once", async () => {
    const results = await Promise.allSettled(
      Array.from({ length: 10 }, () => Run.acquire(directory, MONITOR)),
    );
    const winners = results.filter((result) => result.status === "fulfilled");
    expect(winners.length).toBeLessThanOrEqual(1);
    for (const winner of winners) winner.value.release();
  });

  it("is not kept out by a dead run, whose record stays for the clean-up", async () => {
    await Run.acquire(directory, MONITOR).then((run) => run.release());
    await plant({ startTime: "1" });
    const run = await Run.acquire(directory, MONITOR);
    expect((await readRecords(directory)).map(({ liveness }) => liveness).sort()).toEqual(["alive", "dead"]);
    run.release();
  });

  it("waits for the guard of a dead run, and then has the machine", async () => {
    await Run.acquire(directory, MONITOR).then((run) => run.release());
    await plant({ startTime: "1" }, { guard: await thisProcess() });
    expect((await readRecords(directory)).map(({ liveness }) => liveness)).toEqual(["ending"]);
    let isOver = false;
    const acquired = Run.acquire(directory, MONITOR).then((run) => {
      expect(isOver).toBe(true);
      return run;
    });
    // The guard's last act. By then the new run has looked at least once: it writes its own record first.
    while ((await readdir(directory)).filter((name) => name.endsWith(".json")).length < 2) {
      await new Promise(setImmediate);
    }
    isOver = true;
    await rm(join(directory, "01234567.json"));
    (await acquired).release();
  });

  it("counts a run as dead when its guard is dead as well", async () => {
    await Run.acquire(directory, MONITOR).then((run) => run.release());
    await plant({ startTime: "1" }, { guard: { ...(await thisProcess()), startTime: "1" } });
    const run = await Run.acquire(directory, MONITOR);
    expect((await readRecords(directory)).map(({ liveness }) => liveness).sort()).toEqual(["alive", "dead"]);
    run.release();
  });

  it("takes a run of another pid namespace for alive until it has been silent for long", async () => {
    await Run.acquire(directory, MONITOR).then((run) => run.release());
    await plant({ pidNamespace: "pid:[1]" });
    await expect(Run.acquire(directory, MONITOR)).rejects.toThrow(RunBusyError);
    const past = new Date(Date.now() - 61_000);
    await utimes(join(directory, "01234567.json"), past, past);
    const run = await Run.acquire(directory, MONITOR);
    run.release();
  });

  it("refuses a directory that others can change", async () => {
    await Run.acquire(directory, MONITOR).then((run) => run.release());
    await chmod(directory, 0o777);
    await expect(Run.acquire(directory, MONITOR)).rejects.toThrow(/others could change it/);
  });

  it("refuses a directory that others can put another one in the place of", async () => {
    await chmod(join(directory, ".."), 0o777);
    await expect(Run.acquire(directory, MONITOR)).rejects.toMatchObject({ code: "TM_RUN_DIRECTORY" });
    await chmod(join(directory, ".."), 0o1777);
    await Run.acquire(directory, MONITOR).then((run) => run.release());
  });

  it("refuses a symbolic link, wherever it leads: who made it can make it lead elsewhere", async () => {
    const real = join(directory, "..", "real");
    await mkdir(real, { mode: 0o700 });
    await symlink(real, directory);
    await expect(Run.acquire(directory, MONITOR)).rejects.toMatchObject({ code: "TM_RUN_DIRECTORY" });
    expect(await readdir(real)).toEqual([]);
  });

  it("says which directory cannot be used, and why", async () => {
    await writeFile(directory, "no directory");
    await expect(Run.acquire(directory, MONITOR)).rejects.toMatchObject({
      ...{ code: "TM_RUN_DIRECTORY", message: expect.stringContaining(directory) as string },
    });
    await expect(Run.acquire(join(directory, "below"), MONITOR)).rejects.toMatchObject({
      code: "TM_RUN_DIRECTORY",
    });
  });

  it.each([
    ["no JSON", "{"],
    ["empty", ""],
    ["another run's", '{"version": 1, "run": "ffffffff"}'],
    ["a newer version's", '{"version": 2, "run": "01234567"}'],
  ])("fails on a record that is %s as long as it is fresh: its run may live", async (_what, text) => {
    await Run.acquire(directory, MONITOR).then((run) => run.release());
    await writeFile(join(directory, "01234567.json"), text);
    await expect(Run.acquire(directory, MONITOR)).rejects.toMatchObject({ code: "TM_RUN_RECORD" });
    expect(await readdir(directory)).toEqual(["01234567.json"]);
    // A living one would have given a sign of life: its record's time.
    const past = new Date(Date.now() - 61_000);
    await utimes(join(directory, "01234567.json"), past, past);
    const run = await Run.acquire(directory, MONITOR);
    expect(await readRecords(directory)).toContainEqual({
      ...{ run: "01234567", record: undefined, liveness: "dead" },
    });
    run.release();
  });

  it.each([
    "/etc/passwd",
    "tm-01234567-0-scr.qcow2",
    "/x/tm-89abcdef-0-scr.qcow2",
    "/x/tm-01234567-0-exp.qcow2",
  ])("fails on a record that would have %s deleted", async (file) => {
    await Run.acquire(directory, MONITOR).then((run) => run.release());
    await plant({}, { files: [file] });
    await expect(readRecords(directory)).rejects.toThrow(/no scratch file/);
  });

  it("writes down what is planned before it is made", async () => {
    const run = await Run.acquire(directory, MONITOR);
    const files = [`/x/tm-${run.id}-0-scr.qcow2`];
    run.plan({ server: "/x/nbd.sock", files });
    const [found] = await readRecords(directory);
    expect(found?.record).toMatchObject({ run: run.id, server: "/x/nbd.sock", files });
    run.release({ leaveRecord: true });
    expect(await readdir(directory)).toEqual([`${run.id}.json`]);
  });
});
