import type { Extent } from "../extent/index.js";
import { negotiate, openSocket, type NbdAddress, type NbdClient, type NbdSocket } from "../nbd/index.js";

/**
 * One connection, for one map: QEMU answers for every context of a connection at each request. Requests are not
 * aborted: that would mean to disconnect, which is for after the exports are gone. For the same reason it is held.
 */
export class MapConnection {
  readonly #socket: NbdSocket;
  readonly #context: string;
  #client: NbdClient | undefined;

  private constructor(socket: NbdSocket, context: string) {
    this.#socket = socket;
    this.#context = context;
  }

  /** Connects; nothing is said on the connection yet. */
  static async open(address: NbdAddress, context: string, signal: AbortSignal): Promise<MapConnection> {
    return new MapConnection(await openSocket(address, { hold: true, signal }), context);
  }

  get fileDescriptor(): number | undefined {
    return this.#socket.fd;
  }

  /** Negotiates. */
  async greet(exportName: string): Promise<void> {
    this.#client = await negotiate(this.#socket, { exportName, contexts: [this.#context] });
  }

  /** The extents of a range whose flags have `flag`. */
  async extents(range: Extent, flag: number): Promise<Extent[]> {
    const found: Extent[] = [];
    for await (const extent of this.runs(range, flag)) found.push(extent);
    return found;
  }

  /** As `extents`, one after the other: a large disk has millions. */
  async *runs(range: Extent, flag: number): AsyncGenerator<Extent> {
    if (this.#client === undefined) throw new RangeError("map asked before negotiation");
    for await (const { offset, length, flags } of this.#client.map(this.#context, range)) {
      if ((flags & flag) !== 0) yield { offset, length };
    }
  }

  /** The disk's bytes in a range, for small reads. */
  async read({ offset, length }: Extent): Promise<Buffer> {
    if (this.#client === undefined) throw new RangeError("disk read before negotiation");
    const bytes = Buffer.alloc(length);
    await this.#client.read(offset, bytes);
    return bytes;
  }

  close(): void {
    this.#client?.destroy();
    this.#socket.destroy();
  }
}
