import { connect as connectTls, type ConnectionOptions } from "node:tls";
import { connect, type OnReadOpts, type Socket } from "node:net";
import { KiB } from "../bytes/index.js";
import { messageOf, UsageError } from "../errors/index.js";
import { describeAddress, type NbdAddress } from "./address.js";
import { NbdConnectionError, NbdProtocolError } from "./errors.js";
import { withLimits } from "./limits.js";
import { TlsFailure } from "./tls-failure.js";

/** Who reads a socket. Neither method may throw. */
export interface Receiver {
  /** Bytes arrived. The buffer is reused: what is to be kept must be copied. */
  bytes(chunk: Buffer): void;
  /** The connection ended; called once. `error` is undefined when the server closed it in an orderly way. */
  ended(error: Error | undefined): void;
}

/** Size of the buffer that the kernel copies into. A unix socket hands over at most some 200 KiB at once. */
const READ_BUFFER = 256 * KiB;
/** A server may say 18 bytes before it is asked anything. */
const MAX_EARLY_BYTES = 4 * KiB;
/** `sun_path` of struct sockaddr_un without its terminating NUL. */
const MAX_SOCKET_PATH = 107;

/**
 * A connected socket on which nothing was sent. The server's greeting, if it comes before somebody
 * reads, is kept. Closing is `close(2)` without `shutdown(2)`: a duplicate of the descriptor in another
 * process keeps the connection alive.
 */
export class NbdSocket {
  readonly address: NbdAddress;
  readonly #socket: Socket;
  readonly #isHeld: boolean;
  #receiver: Receiver | undefined;
  #early: Buffer = Buffer.alloc(0);
  #end: { readonly error: Error | undefined } | undefined;
  #corked = false;
  /** What is written to and read from: the socket itself, or TLS on top of it. */
  #channel: Socket;

  /** Use `openSocket`. */
  constructor(address: NbdAddress, socket: Socket, isHeld: boolean) {
    this.address = address;
    this.#socket = socket;
    this.#isHeld = isHeld;
    this.#channel = socket;
    socket.on("error", (error) => this.destroy(error));
    socket.on("end", () => this.destroy());
    socket.on("close", () => this.destroy());
  }

  /** The file descriptor, to be duplicated into a child process; undefined when closed. */
  get fd(): number | undefined {
    // Node offers no public way; `stdio: [fd]` of child processes is documented to take it.
    const { _handle } = this.#socket as unknown as { readonly _handle: { readonly fd?: number } | null };
    return _handle?.fd !== undefined && _handle.fd >= 0 ? _handle.fd : undefined;
  }

