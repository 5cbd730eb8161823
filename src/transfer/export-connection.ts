import {
  negotiate,
  openSocket,
  reconnect,
  type NbdAddress,
  type NbdClient,
  type NbdSocket,
} from "../nbd/index.js";

/** Where a connection leads to. */
export interface ExportPlace {
  readonly address: NbdAddress;
  readonly exportName: string;
  /** Metadata contexts to select. */
  readonly contexts?: readonly string[];
}

/**
 * A connection to an export of a frozen point, and those that were lost before it. All are held until `close`: whoever
 * disconnects before the exports are gone may abort the machine.
 */
export class ExportConnection {
  readonly #place: ExportPlace;
  readonly #sockets: NbdSocket[] = [];
  #client: NbdClient | undefined;
  /** The socket that is negotiated. */
  #greeted: NbdSocket | undefined;
  #isClosed = false;

  constructor(place: ExportPlace) {
    this.#place = place;
  }

  /** Connects, beside what there was before; nothing is said on the new connection yet. */
  async open(options: { readonly signal?: AbortSignal } = {}): Promise<void> {
    const socket = await openSocket(this.#place.address, { hold: true, ...options });
    this.#sockets.push(socket);
    // Nobody would close it any more, and a server cannot be stopped while one is not negotiated.
    if (this.#isClosed) socket.destroy();
  }

  /** Negotiates the newest connection, if that is not done yet. */
  async greet(): Promise<void> {
    const socket = this.#sockets.at(-1);
    if (socket === undefined || socket === this.#greeted) return;
    const { exportName, contexts } = this.#place;
    const client =
      this.#client === undefined
        ? await negotiate(socket, contexts === undefined ? { exportName } : { exportName, contexts })
        : await reconnect(this.#client, { socket });
    this.#client = client;
    this.#greeted = socket;
  }

  /** The newest connection that was negotiated. */
  get client(): NbdClient {
    if (this.#client === undefined)
      throw new RangeError(`export ${this.#place.exportName}: used before greet`);
    return this.#client;
  }

  /** Descriptors of all that are open. */
  get fileDescriptors(): readonly number[] {
    return this.#sockets.map(({ fd }) => fd).filter((fd) => fd !== undefined);
  }

  /** Closes all without a farewell: the exports are gone already, in the safe order of teardown. */
  close(): void {
    this.#isClosed = true;
    this.#client?.destroy();
    for (const socket of this.#sockets) socket.destroy();
  }
}
