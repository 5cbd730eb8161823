import { randomInt } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { GuardedRig, isLong } from "./guard-fixture.js";

/** The long version tries many. */
const INSTANTS = isLong ? 100 : 7;

describe.each([{ iothread: true }, { iothread: false }])(
  "SIGKILL of the agent, iothread: $iothread",
  (kind) => {
    it(`at ${INSTANTS} random instants`, { timeout: 60_000 + INSTANTS * 10_000 }, async () => {
      await using guarded = await GuardedRig.create(kind);
      let killed = 0;
      for (let round = 0; round < INSTANTS; round += 1) {
        await using running = guarded.start(["--bandwidth", "1MiB/s"]);
        await sleep(randomInt(2000));
        running.kill("SIGKILL");
        if ((await running.ended).signal === "SIGKILL") killed += 1;
        await guarded.expectNothingLeft({ mayLeaveRecord: true });
        await guarded.expectNextRight();
        await guarded.expectNothingLeft();
      }
      // On a quick host some backups end before.
      expect(killed).toBeGreaterThan(INSTANTS / 3);
    });
  },
);
