import { readdir, readFile, rm, truncate, utimes, writeFile } from "node:fs/promises";
import { uptime } from "node:os";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { filesOfOurs, NOTHING, residueOf } from "../interop/machine-fixture.js";
import { startTidemark } from "../support/cli.js";
import { waitForGuards } from "../support/guards.js";
import type { PointView } from "../support/rig.js";
import { atStep } from "../support/steps.js";
import { Catalogued, expectIncrement } from "./catalogue-fixture.js";

let catalogued: Catalogued;
let first: PointView;
/** The state file of a run that was killed with its guard, and has things in the machine. */
let record: string;

beforeEach(async () => {
  catalogued = await Catalogued.begin();
  const { rig } = catalogued;
  first = await catalogued.backup();
  await catalogued.write();
  const run = rig.directory.file("run");
  const killed = startTidemark(rig.backupArguments(), {
    env: { TIDEMARK_RUNTIME_DIR: run, ...atStep("exported", { action: "kill-both" }) },
  });
  expect(await killed.ended).toMatchObject({ signal: "SIGKILL" });
  await waitForGuards(rig, 0);
  const { jobs, exports } = await residueOf(rig.machine.monitor);
  expect([jobs.length, exports.length]).toEqual([1, 1]);
  const [name = ""] = (await readdir(`${run}/tidemark`)).filter((file) => file.endsWith(".json"));
  record = `${run}/tidemark/${name}`;
});
afterEach(async () => {
  await catalogued[Symbol.asyncDispose]();
});

async function growOld(): Promise<void> {
  const past = new Date(Date.now() - 61_000);
  await utimes(record, past, past);
}

/** The next plain backup cleans up, goes on from the base, and is right. */
async function expectHealed(): Promise<void> {
  const { rig } = catalogued;
  expectIncrement(await catalogued.backup(), first);
  expect({ ...(await residueOf(rig.machine.monitor)), checkpoints: [] }).toEqual(NOTHING);
  // The empty directory of its NBD socket may stay: nothing but the state file says where it is.
  const files = await filesOfOurs(rig.directory.path, rig.machine.directory);
  expect(files.filter((name) => !name.startsWith("repository/"))).toEqual([]);
  await catalogued.proveAll();
}

describe("backup after a run was killed with its guard, and the run's state file", () => {
  it("was cut to nothing: waits until it is a minute old, and then cleans up by itself", async () => {
    const { rig } = catalogued;
    await truncate(record, 0);
    const refused = await rig.run(rig.backupArguments());
    expect(refused.stdout).toContain("TM_RUN_RECORD");
    expect(refused.code).toBe(1);
    expect((await residueOf(rig.machine.monitor)).jobs).toHaveLength(1);
    await growOld();
    await expectHealed();
  });

  it("holds garbage that names files: deletes none of them", async () => {
    const victim = catalogued.rig.directory.file("victim");
    await writeFile(victim, "precious");
    const { run } = JSON.parse(await readFile(record, "utf8")) as { run: string };
    const forged = { ...(JSON.parse(await readFile(record, "utf8")) as object), run, files: [victim] };
    await writeFile(record, JSON.stringify(forged));
    await growOld();
    await expectHealed();
    expect(await readFile(victim, "utf8")).toBe("precious");
  });

  it("names a pid that another process has now: cleans up at once", async () => {
    const found = JSON.parse(await readFile(record, "utf8")) as { holder: object; guard: object };
    const holder = { ...found.holder, pid: process.pid };
    const guard = { ...found.guard, pid: process.pid };
    await writeFile(record, JSON.stringify({ ...found, holder, guard }));
    await expectHealed();
  });

  it("is gone with the host, as after a power failure: removes the scratch that nothing tells of", async () => {
    const { rig } = catalogued;
    await rm(record);
    await rig.machine.kill();
    const [scratch = ""] = (await readdir(rig.directory.path)).filter((name) => name.startsWith("tm-"));
    expect(scratch).toMatch(/-scr\.qcow2$/);
    const beforeBoot = new Date(Date.now() - (uptime() + 60) * 1000);
    await utimes(rig.directory.file(scratch), beforeBoot, beforeBoot);
    await catalogued.start();
    await catalogued.backup();
    expect((await readdir(rig.directory.path)).filter((name) => name.startsWith("tm-"))).toEqual([]);
    await catalogued.proveAll();
  });
});
