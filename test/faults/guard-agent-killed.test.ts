import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { waitForGuards } from "../support/guards.js";
import type { ProxiedCommand } from "../support/qmp-proxy.js";
import { GuardedRig, isFreeze, isLong, isRemoval } from "./guard-fixture.js";

/** A moment of a backup: before QEMU gets a command, or after its answer. */
interface Moment {
  readonly when: "before" | "after";
  readonly what: string;
  /** Which of them, from 1; default the first. */
  readonly nth?: number;
  /** Default: the command of that name. */
  readonly is?: (command: ProxiedCommand) => boolean;
}

const MOMENTS: readonly Moment[] = [
  { when: "before", what: "blockdev-create" },
  { when: "after", what: "blockdev-create", nth: 2 },
  { when: "after", what: "blockdev-add", nth: 3 },
  { when: "before", what: "nbd-server-start" },
  { when: "after", what: "nbd-server-start" },
  { when: "after", what: "block-set-write-threshold" },
  { when: "before", what: "the freeze", is: isFreeze },
  { when: "after", what: "the freeze", is: isFreeze },
  { when: "before", what: "block-export-add" },
  { when: "after", what: "block-export-add", nth: 2 },
  { when: "before", what: "block-export-del" },
  { when: "after", what: "block-export-del" },
  { when: "before", what: "nbd-server-stop" },
  { when: "after", what: "nbd-server-stop" },
  { when: "after", what: "job-cancel" },
  { when: "before", what: "job-dismiss", nth: 6 },
  { when: "after", what: "blockdev-del" },
  { when: "before", what: "the removal of bitmaps", is: isRemoval },
  { when: "after", what: "the removal of bitmaps", is: isRemoval },
];

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

    // Without an iothread the teardown is the same: every fourth moment will do.
    const moments = MOMENTS.filter((_moment, index) => isLong || kind.iothread || index % 4 === 3);

    it.each(moments.map(({ nth = 1, ...moment }) => ({ ...moment, nth })))(
      "$when $what ($nth): the machine lives, nothing is left, the next increment is right",
      async ({ when, what, nth, is = ({ name }) => name === what }) => {
        const { proxy } = guarded.rig;
        await using running = guarded.start();
        let seen = 0;
        let isFrozen = false;
        const hook = proxy.onCommand(
          "*",
          async (command) => {
            // A run before may have left bitmaps for this one to remove.
            isFrozen ||= isFreeze(command);
            if (!is(command) || (isRemoval(command) && !isFrozen)) return undefined;
            seen += 1;
            if (seen !== nth) return undefined;
            running.kill("SIGKILL");
            await running.ended;
            return undefined;
          },
          when,
        );
        expect(await running.ended).toMatchObject({ signal: "SIGKILL" });
        hook.remove();
        expect(seen).toBe(nth);
        await guarded.expectNothingLeft();
        await guarded.expectNextRight();
      },
    );

    it("while one guard relieves another", async () => {
      await using running = guarded.start();
      await waitForGuards(guarded.rig, 2);
      running.kill("SIGKILL");
      expect(await running.ended).toMatchObject({ signal: "SIGKILL" });
      await guarded.expectNothingLeft();
      await guarded.expectNextRight();
    });

    it("while data is read", async () => {
      await using running = await guarded.startCopying();
      running.kill("SIGKILL");
      expect(await running.ended).toMatchObject({ signal: "SIGKILL" });
      await guarded.expectNothingLeft();
      await guarded.expectNextRight();
    });
  },
);
