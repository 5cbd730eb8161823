import { MiB, readInto } from "../bytes/index.js";
import type { Extent } from "../extent/index.js";
import { anySignal, Budget } from "../flow/index.js";
import type { ImageChain } from "../qcow2/index.js";
import { mostOfRead, planWindows, type Window, type WindowRead } from "./chain-window.js";
import type { FrameDecoder } from "./frame-decoder.js";

/** A part of a disk. */
export interface DiskPiece extends Extent {
  /** The content; undefined where the disk reads as zero. */
  readonly bytes: Buffer | undefined;
}

/** Windows in memory: one at the consumer, the others being loaded; bytes of data in each. */
const WINDOWS = 3;
const WINDOW_BYTES = 10 * MiB;

/** Bytes of memory that a decoder needs for streaming: windows, and the stored bytes that are not decoded yet. */
export const STREAM_MEMORY = WINDOWS * WINDOW_BYTES + 10 * MiB;

/**
 * Streams a range of a chain's disk, window by window in the order of the disk, decoding on worker threads and
 * loading ahead: within a window, each image's frames are fetched in the order of its file, in large reads, and what
 * an image further up supersedes is not fetched. A consumer that waits holds back the reads. Memory does not grow
 * with the disk nor with the chain, its tables aside.
 *
 * @param decoder with STREAM_MEMORY bytes of memory, which one stream at a time may use
 * @returns the pieces of each window, in the order of the disk. Their bytes are valid until the next window is asked for
 * @throws {DamageError} when an image's tables or frames are not what was stored; no piece of that window was handed out
 */
export async function* streamChain(
  chain: ImageChain,
  range: Extent,
  decoder: FrameDecoder,
  options: { readonly signal?: AbortSignal | undefined } = {},
): AsyncGenerator<readonly DiskPiece[]> {
  const ending = new AbortController();
  const signal = anySignal(options.signal, ending.signal);
  const largest = Math.max(...chain.images.map(({ clusterSize }) => clusterSize));
  const load = { chain, decoder, signal, slots: new Slots(decoder.memory, largest) };
  const free = Array.from({ length: WINDOWS }, (_, index) => index * WINDOW_BYTES);
  const loading: { readonly base: number; readonly pieces: Promise<readonly DiskPiece[]> }[] = [];
  let begun: Promise<void> = Promise.resolve();
  try {
    for await (const window of planWindows(chain.map(range.offset, range.length, { signal }), WINDOW_BYTES)) {
      const base = free.pop() ?? 0;
      const { all, pieces } = loadWindow(window, base, load, begun);
      begun = all;
      // The rejection is seen when the window's turn comes; until then it is not unhandled.
      pieces.catch(() => undefined);
      loading.push({ base, pieces });
      if (loading.length === WINDOWS) yield* handOut();
    }
    while (loading.length > 0) yield* handOut();
  } finally {
    ending.abort();
    await Promise.allSettled(loading.map(({ pieces }) => pieces));
  }

  async function* handOut(): AsyncGenerator<readonly DiskPiece[]> {
    const [next] = loading;
    if (next === undefined) return;
    yield await next.pieces;
    loading.shift();
    free.push(next.base);
  }
}

/** What loading works with. */
interface Load {
  readonly chain: ImageChain;
  readonly decoder: FrameDecoder;
  readonly signal: AbortSignal;
  readonly slots: Slots;
}

/**
 * Loads a window.
 *
 * @param base where its bytes begin in the decoder's memory
 * @param turn resolves when the window before it has begun all its reads: the one that is wanted first goes first
 * @returns all: when this one has; never rejects
 */
function loadWindow(
  window: Window,
  base: number,
  load: Load,
  turn: Promise<void>,
): { readonly all: Promise<void>; readonly pieces: Promise<DiskPiece[]> } {
  const running: Promise<void>[] = [];
  const begin = async (): Promise<void> => {
    await turn;
    for (const read of window.reads) {
      const slot = await load.slots.take(load);
      const reading = loadRead(read, base, slot, load).finally(() => load.slots.give(slot));
      // Its failure is thrown below, when all have ended.
      reading.catch(() => undefined);
      running.push(reading);
    }
  };
  const beginning = begin();
  const finish = async (): Promise<DiskPiece[]> => {
    try {
      await beginning;
    } finally {
      await Promise.allSettled(running);
    }
    await Promise.all(running);
    return window.parts.map(({ offset, length, from }) => {
      const bytes = from === undefined ? undefined : Buffer.from(load.decoder.memory, base + from, length);
      return { offset, length, bytes };
    });
  };
  return { all: beginning.catch(() => undefined), pieces: finish() };
}

/** Reads stored bytes and puts what they hold in its place. */
async function loadRead(
  { image, at, length, content }: WindowRead,
  base: number,
  slot: number,
  { chain, decoder, signal }: Load,
): Promise<void> {
  const reader = chain.images[image];
  if (reader === undefined) throw new RangeError(`the chain has no image ${image}`);
  const { source, format, name: object } = reader;
  const place = "into" in content ? base + content.into : slot;
  await readInto(source, at, Buffer.from(decoder.memory, place, length), { signal });
  if ("into" in content) return;
  await decoder.decode({ format, object, at, slot, base, frames: content.frames });
}

/** Room for stored bytes, behind the windows: a slot for each read that is under way. */
class Slots {
  readonly #budget: Budget;
  readonly #free: number[];

  /** @param clusterSize of the chain's images, at most */
  constructor(memory: SharedArrayBuffer, clusterSize: number) {
    const size = mostOfRead(clusterSize);
    const count = Math.floor((memory.byteLength - WINDOWS * WINDOW_BYTES) / size);
    this.#free = Array.from({ length: count }, (_, index) => WINDOWS * WINDOW_BYTES + index * size);
    this.#budget = new Budget(count);
  }

  async take(options: { readonly signal: AbortSignal }): Promise<number> {
    await this.#budget.take(1, options);
    const slot = this.#free.pop();
    if (slot === undefined) throw new RangeError("more slots are in use than there are");
    return slot;
  }

  give(slot: number): void {
    this.#free.push(slot);
    this.#budget.give(1);
  }
}
