import { KiB, MiB } from "../bytes/index.js";
import type { Extent } from "../extent/index.js";
import type { ChainMapping } from "../qcow2/index.js";

/** Stored bytes of one read, at most, unless a single frame has more. */
const READ_BYTES = MiB;
/** Stored bytes that are read and thrown away rather than paying for another read. */
const GAP = 64 * KiB;
/** Bytes of one read, at most: a single frame's L2 entry may claim twice its cluster, and a sector more. */
export function mostOfRead(clusterSize: number): number {
  return Math.max(READ_BYTES, 2 * clusterSize + 512);
}

/** Bytes of a part, at most. */
const PART_BYTES = 2 * MiB;

/** The bytes of the disk that a frame decodes to, or some of them, and where they belong in the window's memory. */
export interface WantedFrame {
  /** Host offset, and an upper bound of the stored bytes. */
  readonly at: number;
  readonly storedLength: number;
  /** Bytes of the decoded cluster to leave out, and to take. */
  readonly skip: number;
  readonly length: number;
  readonly into: number;
}

/** Stored bytes of one image that are read at once: frames that lie close together, or bytes as they are. */
export interface WindowRead {
  /** Index in the chain. */
  readonly image: number;
  readonly at: number;
  readonly length: number;
  /** By their host offset; or where the bytes belong, if they are stored as they are. */
  readonly content: { readonly frames: readonly WantedFrame[] } | { readonly into: number };
}

/** A run of the disk: where its bytes are in the window's memory; undefined where it reads as zero. */
export interface WindowPart extends Extent {
  readonly from: number | undefined;
}

/**
 * What is loaded at once: a run of the disk with no more data than the window's memory holds, and zeroes as many as
 * there are. Every cluster is fetched from the one image that holds it, each image's once and in the file's order, as
 * few reads as can be.
 */
export interface Window {
  /** In the order of the disk, without gaps. */
  readonly parts: readonly WindowPart[];
  /** By image, then by host offset. */
  readonly reads: readonly WindowRead[];
}

type DataMapping = Exclude<ChainMapping, { kind: "zero" }>;

/**
 * Cuts a run of the disk into windows.
 *
 * @param mappings in the order of the disk, without gaps
 * @param capacity bytes of a window's memory; at least a cluster
 */
export async function* planWindows(
  mappings: AsyncIterable<ChainMapping>,
  capacity: number,
): AsyncGenerator<Window> {
  let parts: WindowPart[] = [];
  let wanted: (DataMapping & { readonly into: number })[] = [];
  let used = 0;
  const take = (): Window => {
    const window = { parts, reads: planReads(wanted) };
    [parts, wanted, used] = [[], [], 0];
    return window;
  };
  for await (const mapping of mappings) {
    if (mapping.kind === "zero") {
      parts.push({ offset: mapping.offset, length: mapping.length, from: undefined });
      // Zeroes take no memory, but a part each.
      if (parts.length >= capacity / KiB) yield take();
      continue;
    }
    for (const piece of mapping.kind === "plain" ? cutPlain(mapping) : [mapping]) {
      if (used > 0 && used + piece.length > capacity) yield take();
      wanted.push({ ...piece, into: used });
      extend(parts, piece, used);
      used += piece.length;
    }
  }
  if (parts.length > 0) yield take();
}

/** Adds a run of data to the last part, if it continues it. */
function extend(parts: WindowPart[], { offset, length }: Extent, from: number): void {
  const last = parts.at(-1);
  if (last?.from === undefined || last.length + length > PART_BYTES) parts.push({ offset, length, from });
  else parts[parts.length - 1] = { ...last, length: last.length + length };
}

function* cutPlain(mapping: Extract<ChainMapping, { kind: "plain" }>): Generator<typeof mapping> {
  for (let done = 0; done < mapping.length; done += READ_BYTES) {
    const length = Math.min(READ_BYTES, mapping.length - done);
    yield { ...mapping, offset: mapping.offset + done, at: mapping.at + done, length };
  }
}

function planReads(wanted: (DataMapping & { readonly into: number })[]): WindowRead[] {
  wanted.sort((a, b) => a.image - b.image || a.at - b.at);
  const reads: WindowRead[] = [];
  let run: { image: number; at: number; end: number; frames: WantedFrame[] } | undefined;
  const close = (): void => {
    if (run === undefined) return;
    const { image, at, end, frames } = run;
    reads.push({ image, at, length: end - at, content: { frames } });
    run = undefined;
  };
  for (const mapping of wanted) {
    const { image, at, length, into } = mapping;
    if (mapping.kind === "plain") {
      close();
      reads.push({ image, at, length, content: { into } });
      continue;
    }
    const { storedLength, skip } = mapping;
    const isNear = run?.image === image && at <= run.end + GAP && at + storedLength - run.at <= READ_BYTES;
    if (run === undefined || !isNear) {
      close();
      run = { image, at, end: at, frames: [] };
    }
    run.end = Math.max(run.end, at + storedLength);
    run.frames.push({ at, storedLength, skip, length, into });
  }
  close();
  return reads;
}
