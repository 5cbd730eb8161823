import { describe, expect, it } from "vitest";
import { UsageError } from "../../errors/index.js";
import { chooseDisks, suggestNames } from "./select.js";

function disk(changes: { deviceId?: string; driveId?: string; qdev?: string; nodes?: string[] }) {
  const names = { deviceId: null, driveId: null, qdev: null, nodes: [], ...changes };
  return { ...names, suggestedName: changes.deviceId ?? changes.driveId ?? "disk0" };
}

describe("suggestNames()", () => {
  it("takes the device id, else the drive id, else the position", () => {
    const named = suggestNames([
      { deviceId: "vda", driveId: "d0" },
      { deviceId: null, driveId: "d1" },
      { deviceId: null, driveId: null },
    ]);
    expect(named).toEqual([
      { name: "vda", anonymous: false },
      { name: "d1", anonymous: false },
      { name: "disk2", anonymous: true },
    ]);
  });

  it("takes a drive id that QEMU made up for a position", () => {
    const named = suggestNames([
      { deviceId: null, driveId: "virtio0" },
      { deviceId: null, driveId: "ide1-hd0" },
      { deviceId: "virtio1", driveId: "virtio1" },
      { deviceId: null, driveId: "pflash1" },
    ]);
    expect(named.map(({ anonymous }) => anonymous)).toEqual([true, true, false, false]);
    expect(named.map(({ name }) => name)).toEqual(["virtio0", "ide1-hd0", "virtio1", "pflash1"]);
  });

  it("never gives one name twice, nor one that is no name", () => {
    const named = suggestNames([
      { deviceId: "disk1", driveId: null },
      { deviceId: null, driveId: null },
      { deviceId: null, driveId: "disk1" },
      { deviceId: "x".repeat(65), driveId: "../up" },
    ]).map(({ name }) => name);
    expect(new Set(named).size).toBe(4);
    expect(named).toEqual(["disk1", "disk2", "disk3", "disk4"]);
  });
});

describe("chooseDisks()", () => {
  const disks = [
    disk({ deviceId: "vda", qdev: "/machine/peripheral/vda/virtio-backend", nodes: ["n0", "filter0"] }),
    disk({ driveId: "data", qdev: "/machine/peripheral-anon/device[0]", nodes: ["#block17"] }),
  ];

  it("takes all without a choice", () => {
    expect(chooseDisks(disks, undefined).map(({ name }) => name)).toEqual(["vda", "data"]);
  });

  it.each([...["vda", "n0", "filter0", "/machine/peripheral/vda/virtio-backend", "/machine/peripheral/vda"]])(
    "knows a disk as %s",
    (device) => {
      expect(chooseDisks(disks, [{ device, name: "root" }])).toMatchObject([
        { deviceId: "vda", name: "root" },
      ]);
    },
  );

  it("knows a SCSI disk, which QEMU names by its id alone, by its path", () => {
    const scsi = [...disks, disk({ deviceId: "sda", qdev: "sda" })];
    const chosen = chooseDisks(scsi, [{ device: "/machine/peripheral/sda" }]);
    expect(chosen.map(({ name }) => name)).toEqual(["sda"]);
  });

  it.each([
    [[{ device: "sdx" }], /no disk "sdx"/],
    [[{ device: "vda" }, { device: "n0" }], /"vda" and "n0" are the same disk/],
    [[{ device: "vda", name: "data" }, { device: "data" }], /Two disks would have the name "data"/],
    [[{ device: "vda", name: "../up" }], /cannot be the name of a disk/],
  ])("refuses %j", (choices, message) => {
    expect(() => chooseDisks(disks, choices)).toThrow(message);
    expect(() => chooseDisks(disks, choices)).toThrow(UsageError);
  });
});
