import { createHash } from "node:crypto";
import { z } from "zod";
import { KiB, type IoOptions } from "../bytes/index.js";
import { ObjectNotFoundError, type Storage } from "../storage/index.js";
import { LockUnreadableError } from "./errors.js";
import { firstIssue, parseJson } from "./manifest-codec.js";

const MAX_LOCK_BYTES = 64 * KiB;
const text = z.string().max(1024);

/** The content of a lock: who holds it. */
export const holderSchema = z
  .looseObject({
    /** Random, new for each holding. */
    token: z.string().regex(/^[0-9a-f]{32}$/),
    machineId: text.nullable(),
    bootId: text.nullable(),
    pidNamespace: text.nullable(),
    pid: z.int().positive(),
    /** In clock ticks since boot: tells a process from a later one with its number. */
    startTime: text.nullable(),
    host: text,
    since: z.iso.datetime(),
    heartbeat: z.iso.datetime(),
  })
  .readonly();

export type Holder = z.output<typeof holderSchema>;

/** A holder, for messages. */
export function describeHolder(holder: Holder): string {
  return `process ${holder.pid} on host "${holder.host}"`;
}

/** The bytes of a lock. */
export function encodeHolder(holder: Holder): Buffer {
  return Buffer.from(`${JSON.stringify(holder, null, 1)}\n`, "utf8");
}

/**
 * The holder that a lock names; undefined when there is definitely no lock.
 *
 * @throws {LockUnreadableError} when it is no lock that tidemark wrote
 */
export async function readHolder(
  storage: Storage,
  key: string,
  options: IoOptions = {},
): Promise<Holder | undefined> {
  const occupant = await readOccupant(storage, key, options);
  if (occupant !== undefined && "unreadable" in occupant) throw occupant.unreadable;
  return occupant;
}

/** What holds a lock whose content is not what tidemark writes: a computer's crash may have damaged it. */
export interface Stranger {
  /** Made of the content: it changes with it, and claims bear it as they do a holder's. */
  readonly token: string;
  readonly unreadable: LockUnreadableError;
}

/** As `readHolder`, but something that cannot be understood is an answer. */
export async function readOccupant(
  storage: Storage,
  key: string,
  options: IoOptions = {},
): Promise<Holder | Stranger | undefined> {
  let bytes: Buffer;
  try {
    bytes = await storage.get(key, { maxLength: MAX_LOCK_BYTES, ...options });
  } catch (error) {
    if (error instanceof ObjectNotFoundError) return undefined;
    throw error;
  }
  const unreadable = (what: string, cause: unknown): LockUnreadableError =>
    new LockUnreadableError(key, storage.description, what, cause);
  try {
    const parsed = holderSchema.safeParse(parseJson(bytes, unreadable));
    if (parsed.success) return parsed.data;
    throw unreadable(firstIssue(parsed.error), parsed.error);
  } catch (error) {
    if (!(error instanceof LockUnreadableError)) throw error;
    return { token: createHash("md5").update(bytes).digest("hex"), unreadable: error };
  }
}
