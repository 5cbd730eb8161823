import { open, type FileHandle } from "node:fs/promises";
import zstd from "zstd-napi/binding.js";

/** Bytes of an image, by what refers to them. */
export interface ImageUsage {
  readonly length: number;
  /** Frames that an L2 table names. */
  readonly frames: number;
  /** The header cluster, L1 and L2 tables, refcount table and blocks. */
  readonly tables: number;
}

const OFFSET = 0x00fffffffffffe00n;
const COMPRESSED = 1n << 62n;

/**
 * Walks a qcow2 version 3 file by its specification alone, without any code of ours, and adds up what is in use. What is
 * left of its length is garbage, and padding.
 */
export async function usageOf(path: string): Promise<ImageUsage> {
  const file = await open(path);
  try {
    const { size: length } = await file.stat();
    const header = await readAt(file, 0, 104, length);
    const clusterBits = header.readUInt32BE(20);
    const cluster = 2 ** clusterBits;
    const rounded = (bytes: number): number => Math.ceil(bytes / cluster) * cluster;
    const l1 = await readAt(file, Number(header.readBigUInt64BE(40)), header.readUInt32BE(36) * 8, length);
    const refcounts = await readAt(
      file,
      Number(header.readBigUInt64BE(48)),
      header.readUInt32BE(56) * cluster,
      length,
    );
    let tables = cluster + rounded(l1.length) + refcounts.length;
    for (let at = 0; at < refcounts.length; at += 8)
      if (refcounts.readBigUInt64BE(at) !== 0n) tables += cluster;
    let frames = 0;
    // "x = 62 - (cluster_bits - 8)": below it the offset, above it the additional sectors.
    const offsetBits = BigInt(62 - (clusterBits - 8));
    for (let at = 0; at < l1.length; at += 8) {
      const l2At = Number(l1.readBigUInt64BE(at) & OFFSET);
      if (l2At === 0) continue;
      tables += cluster;
      const l2 = await readAt(file, l2At, cluster, length);
      for (let slot = 0; slot < cluster; slot += 8) {
        const entry = l2.readBigUInt64BE(slot);
        if ((entry & COMPRESSED) === 0n) continue;
        const frameAt = Number(entry & ((1n << offsetBits) - 1n));
        const stored = await readAt(file, frameAt, cluster + 1024, length);
        frames += zstd.findFrameCompressedSize(stored);
      }
    }
    return { length, frames, tables };
  } finally {
    await file.close();
  }
}

async function readAt(file: FileHandle, at: number, length: number, end: number): Promise<Buffer> {
  const bytes = Buffer.alloc(Math.min(length, end - at));
  await file.read(bytes, 0, bytes.length, at);
  return bytes;
}
