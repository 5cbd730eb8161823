import { endOf, type Extent } from "../extent/index.js";
import { MAX_STATUS_LENGTH } from "../nbd/index.js";
import {
  ExportConnection,
  Replacement,
  type ExportPlace,
  type ReplacementOptions,
} from "../transfer/index.js";

/** Which map, of which disk. */
export interface MapPlace extends Omit<ExportPlace, "contexts"> {
  /** Name of the disk, for messages. */
  readonly disk: string;
  readonly context: string;
}

/** What is looked for in a map: a flag, or any condition. */
type Flags = number | ((flags: number) => boolean);

/**
 * One connection, for one map: QEMU answers for every context of a connection at each request. Requests are not
 * aborted: that would mean to disconnect, which is for after the exports are gone. When it drops, it is replaced, and
 * asked again.
 */
export class MapConnection {
  readonly #connection: ExportConnection;
  readonly #replacement: Replacement;
  readonly #context: string;

  private constructor(connection: ExportConnection, place: MapPlace, options: ReplacementOptions) {
    this.#connection = connection;
    this.#context = place.context;
    this.#replacement = new Replacement(
      {
        what: `disk "${place.disk}"`,
        open: () => connection.open(options),
        greet: () => connection.greet(),
      },
      options,
    );
  }

  /** Connects; nothing is said on the connection yet. @param options how it is replaced when it drops */
  static async open(place: MapPlace, options: ReplacementOptions): Promise<MapConnection> {
    const { address, exportName, context } = place;
    const connection = new ExportConnection({ address, exportName, contexts: [context] });
    await connection.open(options);
    return new MapConnection(connection, place, options);
  }

  get fileDescriptors(): readonly number[] {
    return this.#connection.fileDescriptors;
  }

  /** Negotiates. */
  async greet(): Promise<void> {
    await this.#replacement.run(() => this.#connection.greet());
  }

  /** The extents of a range whose flags have `flag`, or are such. */
  async extents(range: Extent, flag: Flags): Promise<Extent[]> {
    const found: Extent[] = [];
    for await (const extent of this.runs(range, flag)) found.push(extent);
    return found;
  }

  /** As `extents`, one after the other: a large disk has millions. */
  async *runs(range: Extent, flag: Flags): AsyncGenerator<Extent> {
    for (let at = range.offset; at < endOf(range);) {
      const length = Math.min(endOf(range) - at, MAX_STATUS_LENGTH);
      const runs = await this.#replacement.run(() =>
        this.#connection.client.blockStatus(this.#context, at, length),
      );
      for (const { offset, length: runLength, flags } of runs) {
        const isFound = typeof flag === "number" ? (flags & flag) !== 0 : flag(flags);
        if (isFound) yield { offset, length: runLength };
        at = offset + runLength;
      }
      if (runs.length === 0) return;
    }
  }

  /** The disk's bytes in a range, for small reads. */
  async read({ offset, length }: Extent): Promise<Buffer> {
    return await this.#replacement.run(async () => {
      const bytes = Buffer.alloc(length);
      await this.#connection.client.read(offset, bytes);
      return bytes;
    });
  }

  close(): void {
    this.#connection.close();
  }
}
