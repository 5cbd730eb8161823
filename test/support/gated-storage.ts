import type { IoOptions } from "../../src/bytes/index.js";
import type { PutOptions, Storage } from "../../src/storage/index.js";
import { SuspendedUser } from "./suspended-user.js";

/** A storage whose user is suspended right before one of its changes (a `put` is a commit, too), until the test lets it go on. */
export class GatedStorage extends SuspendedUser {
  readonly #operation: "commit" | "delete";
  readonly #key: string;

  constructor(storage: Storage, operation: "commit" | "delete", key: string) {
    super(storage);
    this.#operation = operation;
    this.#key = key;
  }

  override async put(key: string, bytes: Uint8Array, options?: PutOptions): Promise<boolean> {
    await this.#pass("commit", key);
    return await super.put(key, bytes, options);
  }

  override async delete(key: string, options?: IoOptions): Promise<void> {
    await this.#pass("delete", key);
    await super.delete(key, options);
  }

  protected override beforeCommit(key: string): Promise<void> {
    return this.#pass("commit", key);
  }

  async #pass(operation: "commit" | "delete", key: string): Promise<void> {
    if (operation === this.#operation && key === this.#key) await this.suspend();
  }
}
