import { ByteReader } from "../bytes/index.js";
import type { Fault } from "./errors.js";

/** A run of bytes that one metadata context describes alike. */
export interface BlockRun {
  readonly offset: number;
  readonly length: number;
  /** The context's status flags: NBD_STATE_… for those known here. */
  readonly flags: number;
}

/** Descriptors that one chunk may carry at most: what nbdkit sends; QEMU ends at 131,072. */
export const MAX_DESCRIPTORS = 1024 * 1024;
/** Largest payload of a block status chunk: context id and descriptors. */
export const MAX_STATUS_PAYLOAD = 4 + 8 * MAX_DESCRIPTORS;

/** Whether a block status payload may have this many bytes: "4 + (a positive integer multiple of 8)". */
export function isStatusLength(length: number): boolean {
  return length >= 12 && length <= MAX_STATUS_PAYLOAD && length % 8 === 4;
}

/**
 * Descriptors of an NBD_REPLY_TYPE_BLOCK_STATUS payload, as runs. The last one may reach past the request
 * (the specification allows it when the server knows) and is clipped; every one must begin inside it.
 *
 *     32 bits, metadata context ID
 *     each: 32 bits, length (unsigned, MUST NOT be zero); 32 bits, status flags
 *
 * @param payload of a length that `isStatusLength` accepts
 * @param fault throws the error for a descriptor that is empty or begins outside the request
 */
export function decodeBlockStatus(payload: Buffer, offset: number, length: number, fault: Fault): BlockRun[] {
  const reader = new ByteReader(payload).skip(4);
  const end = offset + length;
  const runs: BlockRun[] = [];
  for (let at = offset; reader.remaining > 0;) {
    const runLength = reader.u32();
    const flags = reader.u32();
    if (runLength === 0) fault("TM_NBD_EMPTY_EXTENT", `extent ${runs.length} has no length`);
    if (at >= end) {
      fault("TM_NBD_STATUS_LENGTH", `extent ${runs.length} begins past the ${length} bytes`);
    }
    runs.push({ offset: at, length: Math.min(runLength, end - at), flags });
    at += runLength;
  }
  return runs;
}

/** The parts of sorted runs that lie in [offset, offset + length). */
export function clipRuns(runs: readonly BlockRun[], offset: number, length: number): BlockRun[] {
  const end = offset + length;
  return runs.flatMap((run) => {
    const from = Math.max(run.offset, offset);
    const to = Math.min(run.offset + run.length, end);
    return to > from ? [{ offset: from, length: to - from, flags: run.flags }] : [];
  });
}

/** Joins neighbours with equal flags, across the batches in which they arrive. */
export async function* joinRuns(batches: AsyncIterable<readonly BlockRun[]>): AsyncGenerator<BlockRun> {
  let held: BlockRun | undefined;
  for await (const batch of batches) {
    for (const run of batch) {
      if (held === undefined) held = run;
      else if (held.flags === run.flags && held.offset + held.length === run.offset) {
        held = { offset: held.offset, length: held.length + run.length, flags: held.flags };
      } else {
        yield held;
        held = run;
      }
    }
  }
  if (held !== undefined) yield held;
}
