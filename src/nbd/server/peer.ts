import type { Socket } from "node:net";
import { deferred } from "../../flow/index.js";

/** The client ended the connection, in the middle of a message or between two. */
export class PeerGone extends Error {}

/**
 * A client's connection as the server uses it: what is read is read by need, so that a client which sends more than it is
 * asked for waits; what is written waits for the client to read it.
 */
export class Peer {
  readonly #socket: Socket;
  #end: Error | undefined;
  /** Wakes whoever waits for something to happen on the socket. */
  #wake: (() => void) | undefined;
  #drained: Promise<void> | undefined;
  /** The message that is being sent in parts: nothing may come between them. */
  #parts: Promise<void> | undefined;

  constructor(socket: Socket) {
    this.#socket = socket;
    const wake = (): void => this.#wake?.();
    socket.on("readable", wake);
    socket.on("end", () => this.#ended(new PeerGone("client closed the connection")));
    socket.on("close", () => this.#ended(new PeerGone("connection closed")));
    socket.on("error", (error) => this.#ended(new PeerGone(error.message, { cause: error })));
  }

  /** Whether nothing can be sent any more. */
  get isGone(): boolean {
    return this.#socket.destroyed;
  }

  /**
   * Reads exactly `count` bytes. One call at a time.
   *
   * @throws {PeerGone} when the client left before
   */
  async take(count: number): Promise<Buffer> {
    if (count === 0) return Buffer.alloc(0);
    for (;;) {
      const bytes = this.#socket.read(count) as Buffer | null;
      // At its end a stream hands out what is left, however little.
      if (bytes !== null && bytes.length === count) return bytes;
      if (this.#end !== undefined || bytes !== null) {
        throw this.#end ?? new PeerGone("client closed the connection in the middle of a message");
      }
      await new Promise<void>((resolve) => (this.#wake = resolve));
    }
  }

  /** Reads exactly `count` bytes if they are there already; undefined otherwise. */
  takeNow(count: number): Buffer | undefined {
    const bytes = this.#socket.read(count) as Buffer | null;
    return bytes?.length === count ? bytes : undefined;
  }

  /** Reads `count` bytes and forgets them. */
  async skip(count: number): Promise<void> {
    for (let left = count; left > 0;) left -= (await this.take(Math.min(left, SKIPPED_AT_ONCE))).length;
  }

  /** Sends one message; resolves when the client has room for more. @throws {PeerGone} when it left */
  async send(...parts: readonly Uint8Array[]): Promise<void> {
    while (this.#parts !== undefined) await this.#parts;
    await this.#write(parts);
  }

  /**
   * Sends one message in parts, as they come and as the client takes them. When that fails the client waits for
   * bytes that never come: the connection is good for nothing any more.
   *
   * @throws {PeerGone} when it left
   * @throws what `parts` throws
   */
  async sendInParts(parts: AsyncIterable<readonly Uint8Array[]>): Promise<void> {
    while (this.#parts !== undefined) await this.#parts;
    const sent = deferred<undefined>();
    this.#parts = sent.promise;
    try {
      for await (const part of parts) await this.#write(part);
    } finally {
      this.#parts = undefined;
      sent.resolve(undefined);
    }
  }

  async #write(parts: readonly Uint8Array[]): Promise<void> {
    if (this.#socket.destroyed) throw this.#end ?? new PeerGone("connection closed");
    let hasRoom = true;
    this.#socket.cork();
    for (const part of parts) hasRoom = this.#socket.write(part);
    this.#socket.uncork();
    if (!hasRoom) await this.#drain();
  }

  /** Ends the connection once what was sent has left. */
  async leave(): Promise<void> {
    if (this.#socket.destroyed) return;
    await new Promise<void>((resolve) => {
      this.#socket.once("close", () => resolve());
      this.#socket.destroySoon();
    });
  }

  destroy(): void {
    this.#socket.destroy();
  }

  #drain(): Promise<void> {
    this.#drained ??= new Promise<void>((resolve) => {
      const done = (): void => {
        this.#socket.off("drain", done).off("close", done);
        this.#drained = undefined;
        resolve();
      };
      this.#socket.on("drain", done).on("close", done);
    });
    return this.#drained;
  }

  #ended(reason: Error): void {
    this.#end ??= reason;
    this.#wake?.();
  }
}

const SKIPPED_AT_ONCE = 64 * 1024;
