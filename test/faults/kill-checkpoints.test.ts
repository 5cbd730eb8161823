import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { BackupStep } from "../../src/flow/index.js";
import { atStep } from "../support/steps.js";
import { GuardedRig, isLong } from "./guard-fixture.js";

const KEPT = 3;
const KEEP = ["--keep-checkpoints", String(KEPT)];

/** Around what decides about checkpoints: they are made, their point is written, the surplus goes. */
const STEPS: readonly BackupStep[] = isLong
  ? ["frozen", "manifest written", "committed", "bitmaps removed"]
  : ["committed"];

/** Ids of the checkpoints that a disk carries, the newest first. */
async function checkpointsOf({ rig }: GuardedRig): Promise<string[][]> {
  const args = ["status", "--qmp", rig.proxy.socket, "--machine", "vm", "--repo", rig.repository, "--json"];
  const { disks } = (await rig.tidemark(args)).json() as { disks: { checkpoints: { id: string }[] }[] };
  return disks.map(({ checkpoints }) =>
    checkpoints
      .map(({ id }) => id)
      .sort()
      .reverse(),
  );
}

async function pointsOf({ rig }: GuardedRig): Promise<string[]> {
  const list = (await rig.tidemark(["list", "vm", "--repo", rig.repository, "--json"])).json() as {
    id: string;
  }[];
  return list.map(({ id }) => id).reverse();
}

describe("SIGKILL of a backup that keeps checkpoints", () => {
  let guarded: GuardedRig;

  beforeAll(async () => {
    guarded = await GuardedRig.create({ iothread: false });
    for (let made = 0; made < KEPT; made += 1) await guarded.rig.backup(KEEP);
  }, 120_000);

  afterAll(async () => {
    await guarded[Symbol.asyncDispose]();
  });

  it.each(STEPS.map((name) => ({ name })))(
    "at $name: those that are kept stay, the surplus goes, differentials of the oldest are right",
    async ({ name }) => {
      const { rig } = guarded;
      // It keeps another number: what counts is what became of its point.
      const extra = name === "frozen" ? [] : ["--keep-checkpoints", "2"];
      await rig.machine.waitForGuestWriting(60);
      await using running = guarded.start(extra, atStep(name));
      expect(await running.ended).toMatchObject({ signal: "SIGKILL" });
      await guarded.expectNothingLeft();
      const points = await pointsOf(guarded);
      const isCommitted = name !== "frozen";
      const before = await checkpointsOf(guarded);
      // The kill came before the surplus went, or after.
      const expected = { frozen: KEPT + 1, "bitmaps removed": 2 }[name as string] ?? KEPT + 1;
      expect(before.map(({ length }) => length)).toEqual([expected, expected]);

      await rig.tidemark(["cleanup", "--qmp", rig.proxy.socket, "--machine", "vm", "--repo", rig.repository]);
      const kept = isCommitted ? points.slice(0, 2) : points.slice(0, KEPT);
      const after = await checkpointsOf(guarded);
      // One whose point never came to be goes only when a later point is there.
      expect(after.map((ids) => ids.filter((id) => points.includes(id)))).toEqual([kept, kept]);
      expect(after.map(({ length }) => length)).toEqual(isCommitted ? [2, 2] : [KEPT + 1, KEPT + 1]);

      const oldest = kept.at(-1)!;
      const differential = await rig.backup([...KEEP, "--since", oldest]);
      expect(differential.disks.map(({ parent, reason }) => [parent, reason])).toEqual([
        [oldest, null],
        [oldest, null],
      ]);
      await guarded.expectRight(differential.id);
      await guarded.expectNothingLeft();
      await rig.backup(KEEP);
      const newest = (await pointsOf(guarded)).slice(0, KEPT);
      expect(await checkpointsOf(guarded)).toEqual([newest, newest]);
    },
  );
});
