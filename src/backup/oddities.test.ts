import { describe, expect, it } from "vitest";
import type { PointManifest } from "../repository/index.js";
import type { DiskPlan } from "./disk-plan.js";
import { oddities } from "./oddities.js";

const plan = (name: string, token: string, virtualSize: number): DiskPlan =>
  ({ name, token, disk: { virtualSize } }) as DiskPlan;
const before = {
  disks: [
    { name: "vda", token: "1", virtualSize: 65_536 },
    { name: "vdb", token: "2", virtualSize: 1024 },
  ],
} as unknown as PointManifest;

describe("oddities()", () => {
  it("says nothing of disks that are as before, grown, renamed or new", () => {
    expect(
      oddities([plan("vda", "1", 65_536), plan("data", "2", 4096), plan("vdc", "3", 0)], before),
    ).toEqual([]);
    expect(oddities([plan("vda", "1", 0)], undefined)).toEqual([]);
  });

  it("says which disks are missing, and which have shrunk, by token or by name", () => {
    expect(oddities([plan("root", "1", 512)], before)).toEqual([
      'This point lacks "vdb", which the point before it has',
      'Disk "root" has shrunk to 512 B from the 64.0 KiB of the point before: is it the right one?',
    ]);
    expect(oddities([plan("vda", "9", 0), plan("vdb", "2", 1024)], before)).toHaveLength(1);
  });
});
