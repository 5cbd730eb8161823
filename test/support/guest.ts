import { mkdtemp, open, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { KiB, MiB } from "../../src/bytes/index.js";
import { qemuIo, type ImageFormat } from "./image.js";
import { run } from "./tools.js";

/** How the counting guest of `fixtures/boot` writes. */
export interface CounterOptions {
  /** Bytes to the first block of its trail; default 1 MiB. */
  readonly trailOffset?: number;
  /** Bytes from one block of the trail to the next; default 64 KiB. */
  readonly trailStride?: number;
  /** Blocks in the trail; default 256, so 16 MiB from the first to the last. */
  readonly trailBlocks?: number;
  /** Steps in one timer tick (18.2 a second). Default 0: as fast as it can, about 1,000 a second. */
  readonly stepsPerTick?: number;
  /** How many disks it writes to, from the first. Default 0: all. */
  readonly disks?: number;
}

/** What a test machine boots. */
export type Guest = "counter" | "idle" | "none" | CounterOptions;

/** Where every disk keeps the counter, and the size of each write of the guest. */
export const COUNTER_OFFSET = 64 * KiB;
export const COUNTER_BLOCK = 512;

/**
 * Puts the guest's boot sector on a disk image that no machine has open.
 * An image that has it already is left alone, so that a restart dirties nothing.
 */
export async function installGuest(
  path: string,
  format: ImageFormat,
  guest: Exclude<Guest, "none">,
): Promise<void> {
  const sector = await bootSector(guest);
  const directory = await mkdtemp(join(tmpdir(), "tm-boot-"));
  try {
    const present = join(directory, "present.bin");
    await run("qemu-img", [
      "dd",
      "-f",
      format,
      "-O",
      "raw",
      "bs=512",
      "count=1",
      `if=${path}`,
      `of=${present}`,
    ]);
    if ((await readFile(present)).equals(sector)) return;
    const wanted = join(directory, "wanted.bin");
    await writeFile(wanted, sector);
    await qemuIo(path, format, [`write -s ${wanted} 0 512`]);
  } finally {
    await rm(directory, { recursive: true });
  }
}

async function bootSector(guest: Exclude<Guest, "none">): Promise<Buffer> {
  const name = guest === "idle" ? "idle.bin" : "counter.bin";
  const sector = await readFile(fileURLToPath(new URL(`../../fixtures/boot/${name}`, import.meta.url)));
  if (guest === "idle") return sector;
  const options = guest === "counter" ? {} : guest;
  // The parameters' places are documented in fixtures/boot/README.md.
  const { trailOffset = MiB, trailStride = 64 * KiB, trailBlocks = 256 } = options;
  sector.writeUInt32LE(trailOffset / 512, 4);
  sector.writeUInt32LE(trailStride / 512, 8);
  sector.writeUInt32LE(trailBlocks, 12);
  sector.writeUInt16LE(options.stepsPerTick ?? 0, 16);
  sector.writeUInt8(options.disks ?? 0, 18);
  return sector;
}

/** Reads the counter of a raw image. @throws when the block is torn: it must hold one number throughout */
export async function readCounter(path: string): Promise<number> {
  await using file = await open(path);
  return await readBlock(file, path, COUNTER_OFFSET);
}

/**
 * Checks the whole trail of a raw image against its counter: every block holds the number of the step that
 * last came by. One changed cluster that a backup missed breaks it.
 *
 * @returns the counter
 * @throws naming the blocks that are wrong
 */
export async function readTrail(path: string, options: CounterOptions = {}): Promise<number> {
  const { trailOffset = MiB, trailStride = 64 * KiB, trailBlocks = 256 } = options;
  await using file = await open(path);
  const counter = await readBlock(file, path, COUNTER_OFFSET);
  const wrong: string[] = [];
  for (let block = 0; block < trailBlocks; block += 1) {
    const offset = trailOffset + block * trailStride;
    const found = await readBlock(file, path, offset);
    // The newest step at or before the counter that came by this block; steps begin with 1.
    const age = (((counter - block) % trailBlocks) + trailBlocks) % trailBlocks;
    const expected = Math.max(counter - age, 0);
    // The trail is written before the counter: one block may be a step ahead.
    const ahead = counter + 1;
    if (found !== expected && !(found === ahead && ahead % trailBlocks === block)) {
      wrong.push(`block ${block} at ${offset} holds ${found} instead of ${expected}`);
    }
  }
  if (wrong.length > 0) throw new Error(`Trail of ${path} (counter ${counter}): ${wrong.join(", ")}`);
  return counter;
}

async function readBlock(
  file: {
    read: (buffer: Buffer, at: number, length: number, position: number) => Promise<{ bytesRead: number }>;
  },
  path: string,
  offset: number,
): Promise<number> {
  const block = Buffer.alloc(COUNTER_BLOCK);
  const { bytesRead } = await file.read(block, 0, block.length, offset);
  if (bytesRead !== block.length) throw new Error(`${path} ends before the guest's block at ${offset}`);
  const value = block.readUInt32LE(0);
  for (let at = 4; at < block.length; at += 4) {
    const other = block.readUInt32LE(at);
    if (other !== value)
      throw new Error(`${path}: block at ${offset} is torn: ${value}, then ${other} at +${at}`);
  }
  return value;
}
