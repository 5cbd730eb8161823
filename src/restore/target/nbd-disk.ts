import { isZero, MiB, type IoOptions } from "../../bytes/index.js";
import { UsageError } from "../../errors/index.js";
import {
  BASE_ALLOCATION,
  connect,
  connectSeveral,
  NBD_STATE_ZERO,
  type NbdAddress,
  type NbdClient,
  type NbdUri,
} from "../../nbd/index.js";
import type { DiskAccess } from "./disk-access.js";
import { UnderWay } from "./under-way.js";

/** Connections, where the server says that they all see one state. */
const CONNECTIONS = 4;
/** Bytes that are written and not yet answered. */
const IN_FLIGHT = 16 * MiB;
/** Bytes that are read, at most, to find out whether an export is empty. */
const EMPTY_READ = 4 * MiB;

/** An NBD export as a server offers it. */
export interface NbdPlace {
  readonly target: NbdAddress | NbdUri;
  /** Where `target` is an address. */
  readonly exportName?: string;
}

/**
 * An NBD export, written through several connections, many requests at once.
 *
 * @param options.signal ends all that is asked of it, too
 * @throws {UsageError} when it is read-only
 */
export async function openNbdDisk(
  { target, exportName = "" }: NbdPlace,
  options: IoOptions = {},
): Promise<DiskAccess> {
  const clients = await connectSeveral(target, CONNECTIONS, { exportName, signal: options.signal });
  const [{ export: offered }] = clients;
  if (offered.flags.readOnly) {
    for (const client of clients) await client.close();
    throw new UsageError(`Cannot restore to export "${offered.name}": the server offers it read-only`);
  }
  return new NbdDisk(clients, options);
}

/**
 * Whether an export reads as zero from end to end. What its map does not say to be zero is read, up to a bound: new
 * raw files begin with a block of written zeroes. False where the server has no map.
 */
export async function isEmptyExport(
  { target, exportName = "" }: NbdPlace,
  options: IoOptions = {},
): Promise<boolean> {
  const client = await connect(target, { exportName, contexts: [BASE_ALLOCATION], signal: options.signal });
  try {
    if (!client.export.contexts.includes(BASE_ALLOCATION)) return false;
    let left = EMPTY_READ;
    for await (const { offset, length, flags } of client.map(BASE_ALLOCATION, options)) {
      if ((flags & NBD_STATE_ZERO) !== 0) continue;
      left -= length;
      if (left < 0) return false;
      const bytes = Buffer.allocUnsafe(length);
      await client.read(offset, bytes, options);
      if (!isZero(bytes)) return false;
    }
    return true;
  } finally {
    await client.close();
  }
}

class NbdDisk implements DiskAccess {
  readonly size: number;
  readonly blockSize: number;
  readonly #clients: readonly [NbdClient, ...NbdClient[]];
  readonly #writes = new UnderWay(IN_FLIGHT);
  /** Nobody who wants to leave waits for a server that keeps silent. */
  readonly #io: IoOptions;

  constructor(clients: readonly [NbdClient, ...NbdClient[]], { signal }: IoOptions) {
    this.#clients = clients;
    this.#io = { signal };
    const [{ export: offered }] = clients;
    this.size = offered.size;
    this.blockSize = offered.blockSize.minimum;
  }

  async read(offset: number, length: number): Promise<Buffer> {
    const bytes = Buffer.allocUnsafe(length);
    await this.#idlest().read(offset, bytes, this.#io);
    return bytes;
  }

  async write(offset: number, bytes: Buffer): Promise<void> {
    await this.#writes.begin(bytes.length, () => this.#idlest().write(offset, bytes, this.#io));
  }

  async writeZeroes(offset: number, length: number): Promise<void> {
    // It costs no memory; the server answers when it is done.
    await this.#writes.begin(0, () => this.#idlest().writeZeroes(offset, length, this.#io));
  }

  settle(): Promise<void> {
    return this.#writes.settle();
  }

  async flush(): Promise<void> {
    await this.settle();
    await this.#clients[0].flush(this.#io);
  }

  async close(): Promise<void> {
    await this.#writes.end();
    await Promise.all(this.#clients.map((client) => client.close()));
  }

  #idlest(): NbdClient {
    return this.#clients.reduce((best, client) => (client.pending < best.pending ? client : best));
  }
}
