import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { ProxiedCommand } from "../support/qmp-proxy.js";
import { GuardedRig, isFreeze, isLong, isRemoval } from "./guard-fixture.js";

/** A command of a backup that QEMU gets when the agent is dead already. */
interface Moment {
  readonly what: string;
  /** Which of them, from 1; default the first. */
  readonly nth?: number;
  /** Default: the command of that name. */
  readonly is?: (command: ProxiedCommand) => boolean;
}

const MOMENTS: readonly Moment[] = [
  { what: "blockdev-create", nth: 2 },
  { what: "nbd-server-start" },
  { what: "the freeze", is: isFreeze },
  { what: "block-export-add" },
  { what: "block-export-del" },
  { what: "nbd-server-stop" },
  { what: "job-cancel" },
  { what: "the removal of bitmaps", is: isRemoval },
];

/** Between steps, which have tests of their own: see kill-matrix.test.ts. */
describe.each(isLong ? [{ iothread: true }, { iothread: false }] : [{ iothread: true }])(
  "SIGKILL of the agent with a command under way, iothread: $iothread",
  (kind) => {
    let guarded: GuardedRig;

    beforeAll(async () => {
      guarded = await GuardedRig.create(kind);
    }, 60_000);

    afterAll(async () => {
      await guarded[Symbol.asyncDispose]();
    });

    it.each(MOMENTS.map(({ nth = 1, ...moment }) => ({ ...moment, nth })))(
      "$what ($nth): the machine lives, nothing is left, the next increment is right",
      async ({ what, nth, is = ({ name }) => name === what }) => {
        const { proxy } = guarded.rig;
        await using running = guarded.start();
        let seen = 0;
        let isFrozen = false;
        const hook = proxy.onCommand("*", async (command) => {
          // A run before may have left bitmaps for this one to remove.
          isFrozen ||= isFreeze(command);
          if (!is(command) || (isRemoval(command) && !isFrozen)) return undefined;
          seen += 1;
          if (seen !== nth) return undefined;
          running.kill("SIGKILL");
          await running.ended;
          return undefined;
        });
        expect(await running.ended).toMatchObject({ signal: "SIGKILL" });
        hook.remove();
        expect(seen).toBeGreaterThanOrEqual(nth);
        await guarded.expectNothingLeft();
        await guarded.expectNextRight();
        await guarded.expectNothingLeft();
      },
    );
  },
);
