import { availableParallelism } from "node:os";
import { MiB, type IoOptions } from "../bytes/index.js";
import { NbdServer, type NbdAddress } from "../nbd/index.js";
import type { PointManifest, Repository } from "../repository/index.js";
import { RangeReader } from "../transfer/index.js";
import { ServedDisk } from "./served-disk.js";

/** Bytes of decoded clusters that are kept, for all disks. */
const CACHE_BYTES = 64 * MiB;
const MOST_WORKERS = 4;

/** What is served, and where. */
export interface ServeOptions extends IoOptions {
  readonly repository: Repository;
  readonly point: PointManifest;
  readonly address: NbdAddress;
  /** Connections at a time; default 64. */
  readonly maxConnections?: number | undefined;
  /** Told which reads failed, and what clients did wrong. */
  readonly onProblem?: ((error: unknown) => void) | undefined;
}

/** A point that is being served. */
export interface PointServer extends AsyncDisposable {
  /** Where: with the port that was found, if port 0 was asked for. */
  readonly address: NbdAddress;
  readonly disks: readonly {
    readonly name: string;
    readonly size: number;
    readonly contexts: readonly string[];
  }[];
  /** Hangs up on everybody, and closes what was open. */
  close(): Promise<void>;
}

/**
 * Serves a point's disks over NBD, read-only: one export for each, called as the disk; the first is the default. The
 * point can be rewritten meanwhile; when it is removed, reads fail from then on.
 *
 * @throws {UsageError} when the address cannot be listened at
 * @throws {DamageError} when an image is missing or damaged
 */
export async function servePoint(options: ServeOptions): Promise<PointServer> {
  const { repository, point, address, maxConnections, onProblem, signal } = options;
  const disks: ServedDisk[] = [];
  const ranges = RangeReader.start(Math.min(availableParallelism(), MOST_WORKERS));
  const closeDisks = async (): Promise<void> => {
    await Promise.all(disks.map((disk) => disk.close()));
    await ranges.stop();
  };
  const shared = { repository, ranges, cacheBytes: Math.floor(CACHE_BYTES / point.disks.length) };
  try {
    for (const { name } of point.disks) disks.push(await ServedDisk.open(point, name, shared, { signal }));
    const server = await NbdServer.listen(address, { exports: disks, maxConnections, onProblem });
    const close = async (): Promise<void> => {
      await server.close();
      await closeDisks();
    };
    return {
      address: server.address,
      disks: disks.map(({ name, size, contexts }) => ({
        name,
        size,
        contexts: contexts.map((item) => item.name),
      })),
      close,
      [Symbol.asyncDispose]: close,
    };
  } catch (error) {
    await closeDisks();
    throw error;
  }
}
