import { mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import PQueue from "p-queue";
import { expect } from "vitest";
import { checkImage, CLEAN } from "../support/image.js";
import type { PinnedMemory } from "../support/pinned-memory.js";
import { run } from "../support/tools.js";

/** Programs of QEMU that run at a time. */
const PROCESSES = 3;

/** An image, by its key, and what QEMU must read in it. */
export interface Expected {
  readonly key: string;
  readonly content: Buffer;
}

/** The images of a storage as files, for QEMU's tools, which know nothing of tidemark. */
export class QemuOracle {
  readonly #storage: PinnedMemory;
  readonly #directory: string;
  /** Versions of the files that are there, all of which are clean. */
  readonly #written = new Map<string, number>();

  constructor(storage: PinnedMemory, directory: string) {
    this.#storage = storage;
    this.#directory = directory;
  }

  /** Every image is clean, and reads as it must. */
  async expect(images: readonly Expected[]): Promise<void> {
    const fresh = await this.#write();
    const queue = new PQueue({ concurrency: PROCESSES });
    await queue.addAll([
      ...fresh.map((key) => () => this.#expectClean(key)),
      () => this.#expectBytes(images),
    ]);
  }

  /** Brings the files up to date. @returns those that are new */
  async #write(): Promise<string[]> {
    const { versions } = this.#storage;
    const keys = [...versions.keys()].filter((key) => key.endsWith(".qcow2"));
    for (const key of [...this.#written.keys()].filter((old) => !versions.has(old))) {
      await rm(join(this.#directory, key));
      this.#written.delete(key);
    }
    const fresh = keys.filter((key) => this.#written.get(key) !== versions.get(key));
    for (const key of fresh) {
      const path = join(this.#directory, key);
      await mkdir(dirname(path), { recursive: true });
      await writeFile(path, await this.#storage.bytes(key));
      this.#written.set(key, versions.get(key)!);
    }
    return fresh;
  }

  async #expectClean(key: string): Promise<void> {
    const { report, ...found } = await checkImage(join(this.#directory, key));
    expect(found, `${key}: ${report}`).toEqual(CLEAN);
  }

  /** One process for all of them: it writes what it reads in one image behind the other. */
  async #expectBytes(images: readonly Expected[]): Promise<void> {
    const some = images.filter(({ content }) => content.length > 0);
    if (some.length === 0) return;
    const target = join(this.#directory, "raw");
    const sources = some.map(({ key }) => join(this.#directory, key));
    await run("qemu-img", ["convert", "-f", "qcow2", "-O", "raw", ...sources, target]);
    const bytes = await readFile(target);
    let at = 0;
    for (const { key, content } of some) {
      const found = bytes.subarray(at, at + content.length);
      if (!found.equals(content))
        throw new Error(`qemu-img reads ${key} differently, ${firstDifference(found, content)}`);
      at += content.length;
    }
    expect(bytes.length).toBe(at);
  }
}

/** Where two disks differ, for people. */
export function firstDifference(found: Buffer, expected: Buffer): string {
  if (found.length !== expected.length) return `${found.length} bytes instead of ${expected.length}`;
  const at = found.findIndex((byte, index) => byte !== expected[index]);
  return `first at byte ${at} of ${expected.length}`;
}
