import type { IoOptions } from "../bytes/index.js";
import type { Extent } from "../extent/index.js";
import {
  BASE_ALLOCATION,
  dirtyBitmapContext,
  NBD_STATE_DIRTY,
  NBD_STATE_HOLE,
  NBD_STATE_ZERO,
  type BlockRun,
  type ServedContext,
  type ServedExport,
  type ServedPiece,
} from "../nbd/index.js";
import type { PointChain, PointManifest, Repository } from "../repository/index.js";
import { ObjectReplacedError } from "../storage/index.js";
import type { RangeReader } from "../transfer/index.js";
import { ClusterCache } from "./cluster-cache.js";

/** The name of the bitmap that shows what a point changed since its parent. */
const CHANGED = "changed";
/** How often a chain is opened anew that was rewritten while it was read. */
const ATTEMPTS = 4;

/** What all disks of a server share. */
export interface SharedByDisks {
  readonly repository: Repository;
  /** Decodes. */
  readonly ranges: RangeReader;
  /** Bytes of decoded clusters that each disk keeps. */
  readonly cacheBytes: number;
}

/** One disk of a point, as a server offers it: read from its chain, in whole clusters. */
export class ServedDisk implements ServedExport {
  readonly name: string;
  readonly description: string;
  readonly size: number;
  readonly preferredBlock: number;
  readonly contexts: readonly ServedContext[];
  readonly #repository: Repository;
  readonly #point: PointManifest;
  readonly #ranges: RangeReader;
  /** Clusters of which parts were asked for: who reads on wants the rest of them. undefined for zeroes. */
  readonly #cache: ClusterCache<Buffer | undefined>;
  #chain: PointChain;
  /** The opening that is under way, when the chain was rewritten. */
  #opening: Promise<void> | undefined;

  private constructor(chain: PointChain, { repository, ranges, cacheBytes }: SharedByDisks) {
    const { point, disk } = chain;
    this.#repository = repository;
    this.#ranges = ranges;
    this.#point = point;
    this.#chain = chain;
    this.name = disk.name;
    this.description = `${point.machine.name}@${point.id}${point.name === null ? "" : ` (${point.name})`}`;
    this.size = disk.virtualSize;
    this.preferredBlock = disk.clusterSize;
    this.#cache = new ClusterCache(Math.floor(cacheBytes / disk.clusterSize));
    const allocation = {
      name: BASE_ALLOCATION,
      runs: (offset: number, length: number, io: IoOptions) => this.#allocation(offset, length, io),
    };
    const changed = {
      name: dirtyBitmapContext(CHANGED),
      runs: (offset: number, length: number, io: IoOptions) => this.#changed(offset, length, io),
    };
    this.contexts = disk.kind === "full" ? [allocation] : [allocation, changed];
  }

  /** @throws as `Repository.openChain` does */
  static async open(
    { machine, id }: PointManifest,
    disk: string,
    shared: SharedByDisks,
    options: IoOptions = {},
  ): Promise<ServedDisk> {
    return new ServedDisk(await shared.repository.openChain(machine.name, id, disk, options), shared);
  }

  async *read(offset: number, length: number, options: IoOptions): AsyncGenerator<ServedPiece> {
    const { clusterSize } = this.#chain.disk;
    const end = offset + length;
    for (let at = offset; at < end;) {
      const start = at - (at % clusterSize);
      const wholeEnd = end === this.size ? end : end - (end % clusterSize);
      if (at === start && at < wholeEnd) {
        yield* this.#runs(at, wholeEnd - at, options.signal, ({ chain }, from, count) =>
          this.#ranges.read(chain, { offset: from, length: count }, options),
        );
        at = wholeEnd;
        continue;
      }
      // Whoever else waits for the cluster must not fail because this one has left.
      const bytes = await this.#cache.get(start / clusterSize, () => this.#readCluster(start));
      options.signal?.throwIfAborted();
      const stop = Math.min(start + clusterSize, end);
      yield { offset: at, length: stop - at, bytes: bytes?.subarray(at - start, stop - start) };
      at = stop;
    }
  }

  /** Never throws. */
  async close(): Promise<void> {
    this.#cache.clear();
    await this.#chain.close();
  }

  /** A cluster; undefined when it is zero. */
  async #readCluster(start: number): Promise<Buffer | undefined> {
    const length = Math.min(this.#chain.disk.clusterSize, this.size - start);
    const parts: Buffer[] = [];
    let isZero = true;
    const pieces = this.#runs(start, length, undefined, ({ chain }, from, count) =>
      this.#ranges.read(chain, { offset: from, length: count }),
    );
    for await (const piece of pieces) {
      parts.push(piece.bytes ?? Buffer.alloc(piece.length));
      isZero &&= piece.bytes === undefined;
    }
    return isZero ? undefined : Buffer.concat(parts);
  }

  #allocation(offset: number, length: number, { signal }: IoOptions): AsyncGenerator<BlockRun> {
    return this.#runs(offset, length, signal, async function* ({ chain }, start, count) {
      for await (const run of chain.map(start, count, { signal })) {
        const flags = run.kind === "zero" ? NBD_STATE_HOLE | NBD_STATE_ZERO : 0;
        yield { offset: run.offset, length: run.length, flags };
      }
    });
  }

  /** What the point's own image holds of the disk. */
  #changed(offset: number, length: number, { signal }: IoOptions): AsyncGenerator<BlockRun> {
    return this.#runs(offset, length, signal, async function* ({ images: [top] }, start, count) {
      // An image that was made full meanwhile does not tell any more what changed.
      if (top?.disk.kind !== "incremental") {
        yield { offset: start, length: count, flags: NBD_STATE_DIRTY };
        return;
      }
      for await (const run of top.reader.map(start, count, { signal })) {
        const flags = run.kind === "unallocated" ? 0 : NBD_STATE_DIRTY;
        yield { offset: run.offset, length: run.length, flags };
      }
    });
  }

  /** What the chain as it is now says of a range; goes on where it was when the chain is rewritten meanwhile: it reads alike. */
  async *#runs<Run extends Extent>(
    offset: number,
    length: number,
    signal: AbortSignal | undefined,
    map: (chain: PointChain, offset: number, length: number) => AsyncIterable<Run>,
  ): AsyncGenerator<Run> {
    let at = offset;
    for (let attempt = 1; ; attempt += 1) {
      const chain = this.#chain;
      try {
        for await (const run of map(chain, at, offset + length - at)) {
          at = run.offset + run.length;
          yield run;
        }
        return;
      } catch (error) {
        signal?.throwIfAborted();
        await this.#recover(error, chain, attempt);
      }
    }
  }

  /** Returns when it can be tried again, with another chain. @throws the error, explained, when it was not the old chain's fault */
  async #recover(error: unknown, chain: PointChain, attempt: number): Promise<void> {
    // Whoever opened the new chain has closed this one, in the middle of others' reads.
    const isOld = chain !== this.#chain || error instanceof ObjectReplacedError;
    if (!isOld || attempt === ATTEMPTS) throw await chain.explain(error);
    await this.#reopen(chain);
  }

  async #reopen(old: PointChain): Promise<void> {
    if (old !== this.#chain) return;
    this.#opening ??= this.#repository
      .openChain(this.#point.machine.name, this.#point.id, this.name)
      .then(async (chain) => {
        this.#chain = chain;
        await old.close();
      })
      .finally(() => (this.#opening = undefined));
    await this.#opening;
  }
}
