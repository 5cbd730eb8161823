import { access } from "node:fs/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { withDeadline, type StepName } from "../../src/flow/index.js";
import { NOTHING, residueOf } from "../interop/machine-fixture.js";
import { waitForGuards } from "../support/guards.js";
import { pointOf } from "../support/rig.js";
import { atStep, type AtStep } from "../support/steps.js";
import { GuardedRig, isLong } from "./guard-fixture.js";

/** Steps while a guard is there, up to the one at which the point is safe whatever happens to the machine. */
const UNDER_WAY: readonly StepName[] = [
  ...(["guard recorded", "guard started", "scratch planned", "scratch made", "server started"] as const),
  ...(["scratch watched", "before the freeze", "frozen", "exported", "connections open"] as const),
  ...(["connections held", "negotiated", "reading", "all read"] as const),
];
/** The frozen point is being taken down: no client can hurt the machine any more. */
const TAKEN_DOWN: readonly StepName[] = [
  ...(["exports deleted", "connections closed", "server stopped", "jobs ended", "nodes deleted"] as const),
  "files deleted",
];
const AT_THE_END: readonly StepName[] = [
  ...(["released", "images finished", "before the manifest", "manifest written", "committed"] as const),
  ...(["bitmaps removed", "monitor left"] as const),
];

const KINDS = [{ iothread: true }, { iothread: false }];

/** Some for every run, all for the long one. */
function choose(short: readonly StepName[], long: readonly StepName[]): { name: StepName }[] {
  return (isLong ? long : short).map((name) => ({ name }));
}

describe.each(KINDS)("with iothread: $iothread", (kind) => {
  let guarded: GuardedRig;

  beforeAll(async () => {
    guarded = await GuardedRig.create(kind);
  }, 60_000);

  afterAll(async () => {
    await guarded[Symbol.asyncDispose]();
  });

  /** The environment, and a check that it had its effect. */
  function at(
    name: StepName,
    options: AtStep,
  ): { env: Record<string, string>; expectDone: () => Promise<void> } {
    const mark = guarded.rig.directory.file(`mark-${Math.random()}`);
    return { env: atStep(name, { ...options, mark }), expectDone: () => access(mark) };
  }

  describe("SIGKILL of the guard", () => {
    const short = kind.iothread ? (["frozen", "reading"] as const) : (["exports deleted"] as const);

    it.each(choose(short, [...UNDER_WAY, ...TAKEN_DOWN, ...AT_THE_END]))(
      "at $name: the backup ends well",
      async ({ name }) => {
        const { env, expectDone } = at(name, { action: "kill-guard" });
        await using running = guarded.start([], env);
        const result = await running.ended;
        expect(result).toMatchObject({ code: 0 });
        await expectDone();
        await guarded.expectRight(pointOf(result.events()).id, { restore: isLong });
        await guarded.expectNothingLeft();
      },
    );
  });

  describe("SIGKILL of agent and guard at once", () => {
    // With disks in iothreads QEMU 7.2 may abort as long as there are clients: nobody is left who could prevent it.
    const short = kind.iothread ? (["connections closed"] as const) : (["frozen", "reading"] as const);
    const long = [...(kind.iothread ? TAKEN_DOWN : [...UNDER_WAY, ...TAKEN_DOWN]), ...AT_THE_END];

    it.each(choose(short, long))(
      "at $name: the next backup cleans up by itself, and is right",
      async ({ name }) => {
        const { env, expectDone } = at(name, { action: "kill-both" });
        await using running = guarded.start([], env);
        expect(await running.ended).toMatchObject({ signal: "SIGKILL" });
        await expectDone();
        await guarded.expectNextRight({ restore: isLong });
        await guarded.expectNothingLeft();
      },
    );
  });

  describe("SIGKILL of the agent, then of its guard", () => {
    // Before that, a client that goes may abort QEMU 7.2.
    const long: readonly StepName[] = kind.iothread ? TAKEN_DOWN : ["guard takes over", ...TAKEN_DOWN];

    it.each(choose([kind.iothread ? "exports deleted" : "jobs ended"], long))(
      "at $name: the next backup cleans up by itself, and is right",
      async ({ name }) => {
        const { env, expectDone } = at(name, { role: "guard" });
        await using running = await guarded.startCopying([], env);
        running.kill("SIGKILL");
        await running.ended;
        await waitForGuards(guarded.rig, 0);
        await expectDone();
        await guarded.expectNextRight({ restore: isLong });
        await guarded.expectNothingLeft();
      },
    );
  });

  describe("SIGKILL of QEMU", () => {
    const short = kind.iothread ? (["reading"] as const) : (["frozen", "committed"] as const);

    it.each(choose(short, [...UNDER_WAY, ...TAKEN_DOWN, ...AT_THE_END]))(
      "at $name: agent and guard end within seconds, the next backup of the machine is right",
      async ({ name }) => {
        const { rig } = guarded;
        const { env, expectDone } = at(name, { action: "kill-pid", pid: rig.machine.pid });
        // The proxy outlives the machine: behind it nobody could tell that it is gone.
        await using running = guarded.start(["--qmp", rig.machine.qmp], env);
        const result = await withDeadline(running.ended, 20_000, "Wait for the agent's end");
        await expectDone();
        await waitForGuards(rig, 0);
        // Once all is read, the machine is not needed any more.
        const last = result.events().at(-1);
        if (AT_THE_END.includes(name)) expect(last).toMatchObject({ event: "result" });
        else
          expect(last).toMatchObject({ event: "error", exitCode: 1, message: expect.any(String) as string });
        await guarded.boot();
        const point = await rig.backup();
        // What QEMU did not store is gone: a disk goes on, or says why it does not.
        for (const { kind: kindOfDisk, reason } of point.disks)
          expect(kindOfDisk === "incremental" || reason !== null).toBe(true);
        await guarded.expectRight(point.id);
        await guarded.expectNothingLeft();
        expect({ ...(await residueOf(rig.machine.monitor)), checkpoints: [] }).toEqual(NOTHING);
      },
    );
  });
});