  /** Hands all bytes and the end to `receiver` from now on, beginning with those that came before. */
  receive(receiver: Receiver): void {
    this.#receiver = receiver;
    const early = this.#early;
    this.#early = Buffer.alloc(0);
    if (early.length > 0) receiver.bytes(early);
    // The receiver may have closed the socket, or put another one in its place, because of those bytes.
    if (this.#end !== undefined && Object.is(this.#receiver, receiver)) receiver.ended(this.#end.error);
  }

  /** Sends; what is sent in one turn of the event loop leaves in one system call. */
  write(bytes: Buffer): void {
    const channel = this.#channel;
    if (channel.destroyed) return;
    if (!this.#corked) {
      this.#corked = true;
      channel.cork();
      process.nextTick(() => {
        this.#corked = false;
        channel.uncork();
      });
    }
    channel.write(bytes);
  }

  /**
   * Puts TLS between this side and the server: what is written and read from now on goes through it. The receiver
   * stays the same.
   *
   * @throws {TlsFailure} when it does not come about; the connection is of no use then
   */
  async encrypt(options: ConnectionOptions): Promise<void> {
    if (this.#channel.destroyed) throw new TlsFailure("the connection is closed", "other");
    const secure = connectTls({ ...options, socket: this.#socket });
    this.#channel = secure;
    const ready = new Promise<void>((resolve, reject) => {
      secure.once("secureConnect", resolve);
      secure.once("error", (error: Error) => reject(TlsFailure.ofError(secure, error)));
      secure.once("end", () => reject(new TlsFailure("server closed the connection", "mismatch")));
      secure.once("close", () => reject(new TlsFailure("the connection was closed", "mismatch")));
    });
    // Wait for the outcome before the receiver is told of an end.
    try {
      await ready;
    } finally {
      secure.on("error", (error: Error) => this.destroy(error));
      secure.on("end", () => this.destroy());
      secure.on("close", () => this.destroy());
    }
    secure.on("data", (chunk: Buffer) => this.deliver(chunk));
  }

  /**
   * Says that nothing more will come (`shutdown(2)`, which other holders of the connection feel too), and
   * waits until all that was written has left, or the connection is gone. Never fails.
   */
  async finish(): Promise<void> {
    const channel = this.#channel;
    if (channel.destroyed) return;
    await new Promise<void>((resolve) => {
      channel.once("close", () => resolve());
      channel.end(() => resolve());
    });
  }

  /** Closes at once. The receiver is told, if it was not before. */
  destroy(error?: Error): void {
    this.#channel.destroy();
    this.#socket.destroy();
    this.#ended(error);
  }

  /** Gives the connection up: as `destroy`, but one that is held stays open, and what still arrives is dropped. */
  abandon(error?: Error): void {
    if (!this.#isHeld) {
      this.#channel.destroy();
      this.#socket.destroy();
    }
    this.#ended(error);
  }

  /** For `openSocket`: what arrived, in the reused buffer. */
  deliver(chunk: Buffer): void {
    if (this.#end !== undefined) return;
    if (this.#receiver !== undefined) {
      this.#receiver.bytes(chunk);
      return;
    }
    if (this.#early.length + chunk.length > MAX_EARLY_BYTES) {
      const what = `Cannot talk to NBD server ${describeAddress(this.address)}`;
      const text = `it sent ${this.#early.length + chunk.length} bytes before it was asked anything`;
      this.abandon(new NbdProtocolError("TM_NBD_FLOOD", `${what}: ${text}`));
      return;
    }
    this.#early = Buffer.concat([this.#early, chunk]);
  }

  #ended(error: Error | undefined): void {
    if (this.#end !== undefined) return;
    this.#end = { error };
    this.#receiver?.ended(error);
  }
}

/** A host with several addresses fails with one error for each, and no message of its own. */
function reasonOf(error: Error): string {
  return error instanceof AggregateError ? error.errors.map(messageOf).join(", ") : error.message;
}

/** Options of `openSocket`. */
export interface OpenSocketOptions {
  /**
   * Whatever fails, the connection stays open until it is destroyed: a server that keeps silent or breaks the protocol
   * ends the requests, not the connection. (There are builds of QEMU that abort when a client leaves.) Default false.
   */
  readonly hold?: boolean | undefined;
  readonly signal?: AbortSignal | undefined;
  /** How long connecting may take. Default 10 seconds. */
  readonly timeoutMs?: number | undefined;
}

/**
 * Connects, and sends nothing: the descriptor can be handed to another process before negotiation starts.
 *
 * @throws {NbdConnectionError} TM_NBD_CONNECT when nobody listens there, TM_NBD_TIMEOUT
 * @throws {UsageError} when the path is too long for a unix socket
 * @throws `signal.reason` when aborted
 */
export async function openSocket(address: NbdAddress, options: OpenSocketOptions = {}): Promise<NbdSocket> {
  const { hold = false, signal, timeoutMs = 10_000 } = options;
  signal?.throwIfAborted();
  const name = describeAddress(address);
  if (address.transport === "unix" && Buffer.byteLength(address.path) > MAX_SOCKET_PATH) {
    throw new UsageError(`Cannot connect to ${name}: the path is longer than ${MAX_SOCKET_PATH} bytes`);
  }
  let opened: NbdSocket | undefined;
  const onread: OnReadOpts = {
    buffer: Buffer.allocUnsafeSlow(READ_BUFFER),
    callback: (count, buffer) => {
      opened?.deliver(Buffer.from(buffer.buffer, buffer.byteOffset, count));
      return true;
    },
  };
  const target = address.transport === "unix" ? { path: address.path } : address;
  const socket = connect({ ...target, noDelay: true, onread });
  const nbdSocket = (opened = new NbdSocket(address, socket, hold));
  const what = `Cannot connect to NBD server ${name}`;
  const connected = new Promise<void>((resolve, reject) => {
    socket.once("connect", resolve);
    socket.once("error", (cause) => {
      reject(new NbdConnectionError("TM_NBD_CONNECT", `${what}: ${reasonOf(cause)}`, { cause }));
    });
    socket.once("close", () => reject(new NbdConnectionError("TM_NBD_CONNECT", `${what}: closed`)));
  });
  await withLimits(connected, { what, signal, timeoutMs, end: (reason) => nbdSocket.destroy(reason) });
  return nbdSocket;
}
