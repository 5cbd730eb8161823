/**
 * Errors: one base class with a stable `code`, and classes that tell what still works afterwards.
 *
 *     TidemarkError               failed; exit code 1 unless a class below says otherwise
 *     |- UsageError               the request is wrong: nothing was tried                       (exit 2)
 *     |- NotFoundError            repository, machine, point or disk is not there               (exit 4)
 *     |- BusyError                somebody else holds it: another run, another program          (exit 5)
 *     |- DamageError              stored bytes are not what was stored                          (exit 6)
 *     |- ConnectionError          the connection is dead: every request on it has ended
 *     |  `- ProtocolError         ... because the peer broke the protocol
 *     `- RequestError             the peer refused one request: the connection still works
 *
 * An abort is not an error of ours: `signal.reason` is rethrown as it is.
 * Messages: the action first, then actual and expected, naming the disk, point or object; no full stop.
 */

/** What an error can carry besides its message. */
export interface ErrorDetails {
  readonly cause?: unknown;
  /** What the operator can do about it, one sentence. */
  readonly hint?: string | undefined;
}

/** Base of all errors that tidemark throws on purpose. */
export class TidemarkError extends Error {
  /** Stable, for programs: `TM_…`. */
  readonly code: string;
  readonly hint: string | undefined;

  constructor(code: string, message: string, details: ErrorDetails = {}) {
    super(message, "cause" in details ? { cause: details.cause } : undefined);
    this.name = new.target.name;
    this.code = code;
    this.hint = details.hint;
  }
}

/** Wrong usage, configuration or argument; nothing was changed. */
export class UsageError extends TidemarkError {
  constructor(message: string, details?: ErrorDetails) {
    super("TM_USAGE", message, details);
  }
}

/** Something named by the user does not exist. */
export class NotFoundError extends TidemarkError {}

/** Something is locked or in use by another run or program; it was not touched. */
export class BusyError extends TidemarkError {}

/** What a damage concerns, for `verify` and for exit code 6. */
export interface Damage {
  /** Key of the damaged object in the repository. */
  readonly object: string;
  /** Ids of the points that cannot be trusted because of it, where known. */
  readonly points?: readonly string[];
}

/** Stored bytes differ from what was stored. */
export class DamageError extends TidemarkError {
  readonly damage: Damage;

  constructor(code: string, message: string, damage: Damage, details?: ErrorDetails) {
    super(code, message, details);
    this.damage = damage;
  }
}

/** The connection to a peer is dead; every pending request on it has ended with this error. */
export class ConnectionError extends TidemarkError {}

/** The peer broke its protocol; the connection was closed because of it. */
export class ProtocolError extends ConnectionError {}

/** The peer refused one request; the connection is still usable. */
export class RequestError extends TidemarkError {}

/** The text of anything thrown. */
export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
