import { randomInt } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { BackupStep } from "../../src/flow/index.js";
import { atStep } from "../support/steps.js";
import { GuardedRig, isLong } from "./guard-fixture.js";

/** Every step of a backup, and how often it comes by there at least. */
const STEPS: Readonly<Record<Exclude<BackupStep, "guard takes over">, number>> = {
  "machine locked": 1,
  "machine opened": 1,
  "repository locked": 1,
  cleaned: 1,
  planned: 1,
  // The second one holds the NBD connections.
  "guard spawned": 2,
  "guard holds": 2,
  "guard recorded": 2,
  "guard started": 1,
  "scratch planned": 1,
  "scratch made": 1,
  "server started": 1,
  "scratch watched": 1,
  "before the freeze": 1,
  frozen: 1,
  exported: 1,
  "connections open": 1,
  "connections held": 1,
  negotiated: 1,
  reading: 2,
  "all read": 1,
  "exports deleted": 1,
  "connections closed": 1,
  "server stopped": 1,
  "jobs ended": 1,
  "nodes deleted": 1,
  "files deleted": 1,
  released: 1,
  "images finished": 1,
  "before the manifest": 1,
  "manifest written": 1,
  committed: 1,
  "bitmaps removed": 1,
  "monitor left": 1,
  "machine unlocked": 1,
  "guard dismissed": 1,
  "repository unlocked": 1,
};

const PLACES = (Object.keys(STEPS) as (keyof typeof STEPS)[]).flatMap((name) =>
  Array.from({ length: STEPS[name] }, (_time, index) => ({ name, nth: index + 1 })),
);

/** A guard that is not there yet cannot take the state file away. */
const BEFORE_GUARD: readonly BackupStep[] = [
  ...(["machine locked", "machine opened", "repository locked"] as const),
  ...(["cleaned", "planned", "guard spawned"] as const),
];

/** The long version tries many, on both kinds of machine. */
const INSTANTS = isLong ? 100 : 3;

describe.each([{ iothread: true }, { iothread: false }])(
  "SIGKILL of the agent, iothread: $iothread",
  (kind) => {
    let guarded: GuardedRig;

    beforeAll(async () => {
      guarded = await GuardedRig.create(kind);
    }, 60_000);

    afterAll(async () => {
      await guarded[Symbol.asyncDispose]();
    });

    const places = PLACES.filter((_place, index) => isLong || (index % 2 === 0) === kind.iothread);

    it.each(places)(
      "at $name ($nth): the machine lives, nothing is left, the next increment is right",
      async ({ name, nth }) => {
        await guarded.rig.machine.waitForGuestWriting(100);
        await using running = guarded.start([], atStep(name, { nth }));
        expect(await running.ended).toMatchObject({ signal: "SIGKILL" });
        await guarded.expectNothingLeft({ mayLeaveRecord: nth === 1 && BEFORE_GUARD.includes(name) });
        await guarded.expectNextRight({ restore: isLong });
        await guarded.expectNothingLeft();
      },
    );

    it(`at ${INSTANTS} random instants`, { timeout: 60_000 + INSTANTS * 15_000 }, async () => {
      let killed = 0;
      for (let round = 0; round < INSTANTS;) {
        // QEMU's tools open chains of some 130 points at most: a new one begins in time.
        await using fresh = await GuardedRig.create(kind);
        for (let point = 0; point < 25 && round < INSTANTS; point += 1, round += 1) {
          await using running = fresh.start(["--bandwidth", "1MiB/s"]);
          await sleep(randomInt(2000));
          running.kill("SIGKILL");
          if ((await running.ended).signal === "SIGKILL") killed += 1;
          await fresh.expectNothingLeft({ mayLeaveRecord: true });
          await fresh.expectNextRight();
          await fresh.expectNothingLeft();
        }
      }
      // On a quick host some backups end before.
      expect(killed).toBeGreaterThan(INSTANTS / 4);
    });
  },
);
