import { closeSync } from "node:fs";

/** NBD connections that a guard holds: descriptors, none of which it ever reads or writes. */
export class HeldConnections {
  #descriptors: readonly number[];

  constructor(descriptors: readonly number[]) {
    this.#descriptors = descriptors;
  }

  /** Closes them; harmless when called twice. */
  close(): void {
    for (const descriptor of this.#descriptors) closeSync(descriptor);
    this.#descriptors = [];
  }
}
