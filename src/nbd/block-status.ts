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

/** The two forms of a block status payload, in bytes. */
interface StatusForm {
  /** Before the descriptors. */
  readonly head: number;
  readonly descriptor: number;
}
/** NBD_REPLY_TYPE_BLOCK_STATUS */
const COMPACT: StatusForm = { head: 4, descriptor: 8 };
/** NBD_REPLY_TYPE_BLOCK_STATUS_EXT */
const EXTENDED: StatusForm = { head: 8, descriptor: 16 };

/** Whether a block status payload may have this many bytes: its head and one or more whole descriptors. */
export function isStatusLength(length: number, isExtended: boolean): boolean {
  const { head, descriptor } = isExtended ? EXTENDED : COMPACT;
  const descriptors = (length - head) / descriptor;
  return Number.isInteger(descriptors) && descriptors >= 1 && descriptors <= MAX_DESCRIPTORS;
}

/** Largest payload of any block status chunk. */
export const MAX_STATUS_PAYLOAD = EXTENDED.head + EXTENDED.descriptor * MAX_DESCRIPTORS;

/**
 * Descriptors of a block status payload, as runs. The last one may reach past the request (the specification
 * allows it when the server knows) and is clipped; every one must begin inside it.
 *
 *     NBD_REPLY_TYPE_BLOCK_STATUS:
 *     32 bits, metadata context ID
 *     each: 32 bits, length (unsigned, MUST NOT be zero); 32 bits, status flags
 *
 *     NBD_REPLY_TYPE_BLOCK_STATUS_EXT, which replaces it where extended headers were negotiated:
 *     32 bits, metadata context ID
 *     32 bits, descriptor count
 *     each: 64 bits, length (unsigned, MUST NOT be zero); 64 bits, status flags
 *
 * @param payload of a length that `isStatusLength` accepts
 * @param fault throws the error for a descriptor that is empty or begins outside the request
 */
export function decodeBlockStatus(
  payload: Buffer,
  isExtended: boolean,
  offset: number,
  length: number,
  fault: Fault,
): BlockRun[] {
  const reader = new ByteReader(payload).skip(4);
  if (isExtended) requireCount(reader, fault);
  const end = offset + length;
  const runs: BlockRun[] = [];
  for (let at = offset; reader.remaining > 0;) {
    const runLength = isExtended ? Number(reader.u64()) : reader.u32();
    const flags = isExtended ? wideFlags(reader, fault) : reader.u32();
    if (runLength === 0) fault("TM_NBD_EMPTY_EXTENT", `extent ${runs.length} has no length`);
    if (at >= end) {
      fault("TM_NBD_STATUS_LENGTH", `extent ${runs.length} begins past the ${length} bytes`);
    }
    runs.push({ offset: at, length: Math.min(runLength, end - at), flags });
    at += runLength;
  }
  return runs;
}

function requireCount(reader: ByteReader, fault: Fault): void {
  const count = reader.u32();
  const actual = reader.remaining / EXTENDED.descriptor;
  if (count !== actual) {
    fault("TM_NBD_STATUS_LENGTH", `block status announces ${count} extents, ${actual} are there`);
  }
}

/** No context known here has more than 32 flags; what a number cannot hold would be told wrongly. */
function wideFlags(reader: ByteReader, fault: Fault): number {
  const flags = reader.u64();
  if (flags <= BigInt(Number.MAX_SAFE_INTEGER)) return Number(flags);
  return fault("TM_NBD_STATUS_FLAGS", `an extent has the flags 0x${flags.toString(16)}`);
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
