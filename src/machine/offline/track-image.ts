import type { IoOptions } from "../../bytes/index.js";
import { UsageError } from "../../errors/index.js";
import { formatBitmapName, parseBitmapName, type BitmapIdentity } from "../../point/index.js";
import { DEFAULT_CLUSTER_SIZE } from "../../qcow2/index.js";
import type { BlockNode, QmpClient } from "../../qmp/index.js";
import { granularityOf } from "../checkpoints/own-bitmap.js";
import { removeBitmaps } from "../teardown/teardown.js";
import { openImage } from "./offline-image.js";
import { STORAGE_DAEMON, StorageDaemon } from "./storage-daemon.js";

/** How a storage daemon of ours is started. */
export interface DaemonOptions extends IoOptions {
  /** The program; default the one in PATH. */
  readonly storageDaemon?: string | undefined;
}

const NODE = "image";

/**
 * Stores a checkpoint in a qcow2 image that holds just what its point does: from now on QEMU records what is written.
 *
 * @throws {TidemarkError} TM_STORAGE_DAEMON when the daemon does not end in order: the checkpoint is not stored
 */
export async function trackImage(
  file: string,
  checkpoint: BitmapIdentity,
  options: DaemonOptions = {},
): Promise<void> {
  const { storageDaemon = STORAGE_DAEMON, signal } = options;
  const daemon = await StorageDaemon.start(storageDaemon, { signal });
  try {
    await openImage(daemon.qmp, { file, node: NODE }, "qcow2", { signal });
    await addCheckpoint(daemon.qmp, NODE, checkpoint, { signal });
    await daemon.stop();
  } finally {
    await daemon[Symbol.asyncDispose]();
  }
}

/** Whether a storage daemon can be started, before long work that ends with one. @throws {NotFoundError} if not */
export async function requireStorageDaemon(options: DaemonOptions = {}): Promise<void> {
  const { storageDaemon = STORAGE_DAEMON, signal } = options;
  await (await StorageDaemon.start(storageDaemon, { signal })).stop();
}

/** Adds a checkpoint's bitmap to an open image: persistent, recording, empty. */
export async function addCheckpoint(
  qmp: QmpClient,
  node: string,
  checkpoint: BitmapIdentity,
  io: IoOptions = {},
): Promise<void> {
  const holder = (await nodesOf(qmp, io)).find(({ name }) => name === node);
  const imageClusterSize = holder?.image.clusterSize ?? 0;
  const granularity = granularityOf({ imageClusterSize }, DEFAULT_CLUSTER_SIZE);
  const data = { node, name: formatBitmapName(checkpoint), persistent: true, granularity };
  await qmp.execute("transaction", { actions: [{ type: "block-dirty-bitmap-add", data }] }, io);
}

/**
 * Whether an open image can hold a checkpoint of a repository as its newest one. Changes nothing.
 *
 * @throws {UsageError} when it cannot store bitmaps, or one of its backing images has some, where they cannot be removed
 */
export async function requireTrackable(
  qmp: QmpClient,
  node: string,
  repositoryTag: string,
  io: IoOptions = {},
): Promise<void> {
  const nodes = await nodesOf(qmp, io);
  const holder = nodes.find(({ name }) => name === node);
  if (holder?.image.compat === "0.10") {
    throw new UsageError(`Cannot leave a checkpoint in ${holder.file}: qcow2 of version 2 stores none`, {
      hint: "Upgrade it with qemu-img amend -o compat=1.1, or leave out --track",
    });
  }
  const below = checkpointsIn(nodes, repositoryTag).find((bitmap) => bitmap.node !== node);
  if (below === undefined) return;
  throw new UsageError(
    `Cannot leave a checkpoint in ${holder?.file ?? node}: its backing image ${below.file} has others of this repository`,
    { hint: "Restore to a new file, or leave out --track" },
  );
}

/**
 * Removes a repository's checkpoints from an open image that is to hold another one. They would not lie, since they record
 * what is written; but the newest of them, and not that one, would be what the next backup continues.
 */
export async function removeCheckpoints(
  qmp: QmpClient,
  repositoryTag: string,
  io: IoOptions = {},
): Promise<void> {
  await removeBitmaps(qmp, checkpointsIn(await nodesOf(qmp, io), repositoryTag));
}

function checkpointsIn(
  nodes: readonly BlockNode[],
  repositoryTag: string,
): { readonly node: string; readonly name: string; readonly file: string }[] {
  return nodes.flatMap(({ name, file, bitmaps }) =>
    bitmaps
      .filter((bitmap) => parseBitmapName(bitmap.name)?.repository === repositoryTag)
      .map((bitmap) => ({ node: name, name: bitmap.name, file })),
  );
}

async function nodesOf(qmp: QmpClient, io: IoOptions): Promise<readonly BlockNode[]> {
  return await qmp.execute("query-named-block-nodes", { flat: true }, io);
}
