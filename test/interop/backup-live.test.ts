import { describe, expect, it } from "vitest";
import { readCounter, readTrail } from "../support/guest.js";
import { Rig } from "../support/rig.js";

const MiB = 1024 * 1024;

describe("backup of a live machine", () => {
  it("restores every point to what the disks held at its freeze, all disks at the same instant", async () => {
    await using rig = await Rig.create();
    const a = await rig.image("a.qcow2", "qcow2", 24 * MiB);
    const b = await rig.image("b.raw", "raw", 20 * MiB);
    const machine = await rig.start(
      [
        { path: a, format: "qcow2" },
        { path: b, format: "raw" },
      ],
      { guest: "counter", deadline: 400_000 },
    );
    await machine.waitForGuestWriting(8);

    let before = 0;
    for (let round = 0; round < 20; round += 1) {
      const point = await rig.backup();
      const kind = round === 0 ? "full" : "incremental";
      expect(point.disks.map((disk) => disk.kind)).toEqual([kind, kind]);
      expect(await rig.verify(point, { vd0: a, vd1: b })).toEqual({ vd0: "identical", vd1: "identical" });
      const restored = await rig.restore(point);
      const first = await readTrail(`${restored}/vd0.raw`);
      const second = await readTrail(`${restored}/vd1.raw`);
      expect([0, 1]).toContain(first - second);
      expect(first).toBe(await readCounter(rig.reference(point, a)));
      expect(first).toBeGreaterThan(before);
      before = first;
      await machine.waitForGuestWriting(8);
    }
  }, 400_000);
});
