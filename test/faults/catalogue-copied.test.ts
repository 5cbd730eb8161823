import { copyFile, rename, rm } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { startTidemark } from "../support/cli.js";
import { waitForGuards } from "../support/guards.js";
import type { PointView } from "../support/rig.js";
import { Catalogued, expectIncrement, reasonOf } from "./catalogue-fixture.js";
import { isFreeze, isRemoval } from "./guard-fixture.js";

/** Read in full, and only what differs is stored. */
const ABSENT = /^compared: point \S+ is not in the repository/;

/** Kills a backup when its point is committed and its base's bitmap is still there. */
async function backupKilledAfterCommit(catalogued: Catalogued): Promise<PointView> {
  const { rig } = catalogued;
  await catalogued.write();
  await using running = startTidemark(rig.backupArguments(), {
    env: { TIDEMARK_RUNTIME_DIR: rig.directory.file("run") },
  });
  let isFrozen = false;
  const hook = rig.proxy.onCommand("transaction", async (command) => {
    isFrozen ||= isFreeze(command);
    if (!isFrozen || !isRemoval(command)) return undefined;
    running.kill("SIGKILL");
    await running.ended;
    // QEMU never gets it.
    return "disconnect";
  });
  expect(await running.ended).toMatchObject({ signal: "SIGKILL" });
  hook.remove();
  await waitForGuards(rig, 0);
  const list = await rig.tidemark(["list", "vm", "--repo", rig.repository, "--json"]);
  const point = (list.json() as PointView[]).at(-1);
  if (point === undefined) throw new Error("No point was committed");
  catalogued.remember(point);
  return point;
}

describe("backup into copies of one repository", () => {
  it("by turns: each copy has its own chain, which goes on whatever the other one does", async () => {
    await using catalogued = await Catalogued.begin();
    const first = await catalogued.backup();
    const copy = await catalogued.copy("copy");
    const here = await catalogued.backup();
    expectIncrement(here, first);

    const there = await catalogued.backup(copy);
    expect(reasonOf(there)).toMatch(ABSENT);
    expect(await catalogued.checkpoints()).toEqual([here.id, there.id]);

    const nextHere = await catalogued.backup();
    expectIncrement(nextHere, here);
    const nextThere = await catalogued.backup(copy);
    expectIncrement(nextThere, there);
    expectIncrement(await catalogued.backup(), nextHere);
    expect(await catalogued.checkpoints()).toHaveLength(2);
    await catalogued.proveAll();
  });

  it("made beside a killed run: a chain may have to begin anew, no point is ever wrong", async () => {
    await using catalogued = await Catalogued.begin();
    const first = await catalogued.backup();
    const copy = await catalogued.copy("copy");
    // Known to one copy only, with the same token as the base that both know.
    const killed = await backupKilledAfterCommit(catalogued);
    expect(await catalogued.checkpoints()).toEqual([first.id, killed.id]);

    const there = await catalogued.backup(copy);
    expectIncrement(there, first);
    expect(await catalogued.checkpoints()).toEqual([killed.id, there.id]);

    const here = await catalogued.backup();
    expectIncrement(here, killed);
    const again = await catalogued.backup();
    expectIncrement(again, here);
    // To this copy the other one's checkpoint is one that never came to be, before a later commit: it went.
    expect(await catalogued.checkpoints()).toEqual([again.id]);
    expect(reasonOf(await catalogued.backup(copy))).toMatch(ABSENT);
    expect(reasonOf(await catalogued.backup(copy))).toBeNull();
    expect(reasonOf(await catalogued.backup())).toMatch(ABSENT);
    await catalogued.proveAll();
  });
});

