import { deferred, type Deferred } from "../flow/index.js";
import { NbdConnectionError, NbdProtocolError } from "./errors.js";
import type { Receiver } from "./socket.js";

interface Waiter extends Deferred<Buffer> {
  readonly count: number;
  readonly part: string;
}

/** In lockstep a server never owes more than one reply; more than this waiting is a flood. */
const MAX_WAITING_BYTES = 1024 * 1024;

/** The handshake's bytes, pulled: a dialogue in which each side waits for the other. */
export class HandshakeStream implements Receiver {
  readonly #action: string;
  #bytes: Buffer = Buffer.alloc(0);
  #waiter: Waiter | undefined;
  #end: Error | undefined;

  /** @param action for messages: `Cannot negotiate export "sda" with unix:/run/vm.sock` */
  constructor(action: string) {
    this.#action = action;
  }

  /**
   * The next `count` bytes.
   *
   * @param part what they are, for messages: "the greeting"
   * @throws {NbdConnectionError} TM_NBD_EOF_HANDSHAKE when the connection ends before
   */
  async take(count: number, part: string): Promise<Buffer> {
    const waiter: Waiter = { ...deferred<Buffer>(), count, part };
    this.#waiter = waiter;
    this.#serve();
    return waiter.promise;
  }

  /** What has arrived and was not taken: belongs to whoever reads the socket next. */
  rest(): Buffer {
    return this.#bytes;
  }

  bytes(chunk: Buffer): void {
    if (this.#end !== undefined) return;
    if (this.#bytes.length + chunk.length > MAX_WAITING_BYTES) {
      this.ended(
        new NbdProtocolError("TM_NBD_FLOOD", `${this.#action}: server sends more than was asked for`),
      );
      return;
    }
    this.#bytes = Buffer.concat([this.#bytes, chunk]);
    this.#serve();
  }

  ended(error: Error | undefined): void {
    this.#end ??= error === undefined ? this.#closed() : this.#failed(error);
    this.#serve();
  }

  #serve(): void {
    const waiter = this.#waiter;
    if (waiter === undefined) return;
    if (this.#bytes.length >= waiter.count) {
      this.#waiter = undefined;
      waiter.resolve(this.#bytes.subarray(0, waiter.count));
      this.#bytes = this.#bytes.subarray(waiter.count);
    } else if (this.#end !== undefined) {
      this.#waiter = undefined;
      waiter.reject(this.#end);
    }
  }

  /** What the system or TLS says of a connection is put in our words; our own errors are left as they are. */
  #failed(error: Error): Error {
    if (error instanceof NbdConnectionError || error instanceof NbdProtocolError) return error;
    return new NbdConnectionError("TM_NBD_CONNECTION", `${this.#action}: ${error.message}`, { cause: error });
  }

  #closed(): NbdConnectionError {
    const { part, count } = this.#waiter ?? { part: "the next message", count: 0 };
    const got = `server closed the connection after ${this.#bytes.length} of ${count} bytes of ${part}`;
    return new NbdConnectionError("TM_NBD_EOF_HANDSHAKE", `${this.#action}: ${got}`);
  }
}
