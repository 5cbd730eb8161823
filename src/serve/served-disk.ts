import { MiB, type IoOptions } from "../bytes/index.js";
import {
  BASE_ALLOCATION,
  dirtyBitmapContext,
  NBD_STATE_DIRTY,
  NBD_STATE_HOLE,
  NBD_STATE_ZERO,
  type BlockRun,
  type ServedContext,
  type ServedExport,
} from "../nbd/index.js";
import type { PointChain, PointManifest, Repository } from "../repository/index.js";
import { ObjectReplacedError } from "../storage/index.js";
import { ClusterCache } from "./cluster-cache.js";

/** Bytes of decoded clusters that are kept, for each disk. */
const CACHE_BYTES = 64 * MiB;
/** The name of the bitmap that shows what a point changed since its parent. */
const CHANGED = "changed";
/** How often a chain is opened anew that was rewritten while it was read. */
const ATTEMPTS = 4;

/** One disk of a point, as a server offers it: read from its chain, cluster by cluster. */
export class ServedDisk implements ServedExport {
  readonly name: string;
  readonly description: string;
  readonly size: number;
  readonly preferredBlock: number;
  readonly contexts: readonly ServedContext[];
  readonly #repository: Repository;
  readonly #point: PointManifest;
  readonly #cache: ClusterCache;
  #chain: PointChain;
  /** The opening that is under way, when the chain was rewritten. */
  #opening: Promise<void> | undefined;

  private constructor(repository: Repository, chain: PointChain) {
    const { point, disk } = chain;
    this.#repository = repository;
    this.#point = point;
    this.#chain = chain;
    this.name = disk.name;
    this.description = `${point.machine.name}@${point.id}${point.name === null ? "" : ` (${point.name})`}`;
    this.size = disk.virtualSize;
    this.preferredBlock = disk.clusterSize;
    this.#cache = new ClusterCache(Math.floor(CACHE_BYTES / disk.clusterSize));
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
    repository: Repository,
    { machine, id }: PointManifest,
    disk: string,
    options: IoOptions = {},
  ): Promise<ServedDisk> {
    return new ServedDisk(repository, await repository.openChain(machine.name, id, disk, options));
  }

  async read(offset: number, length: number, options: IoOptions): Promise<Buffer> {
    const { clusterSize } = this.#chain.disk;
    const first = Math.floor(offset / clusterSize);
    const end = Math.ceil((offset + length) / clusterSize);
    const result = Buffer.alloc(length);
    for (let cluster = first; cluster < end; cluster += 1) {
      const start = cluster * clusterSize;
      // Whoever else waits for the cluster must not fail because this one has left.
      const content = await this.#cache.get(cluster, () => this.#readCluster(start));
      options.signal?.throwIfAborted();
      content.copy(
        result,
        Math.max(0, start - offset),
        Math.max(0, offset - start),
        Math.min(content.length, offset + length - start),
      );
    }
    return result;
  }

  /** Never throws. */
  async close(): Promise<void> {
    this.#cache.clear();
    await this.#chain.close();
  }

  async #readCluster(start: number): Promise<Buffer> {
    const length = Math.min(this.#chain.disk.clusterSize, this.size - start);
    return await this.#withChain((chain) => chain.chain.read(start, length));
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

  /** Runs of the chain as it is now; goes on where it was when the chain is rewritten meanwhile. */
  async *#runs(
    offset: number,
    length: number,
    signal: AbortSignal | undefined,
    map: (chain: PointChain, offset: number, length: number) => AsyncIterable<BlockRun>,
  ): AsyncGenerator<BlockRun> {
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

  /** Works with the chain as it is now: one that was rewritten meanwhile reads alike. */
  async #withChain<T>(work: (chain: PointChain) => Promise<T>): Promise<T> {
    for (let attempt = 1; ; attempt += 1) {
      const chain = this.#chain;
      try {
        return await work(chain);
      } catch (error) {
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
