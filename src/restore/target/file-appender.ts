import type { FileHandle } from "node:fs/promises";
import { MiB } from "../../bytes/index.js";
import { FILE_IN_FLIGHT, writeAll } from "./raw-file.js";
import { UnderWay } from "./under-way.js";

const CHUNK = MiB;

/** Appends to a file in large writes, several of them under way at a time. Calls must not overlap. */
export class FileAppender {
  readonly #file: FileHandle;
  readonly #writes = new UnderWay(FILE_IN_FLIGHT);
  /** Memory that is used again. */
  readonly #free: Buffer[] = [];
  #chunk: Buffer | undefined;
  #filled = 0;
  /** Where the chunk belongs in the file. */
  #position: number;

  /** @param position of the first byte */
  constructor(file: FileHandle, position: number) {
    this.#file = file;
    this.#position = position;
  }

  /** Takes the bytes, which may change afterwards. @throws what a write before met */
  async append(bytes: Uint8Array): Promise<void> {
    for (let done = 0; done < bytes.length;) {
      this.#chunk ??= this.#free.pop() ?? Buffer.allocUnsafeSlow(CHUNK);
      const part = bytes.subarray(done, done + CHUNK - this.#filled);
      this.#chunk.set(part, this.#filled);
      this.#filled += part.length;
      done += part.length;
      if (this.#filled === CHUNK) await this.#write(this.#chunk);
    }
  }

  /** Resolves when all is written. @throws what any write met */
  async settle(): Promise<void> {
    if (this.#chunk !== undefined) await this.#write(this.#chunk);
    await this.#writes.settle();
  }

  /** Resolves when no write is under way, whatever became of them. Never throws. */
  async end(): Promise<void> {
    await this.#writes.end();
  }

  async #write(chunk: Buffer): Promise<void> {
    const [length, position] = [this.#filled, this.#position];
    this.#chunk = undefined;
    this.#filled = 0;
    this.#position += length;
    await this.#writes.begin(length, async () => {
      await writeAll(this.#file, chunk.subarray(0, length), position);
      this.#free.push(chunk);
    });
  }
}
