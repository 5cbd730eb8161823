import { formatBitmapName, formatRunObject } from "../../point/index.js";
import type { TransactionAction } from "../../qmp/index.js";
import { granularityOf } from "../checkpoints/own-bitmap.js";
import type { FreezeRequest } from "../source.js";

/**
 * The actions of a freeze, in the order that loses nothing: all new bitmaps, then all backup jobs, then all
 * transient bitmaps with what the bases hold.
 *
 * Only `blockdev-backup` holds its disk's drain. On a disk in an iothread the guest may write between two
 * actions before it: with the merge first, that write is neither in the merged copy nor after the freeze,
 * and its block is missing from the increment. After the jobs all disks stand still until the end of the
 * transaction. The new bitmaps come first: what they record from before the freeze is only too much.
 */
export function freezeActions(request: FreezeRequest, run: string): TransactionAction[] {
  const { checkpoint, repositoryTag, disks } = request;
  const added = disks.map(({ disk, token, clusterSize }): TransactionAction => {
    const name = formatBitmapName({ repository: repositoryTag, checkpoint, token });
    const data = {
      node: disk.node,
      name,
      granularity: granularityOf(disk, clusterSize),
      persistent: disk.canPersist,
    };
    return { type: "block-dirty-bitmap-add", data };
  });
  const backups = disks.map(({ disk }, number): TransactionAction => {
    const data = {
      "job-id": formatRunObject({ run, disk: number, kind: "job" }),
      device: disk.node,
      target: formatRunObject({ run, disk: number, kind: "scr" }),
      sync: "none",
      "auto-dismiss": false,
    } as const;
    return { type: "blockdev-backup", data };
  });
  const changes = disks.flatMap(({ disk, base, clusterSize }, number): TransactionAction[] => {
    if (base === undefined) return [];
    const { node } = disk;
    const name = formatRunObject({ run, disk: number, kind: "tmp" });
    const held = disk.bitmaps.find((bitmap) => bitmap.name === base.name && bitmap.node === base.node);
    // Equal granularities: not every QEMU merges others.
    const granularity = held?.granularity ?? granularityOf(disk, clusterSize);
    const transient = { persistent: false, disabled: true, granularity };
    const source = base.node === node ? base.name : base;
    return [
      { type: "block-dirty-bitmap-add", data: { node, name, ...transient } },
      { type: "block-dirty-bitmap-merge", data: { node, target: name, bitmaps: [source] } },
    ];
  });
  return [...added, ...backups, ...changes];
}
