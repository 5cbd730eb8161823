import { describe, expect, it } from "vitest";
import type { FreezeBase, SourceDisk } from "../source.js";
import { freezeActions } from "./transaction.js";

const disk = (node: string, canPersist: boolean): SourceDisk => ({
  ...{ name: node, suggestedName: node, anonymous: false, qdev: node, deviceId: node, driveId: null, node },
  ...{ virtualSize: 1, format: "qcow2", imageFile: null, canPersist, imageClusterSize: 65536, bitmaps: [] },
  backing: [],
});

const base = (node: string, name: string): FreezeBase => ({ node, name });

describe("freezeActions()", () => {
  it("adds all new bitmaps, then starts all jobs, then merges the bases", () => {
    const actions = freezeActions(
      {
        checkpoint: "20261120T065009123Z-4f2a91",
        repositoryTag: "0a1b2c3d",
        maxConnections: 1,
        disks: [
          { disk: disk("d0", true), token: "00000000", base: base("d0", "old0"), clusterSize: 65536 },
          { disk: disk("d1", false), token: "11111111", clusterSize: 65536 },
          { disk: disk("d2", true), token: "22222222", base: base("b2", "old2"), clusterSize: 65536 },
        ],
      },
      "deadbeef",
    );
    const NEW = "tidemark-0a1b2c3d-20261120T065009123Z-4f2a91";
    const bitmap = { granularity: 65536 };
    const job = (number: number) => ({
      type: "blockdev-backup",
      data: {
        "job-id": `tm-deadbeef-${number}-job`,
        device: `d${number}`,
        target: `tm-deadbeef-${number}-scr`,
        sync: "none",
        "auto-dismiss": false,
      },
    });
    const changes = (number: number, base: unknown) => {
      const node = `d${number}`;
      const name = `tm-deadbeef-${number}-tmp`;
      return [
        {
          type: "block-dirty-bitmap-add",
          data: { node, name, persistent: false, disabled: true, ...bitmap },
        },
        { type: "block-dirty-bitmap-merge", data: { node, target: name, bitmaps: [base] } },
      ];
    };
    const added = (number: number, name: string, persistent: boolean) => ({
      type: "block-dirty-bitmap-add",
      data: { node: `d${number}`, name, persistent, ...bitmap },
    });
    expect(actions).toEqual([
      added(0, `${NEW}-00000000`, true),
      added(1, `${NEW}-11111111`, false),
      added(2, `${NEW}-22222222`, true),
      ...[job(0), job(1), job(2)],
      ...changes(0, "old0"),
      ...changes(2, { node: "b2", name: "old2" }),
    ]);
  });
});
