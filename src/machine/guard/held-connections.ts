import { closeSync } from "node:fs";
import { Socket } from "node:net";

/** NBD connections that a guard holds. While the agent lives the guard neither reads nor writes them. */
export class HeldConnections {
  #descriptors: readonly number[];
  #sockets: readonly Socket[] = [];

  constructor(descriptors: readonly number[]) {
    this.#descriptors = descriptors;
  }

  /**
   * Reads what still comes, for nobody: the agent is dead. QEMU, when it deletes an export, waits for replies that are
   * on their way, and one that finds its socket full, with nobody who reads, would wait for ever: on a unix socket not
   * even its own `shutdown(2)` wakes it.
   */
  drain(): void {
    // Half open: also after its end a connection is ours to close, when all exports are gone.
    const options = { readable: true, writable: true, allowHalfOpen: true };
    this.#sockets = this.#descriptors.map((fd) => new Socket({ fd, ...options }));
    this.#descriptors = [];
    // One that fails is closed: then QEMU has closed it before.
    for (const socket of this.#sockets) socket.on("error", () => undefined).resume();
  }

  /** Closes them; harmless when called twice. */
  close(): void {
    for (const socket of this.#sockets) socket.destroy();
    for (const descriptor of this.#descriptors) closeSync(descriptor);
    this.#descriptors = [];
  }
}
