import { mkdir, readFile, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import type { PinnedMemory } from "../support/pinned-memory.js";
import { run } from "../support/tools.js";

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
    const some = images.filter(({ content }) => content.length > 0);
    const target = join(this.#directory, "raw");
    // One shell for all of it: starting processes is what takes time.
    const pathOf = (key: string): string => join(this.#directory, key);
    const sources = some.map(({ key }) => pathOf(key));
    await run("sh", ["-ec", SCRIPT, "sh", target, String(fresh.length), ...fresh.map(pathOf), ...sources]);
    if (some.length > 0) await expectBytes(target, some);
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
}

/**
 * Target, number of images to be checked, these, images to be converted: all of those into the target, one behind the
 * other. Ends with the code of the first program that finds fault.
 */
const SCRIPT = `
target=$1 checks=$2
shift 2
while [ "$checks" -gt 0 ]; do
  qemu-img check -q -f qcow2 "$1" || { code=$?; echo "qemu-img check $1: $code" >&2; exit "$code"; }
  shift
  checks=$((checks - 1))
done
[ $# = 0 ] || exec qemu-img convert -f qcow2 -O raw "$@" "$target"
`;

async function expectBytes(path: string, images: readonly Expected[]): Promise<void> {
  const bytes = await readFile(path);
  let at = 0;
  for (const { key, content } of images) {
    const found = bytes.subarray(at, at + content.length);
    if (!found.equals(content))
      throw new Error(`qemu-img reads ${key} differently, ${firstDifference(found, content)}`);
    at += content.length;
  }
  if (bytes.length !== at) throw new Error(`qemu-img reads ${bytes.length} bytes instead of ${at}`);
}

/** Where two disks differ, for people. */
export function firstDifference(found: Buffer, expected: Buffer): string {
  if (found.length !== expected.length) return `${found.length} bytes instead of ${expected.length}`;
  const at = found.findIndex((byte, index) => byte !== expected[index]);
  return `first at byte ${at} of ${expected.length}`;
}
