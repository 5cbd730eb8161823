import { dirname } from "node:path";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from "vitest";
import { pointOf } from "../support/rig.js";
import { waitForGuards } from "../support/guards.js";
import { filesOfOurs } from "../interop/machine-fixture.js";
import { GuardedRig } from "./guard-fixture.js";

const MiB = 1024 * 1024;

describe("a backup whose machine ends under it", () => {
  let guarded: GuardedRig;

  beforeEach(async () => {
    guarded = await GuardedRig.create({ iothread: true }, undefined, 24 * MiB);
  }, 60_000);

  afterEach(async () => {
    await guarded[Symbol.asyncDispose]();
  });

  it.each([
    {
      how: "is shut down",
      ends: {
        code: "TM_SNAPSHOT_LOST",
        message: expect.stringContaining("was shut down meanwhile") as string,
      },
      lost: [false, true],
    },
    { how: "is killed", ends: { code: "TM_QMP_CLOSED" }, lost: [true, true] },
  ])(
    "$how: says so within seconds, leaves nothing, and the next backup is right",
    async ({ how, ends, lost }) => {
      const { rig, images } = guarded;
      await rig.machine.qemuIo("vda", "write -P 7 6M 16M");
      // Straight to QEMU: a proxy would go on answering for a monitor that is gone.
      await using running = await guarded.startCopying(["--qmp", rig.machine.qmp]);
      const started = performance.now();
      await (how === "is killed" ? rig.machine.kill() : rig.machine.quit());
      const result = await running.ended;
      expect(performance.now() - started).toBeLessThan(10_000);
      expect(result.code).toBe(1);
      const last = result.events().at(-1);
      expect(last).toMatchObject({
        event: "error",
        exitCode: 1,
        hint: expect.any(String) as string,
        ...ends,
      });
      await waitForGuards(rig, 0);
      const files = await filesOfOurs(rig.directory.path, rig.machine.directory, dirname(rig.proxy.socket));
      expect(files.filter((name) => !name.startsWith("repository/"))).toEqual([]);

      await rig.start(
        [
          { path: images["vda"] ?? "", format: "qcow2", id: "vda", iothread: true },
          { path: images["vdb"] ?? "", format: "raw", id: "vdb", iothread: true },
        ],
        { guest: { trailBlocks: 48, stepsPerTick: 16 } },
      );
      await rig.machine.waitForGuestWriting(60);
      const next = pointOf((await rig.tidemark(rig.backupArguments())).events());
      // A raw image stores no bitmap; QEMU stores none when it is killed. The reason tells.
      expect(next.disks.map(({ reason }) => reason !== null)).toEqual(lost);
      await guarded.expectRight(next.id);
    },
  );
});

describe("a backup beside which a disk is changed", () => {
  let guarded: GuardedRig;

  beforeAll(async () => {
    guarded = await GuardedRig.create({ iothread: false }, undefined, 24 * MiB);
  }, 60_000);

  afterAll(async () => {
    await guarded[Symbol.asyncDispose]();
  });

  it("resized between the plan and the freeze: refused by its name, and the next one has the new size", async () => {
    const { rig } = guarded;
    const hook = rig.proxy.onCommand("blockdev-create", async () => {
      if (hook.fired === 1)
        await rig.machine.monitor.execute("block_resize", { "node-name": "node0", size: 28 * MiB });
      return undefined;
    });
    const result = await guarded.start().ended;
    hook.remove();
    expect(hook.fired).toBeGreaterThan(0);
    expect(result.code).toBe(5);
    expect(result.events().at(-1)).toMatchObject({ message: expect.stringContaining("vda") as string });
    await guarded.expectNothingLeft();
    await guarded.expectNextRight();
  });

  it("resized while it is read: QEMU refuses, the backup goes on and is right", async () => {
    const { rig } = guarded;
    await rig.machine.qemuIo("vda", "write -P 9 6M 6M");
    await using running = await guarded.startCopying();
    const resize = rig.machine.monitor.execute("block_resize", { "node-name": "node0", size: 32 * MiB });
    await expect(resize).rejects.toThrow(/in use|busy/i);
    const result = await running.ended;
    expect(result.code).toBe(0);
    await guarded.expectRight(pointOf(result.events()).id);
  });
});
