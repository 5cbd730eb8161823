import { describe, expect, it } from "vitest";
import type { BlockNode } from "../../qmp/index.js";
import { sortInventory } from "./leftovers.js";

function node(name: string, bitmaps: readonly string[] = [], changes: Partial<BlockNode> = {}): BlockNode {
  return {
    name,
    driver: "qcow2",
    readOnly: false,
    file: `/x/${name}`,
    image: { virtualSize: 1, format: "qcow2", filename: "", compat: undefined, clusterSize: 0 },
    bitmaps: bitmaps.map((bitmap) => ({
      ...{ name: bitmap, count: 0, granularity: 65536, recording: true },
      ...{ busy: false, persistent: false, inconsistent: false },
    })),
    ...changes,
  };
}

describe("sortInventory()", () => {
  it("sorts what bears a run's name by run, and takes nothing else", () => {
    const { runs, foreignExports } = sortInventory(
      [
        { id: "tm-aaaaaaaa-0-exp", type: "nbd", nodeName: "", shuttingDown: false },
        { id: "theirs", type: "nbd", nodeName: "", shuttingDown: false },
        { id: "vhost", type: "vhost-user-blk", nodeName: "", shuttingDown: false },
        { id: "tm-aaaaaaaa-0-exp2", type: "nbd", nodeName: "", shuttingDown: false },
      ],
      [
        { id: "tm-aaaaaaaa-0-job", type: "backup", status: "running", error: undefined },
        { id: "tm-bbbbbbbb-1-new", type: "create", status: "concluded", error: undefined },
        { id: "tm-mine", type: "backup", status: "running", error: undefined },
      ],
      [
        node("tm-aaaaaaaa-0-file"),
        node("tm-aaaaaaaa-0-scr"),
        node("disk", ["tm-aaaaaaaa-0-tmp", "tm-x", "tidemark-0a1b2c3d-20261120T065009123Z-4f2a91-00000000"]),
      ],
    );
    expect(runs).toEqual([
      {
        run: "aaaaaaaa",
        exports: ["tm-aaaaaaaa-0-exp"],
        jobs: ["tm-aaaaaaaa-0-job"],
        nodes: ["tm-aaaaaaaa-0-scr", "tm-aaaaaaaa-0-file"],
        files: ["/x/tm-aaaaaaaa-0-file"],
        bitmaps: [{ node: "disk", name: "tm-aaaaaaaa-0-tmp" }],
      },
      { run: "bbbbbbbb", exports: [], jobs: ["tm-bbbbbbbb-1-new"], nodes: [], files: [], bitmaps: [] },
    ]);
    expect(foreignExports).toEqual(["theirs", "tm-aaaaaaaa-0-exp2"]);
  });
});
