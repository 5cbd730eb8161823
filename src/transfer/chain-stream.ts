import { KiB, MiB } from "../bytes/index.js";
import { endOf, type Extent } from "../extent/index.js";
import type { ChainMapping, ImageChain, ImageReader } from "../qcow2/index.js";
import type { FrameDecoder } from "./frame-decoder.js";

/** A part of a disk, in the order of the disk. */
export interface DiskPiece extends Extent {
  /** The content; undefined where the disk reads as zero. */
  readonly bytes: Buffer | undefined;
}

type CompressedMapping = Extract<ChainMapping, { kind: "compressed" }>;
type PlainMapping = Extract<ChainMapping, { kind: "plain" }>;

/** Clusters that follow one another on the disk and lie close together in one image: one read, one decode. */
interface FrameRun {
  readonly kind: "frames";
  readonly image: number;
  readonly clusters: [CompressedMapping, ...CompressedMapping[]];
}

type Step = Exclude<ChainMapping, CompressedMapping> | FrameRun;

/** Steps that are loaded ahead of the one being handed out. */
const LOOKAHEAD = 8;
/** Decoded bytes of a step, at most. */
const STEP_BYTES = 2 * MiB;
/** Stored bytes that are read and thrown away rather than paying for another read. */
const GAP = 64 * KiB;

/**
 * Streams a range of a chain's disk, in order, decoding on worker threads and loading ahead.
 * A consumer that waits holds back the reads: at most LOOKAHEAD steps of STEP_BYTES are in memory.
 *
 * @throws {DamageError} when an image's tables or frames are not what was stored
 */
export async function* streamChain(
  chain: ImageChain,
  range: Extent,
  decoder: FrameDecoder,
  options: { readonly signal?: AbortSignal | undefined } = {},
): AsyncGenerator<DiskPiece> {
  const { signal } = options;
  const loading: Promise<DiskPiece>[] = [];
  try {
    for await (const step of stepsOf(chain.map(range.offset, range.length, { signal }))) {
      const piece = load(chain, step, decoder, signal);
      // The rejection is seen when the piece's turn comes; until then it is not unhandled.
      piece.catch(() => undefined);
      loading.push(piece);
      if (loading.length < LOOKAHEAD) continue;
      const next = await loading.shift();
      if (next !== undefined) yield next;
    }
    for (let next = loading.shift(); next !== undefined; next = loading.shift()) yield await next;
  } finally {
    await Promise.allSettled(loading);
  }
}

/** Joins compressed clusters into runs, cuts plain ones to the size of a step. */
async function* stepsOf(mappings: AsyncIterable<ChainMapping>): AsyncGenerator<Step> {
  let run: FrameRun | undefined;
  for await (const mapping of mappings) {
    if (mapping.kind === "compressed" && run !== undefined && continues(run, mapping)) {
      run.clusters.push(mapping);
      continue;
    }
    if (run !== undefined) yield run;
    run = undefined;
    if (mapping.kind === "compressed") run = { kind: "frames", image: mapping.image, clusters: [mapping] };
    else if (mapping.kind === "plain") yield* cutPlain(mapping);
    else yield mapping;
  }
  if (run !== undefined) yield run;
}

function continues({ clusters }: FrameRun, next: CompressedMapping): boolean {
  const [first] = clusters;
  const last = clusters.at(-1) ?? first;
  const gap = next.at - last.at;
  return (
    next.image === first.image &&
    next.offset === endOf(last) &&
    gap >= 0 &&
    gap <= last.storedLength + GAP &&
    endOf(next) - first.offset <= STEP_BYTES
  );
}

function extentOf(step: Step): Extent {
  if (step.kind !== "frames") return step;
  const [first] = step.clusters;
  return { offset: first.offset, length: endOf(step.clusters.at(-1) ?? first) - first.offset };
}

function* cutPlain(mapping: PlainMapping): Generator<Step> {
  for (let done = 0; done < mapping.length; done += STEP_BYTES) {
    const length = Math.min(STEP_BYTES, mapping.length - done);
    yield { ...mapping, offset: mapping.offset + done, at: mapping.at + done, length };
  }
}

async function load(
  chain: ImageChain,
  step: Step,
  decoder: FrameDecoder,
  signal: AbortSignal | undefined,
): Promise<DiskPiece> {
  const { offset, length } = extentOf(step);
  if (step.kind === "zero") return { offset, length, bytes: undefined };
  const reader = chain.images[step.image];
  if (reader === undefined) throw new RangeError(`the chain has no image ${step.image}`);
  const bytes =
    step.kind === "plain"
      ? await reader.source.read(step.at, length, { signal })
      : await loadFrames(reader, step, decoder, signal);
  return { offset, length, bytes };
}

async function loadFrames(
  reader: ImageReader,
  { clusters }: FrameRun,
  decoder: FrameDecoder,
  signal: AbortSignal | undefined,
): Promise<Buffer> {
  const [first] = clusters;
  const start = first.at;
  const end = Math.max(...clusters.map(({ at, storedLength }) => at + storedLength));
  const stored = await reader.source.read(start, end - start, { signal });
  const frames = clusters.map(({ at, storedLength }) => ({ at: at - start, length: storedLength }));
  const decoded = await decoder.decode({
    format: reader.format,
    object: reader.name,
    at: start,
    stored: wholeMemory(stored),
    frames,
  });
  // Only the first cluster can begin inside itself, and only the last can end early.
  return decoded.subarray(
    first.skip,
    first.skip + extentOf({ kind: "frames", image: first.image, clusters }).length,
  );
}

/** A buffer's memory, to change hands: copied if it is only a slice of a larger one. */
function wholeMemory(bytes: Buffer): ArrayBuffer {
  const { buffer, byteLength } = bytes;
  return buffer instanceof ArrayBuffer && buffer.byteLength === byteLength
    ? buffer
    : new Uint8Array(bytes).buffer;
}