describe("backup into a repository that was brought back from an older copy of itself", () => {
  it("compares, keeps the bitmap until a later point is committed, and compares again when the newer state is back", async () => {
    await using catalogued = await Catalogued.begin();
    const { repository } = catalogued.rig;
    await catalogued.backup();
    const old = await catalogued.copy("old");
    const second = await catalogued.backup();
    const newer = catalogued.rig.directory.file("newer");
    await rename(repository, newer);
    await rename(old, repository);

    const third = await catalogued.backup();
    expect(reasonOf(third)).toMatch(ABSENT);
    expect(await catalogued.checkpoints()).toEqual([second.id, third.id]);
    const fourth = await catalogued.backup();
    expectIncrement(fourth, third);
    expect(await catalogued.checkpoints()).toEqual([fourth.id]);
    await catalogued.proveAll([second]);

    await rm(repository, { recursive: true });
    await rename(newer, repository);
    expect(reasonOf(await catalogued.backup())).toMatch(ABSENT);
    await catalogued.proveAll([third, fourth]);
  });

  it("goes on with the bitmap when the newer state is back at once", async () => {
    await using catalogued = await Catalogued.begin();
    const { repository } = catalogued.rig;
    await catalogued.backup();
    const old = await catalogued.copy("old");
    const second = await catalogued.backup();
    const newer = catalogued.rig.directory.file("newer");
    await rename(repository, newer);
    await rename(old, repository);
    const third = await catalogued.backup();
    expect(reasonOf(third)).toMatch(ABSENT);
    await rm(repository, { recursive: true });
    await rename(newer, repository);
    expectIncrement(await catalogued.backup(), second);
    await catalogued.proveAll([third]);
  });

  it("goes on from an older base that the disk still carries", async () => {
    await using catalogued = await Catalogued.begin();
    const { repository } = catalogued.rig;
    const first = await catalogued.backup();
    const old = await catalogued.copy("old");
    const lost = await backupKilledAfterCommit(catalogued);
    await rm(repository, { recursive: true });
    await rename(old, repository);

    const next = await catalogued.backup();
    expectIncrement(next, first);
    expect(await catalogued.checkpoints()).toEqual([lost.id, next.id]);
    const last = await catalogued.backup();
    expectIncrement(last, next);
    expect(await catalogued.checkpoints()).toEqual([last.id]);
    await catalogued.proveAll([lost]);
  });
});

describe("backup of a cloned machine, under the name of the first one", () => {
  it.each([
    { what: "the same repository", inCopy: false },
    { what: "a copy of it", inCopy: true },
  ])("into $what: has a chain of its own, and costs the first one nothing", async ({ inCopy }) => {
    await using catalogued = await Catalogued.begin();
    const { rig } = catalogued;
    const first = await catalogued.backup();
    await catalogued.write();
    await rig.machine.quit();
    const clone = rig.directory.file("clone.qcow2");
    await copyFile(catalogued.image, clone);
    const repository = inCopy ? await catalogued.copy("copy") : rig.repository;

    await catalogued.start(clone, { uuid: "99999999-2222-4333-8444-555555555555" });
    const ofClone = await catalogued.backup(repository, clone);
    expect(reasonOf(ofClone)).toMatch(/^point \S+ belongs to another machine/);
    expect(await catalogued.checkpoints()).toEqual([first.id, ofClone.id]);
    const again = await catalogued.backup(repository, clone);
    expectIncrement(again, ofClone);
    expect(await catalogued.checkpoints()).toEqual([first.id, again.id]);
    await rig.machine.quit();

    await catalogued.start();
    const second = await catalogued.backup();
    expectIncrement(second, first);
    await catalogued.proveAll();
  });

  it("even with the same uuid: both go on from the point that they have in common", async () => {
    await using catalogued = await Catalogued.begin();
    const { rig } = catalogued;
    const first = await catalogued.backup();
    await catalogued.write();
    await rig.machine.quit();
    const clone = rig.directory.file("clone.qcow2");
    await copyFile(catalogued.image, clone);

    await catalogued.start();
    const second = await catalogued.backup();
    expectIncrement(second, first);
    await rig.machine.quit();

    await catalogued.start(clone);
    const ofClone = await catalogued.backup(rig.repository, clone);
    expectIncrement(ofClone, first);
    await rig.machine.quit();

    await catalogued.start();
    const third = await catalogued.backup();
    expectIncrement(third, second);
    await catalogued.proveAll();
  });
});
