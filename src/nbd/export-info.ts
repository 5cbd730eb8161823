import type { ByteReader } from "../bytes/index.js";
import { GiB, MiB, KiB } from "../bytes/index.js";
import {
  NBD_FLAG_CAN_MULTI_CONN,
  NBD_FLAG_HAS_FLAGS,
  NBD_FLAG_READ_ONLY,
  NBD_FLAG_ROTATIONAL,
  NBD_FLAG_SEND_CACHE,
  NBD_FLAG_SEND_DF,
  NBD_FLAG_SEND_FAST_ZERO,
  NBD_FLAG_SEND_FLUSH,
  NBD_FLAG_SEND_FUA,
  NBD_FLAG_SEND_TRIM,
  NBD_FLAG_SEND_WRITE_ZEROES,
} from "./constants.js";
import type { Fault } from "./errors.js";

/** The transmission flags, by name. */
export interface ExportFlags {
  readonly readOnly: boolean;
  readonly sendFlush: boolean;
  readonly sendFua: boolean;
  readonly rotational: boolean;
  readonly sendTrim: boolean;
  readonly sendWriteZeroes: boolean;
  /** Reads can be asked for in one piece. */
  readonly sendDf: boolean;
  /** Several connections see one state. */
  readonly canMultiConn: boolean;
  readonly sendCache: boolean;
  readonly sendFastZero: boolean;
}

/** Block size constraints, in bytes. */
export interface BlockSize {
  /** Offsets and lengths must be multiples of it; a power of two. */
  readonly minimum: number;
  readonly preferred: number;
  /** Longest payload of one request. */
  readonly maximum: number;
}

/** What was negotiated about an export. */
export interface NbdExport {
  readonly name: string;
  /** Bytes. */
  readonly size: number;
  readonly flags: ExportFlags;
  readonly blockSize: BlockSize;
  /** Names of the metadata contexts that the server granted; those asked for that are missing it lacks. */
  readonly contexts: readonly string[];
  /** Whether replies are structured. Without, there are no metadata contexts. */
  readonly structuredReplies: boolean;
  /** Whether lengths have 64 bits (NBD_OPT_EXTENDED_HEADERS); replies are structured then. */
  readonly extendedHeaders: boolean;
}

/**
 * Used when a server advertises no constraints: "a client desiring maximum interoperability SHOULD constrain
 * its requests to a minimum block size of 2^9, and limit NBD_CMD_READ ... to a maximum of 2^25".
 */
export const DEFAULT_BLOCK_SIZE: BlockSize = { minimum: 512, preferred: 4 * KiB, maximum: 32 * MiB };

/** "this value MUST be a power of 2, MUST NOT be larger than 2^16" */
const MAX_MINIMUM = 64 * KiB;

/** 16 bits, transmission flags. Unknown ones are ignored. */
export function decodeExportFlags(flags: number): ExportFlags {
  const has = (flag: number): boolean => (flags & flag) !== 0;
  return {
    readOnly: has(NBD_FLAG_READ_ONLY),
    sendFlush: has(NBD_FLAG_SEND_FLUSH),
    sendFua: has(NBD_FLAG_SEND_FUA),
    rotational: has(NBD_FLAG_ROTATIONAL),
    sendTrim: has(NBD_FLAG_SEND_TRIM),
    sendWriteZeroes: has(NBD_FLAG_SEND_WRITE_ZEROES),
    sendDf: has(NBD_FLAG_SEND_DF),
    canMultiConn: has(NBD_FLAG_CAN_MULTI_CONN),
    sendCache: has(NBD_FLAG_SEND_CACHE),
    sendFastZero: has(NBD_FLAG_SEND_FAST_ZERO),
  };
}

/**
 * NBD_INFO_EXPORT, behind its type.
 *
 *     64 bits, size of the export in bytes (unsigned)
 *     16 bits, transmission flags
 */
export function decodeInfoExport(reader: ByteReader, fault: Fault): { size: number; flags: ExportFlags } {
  const size = reader.u64();
  const flags = reader.u16();
  if (size > BigInt(Number.MAX_SAFE_INTEGER)) {
    fault("TM_NBD_EXPORT_SIZE", `export has ${size.toString()} bytes, at most 8 PiB can be read`);
  }
  if ((flags & NBD_FLAG_HAS_FLAGS) === 0) {
    fault("TM_NBD_EXPORT_FLAGS", `transmission flags ${flags} lack NBD_FLAG_HAS_FLAGS`);
  }
  return { size: Number(size), flags: decodeExportFlags(flags) };
}

/**
 * NBD_INFO_BLOCK_SIZE, behind its type. Section "Block size constraints".
 *
 *     32 bits, minimum block size
 *     32 bits, preferred block size
 *     32 bits, maximum block size
 */
export function decodeInfoBlockSize(reader: ByteReader, fault: Fault): BlockSize {
  const blockSize = { minimum: reader.u32(), preferred: reader.u32(), maximum: reader.u32() };
  const { minimum, preferred, maximum } = blockSize;
  const refuse = (why: string): never =>
    fault("TM_NBD_BLOCK_SIZE", `block sizes ${minimum}/${preferred}/${maximum}: ${why}`);
  if (!isPowerOfTwo(minimum) || minimum > MAX_MINIMUM) {
    refuse(`the minimum is not a power of two up to ${MAX_MINIMUM}`);
  }
  if (!isPowerOfTwo(preferred) || preferred < minimum) {
    refuse("the preferred one is not a power of two from the minimum on");
  }
  // "MUST be either an integer multiple of the minimum block size or the value 0xffffffff"
  if (maximum < minimum || (maximum !== 4 * GiB - 1 && maximum % minimum !== 0)) {
    refuse("the maximum is not a multiple of the minimum");
  }
  return blockSize;
}

function isPowerOfTwo(value: number): boolean {
  return value > 0 && (value & (value - 1)) === 0;
}
