import { ConnectionError, messageOf, TidemarkError } from "../errors/index.js";
import { pause } from "../flow/index.js";

/**
 * How often one connection is replaced. A lost one may still count with the server, and stays open on this side until
 * the exports are gone: so the number bounds what a backup takes in all, and not what it takes in a row.
 */
export const MOST_REPLACEMENTS = 4;

/** Before each attempt, in milliseconds. */
const PAUSES: readonly number[] = [0, 100, 300, 1000];

/** The connection is gone, by no fault of what was asked. A server that only keeps silent is not asked once more. */
const LOST: ReadonlySet<string> = new Set([
  "TM_NBD_EOF",
  "TM_NBD_EOF_HEADER",
  "TM_NBD_EOF_PAYLOAD",
  "TM_NBD_EOF_HANDSHAKE",
  "TM_NBD_CONNECTION",
]);
/** The same for making another one. */
const NOT_MADE: ReadonlySet<string> = new Set([...LOST, "TM_NBD_CONNECT", "TM_NBD_TIMEOUT"]);

/** What connections that are replaced have in common. */
export interface ReplacementOptions {
  /**
   * Called when a new connection is open and nothing was said on it yet: has duplicates of all connections handed to
   * whoever must hold them.
   */
  readonly protect: () => Promise<void>;
  /** Nothing is replaced any more once it is aborted. */
  readonly signal: AbortSignal;
}

/** One place for a connection: how it is filled anew. */
export interface Replaceable {
  /** What is read, for messages: `disk "vda"`. */
  readonly what: string;
  /** Connects; nothing is said on the new connection yet. Those before stay as they are. */
  open(): Promise<void>;
  /** Negotiates the newest connection as the one before it was. */
  greet(): Promise<void>;
}

/**
 * Replaces a connection that drops, and repeats what was asked of it: reading a frozen point twice gives the same. A
 * few times, with pauses, since an export that is gone stays gone.
 */
export class Replacement {
  readonly #target: Replaceable;
  readonly #options: ReplacementOptions;
  #attempts = 0;
  /** Counts the connections that there were: one that is lost is replaced once, however many requests it took along. */
  #generation = 0;
  #underWay: Promise<void> | undefined;

  constructor(target: Replaceable, options: ReplacementOptions) {
    this.#target = target;
    this.#options = options;
  }

  /**
   * Asks something of the connection, again on a new one when it was lost.
   *
   * @throws what `request` throws, but for a lost connection
   * @throws {ConnectionError} TM_NBD_LOST when it was lost too often
   */
  async run<T>(request: () => Promise<T>): Promise<T> {
    for (;;) {
      const generation = this.#generation;
      try {
        return await request();
      } catch (error) {
        if (!hasCode(error, LOST) || this.#options.signal.aborted) throw error;
        if (generation === this.#generation) await this.#replaceOnce(error);
      }
    }
  }

  #replaceOnce(failure: unknown): Promise<void> {
    this.#underWay ??= this.#replace(failure).finally(() => (this.#underWay = undefined));
    return this.#underWay;
  }

  async #replace(failure: unknown): Promise<void> {
    for (let reason = failure; ;) {
      if (this.#attempts === MOST_REPLACEMENTS) throw this.#tooOften(reason);
      await pause(PAUSES[this.#attempts] ?? 0, this.#options.signal);
      this.#attempts += 1;
      try {
        await this.#target.open();
        await this.#options.protect();
        await this.#target.greet();
        this.#generation += 1;
        return;
      } catch (error) {
        if (!hasCode(error, NOT_MADE)) throw error;
        reason = error;
      }
    }
  }

  #tooOften(reason: unknown): ConnectionError {
    const text = `its connection to QEMU was lost, and again after ${MOST_REPLACEMENTS} attempts to replace it: ${messageOf(reason)}`;
    return new ConnectionError("TM_NBD_LOST", `Cannot go on reading ${this.#target.what}: ${text}`, {
      cause: reason,
      hint: "See whether QEMU is well and what it has logged, then run the backup again",
    });
  }
}

function hasCode(error: unknown, codes: ReadonlySet<string>): boolean {
  return error instanceof TidemarkError && codes.has(error.code);
}
