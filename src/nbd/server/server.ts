import { setMaxListeners } from "node:events";
import { chmod, rm } from "node:fs/promises";
import { createServer, type Server, type Socket } from "node:net";
import { UsageError, messageOf } from "../../errors/index.js";
import { anySignal, withDeadline } from "../../flow/index.js";
import { describeAddress, type NbdAddress } from "../address.js";
import { NbdConnectionError } from "../errors.js";
import { shakeHands } from "./handshake.js";
import { Peer, PeerGone } from "./peer.js";
import type { ServedExport } from "./served-export.js";
import { transmit } from "./transmission.js";

/** How long a client may take to choose an export, in milliseconds. */
const HANDSHAKE_DEADLINE = 10_000;
const MAX_CONNECTIONS = 64;
/** How long a TCP connection may be silent before the kernel asks whether its peer is still there, in milliseconds. */
const KEEP_ALIVE = 60_000;

export interface NbdServerOptions {
  /** The first one is the default export. */
  readonly exports: readonly ServedExport[];
  /** Connections at a time; those beyond are hung up on at once. Default 64. Each may make the server hold some MiB. */
  readonly maxConnections?: number | undefined;
  /** Told what ended a connection other than by the client's leave, and which reads failed. */
  readonly onProblem?: ((error: unknown) => void) | undefined;
}

/**
 * A read-only NBD server: fixed newstyle, structured replies, metadata contexts, any number of clients and
 * connections at once. A client that misbehaves costs no more than its own connection.
 */
export class NbdServer {
  /** Where it listens: with the port that was found, if port 0 was asked for. */
  readonly address: NbdAddress;
  readonly #server: Server;
  readonly #options: NbdServerOptions;
  readonly #stop = new AbortController();
  readonly #connections = new Set<Promise<void>>();
  /** Connections were turned away, and none has ended since. */
  #isFull = false;

  private constructor(server: Server, address: NbdAddress, options: NbdServerOptions) {
    this.#server = server;
    this.address = address;
    this.#options = options;
    // Every connection listens.
    setMaxListeners(0, this.#stop.signal);
    server.on("connection", (socket) => this.#welcome(socket));
    server.on("drop", () => this.#turnAway());
  }

  /**
   * Listens. A unix socket is readable and writable by its owner alone.
   *
   * @throws {UsageError} when the address cannot be listened at; a path that is there is never replaced
   */
  static async listen(address: NbdAddress, options: NbdServerOptions): Promise<NbdServer> {
    const server = createServer({ pauseOnConnect: true });
    server.maxConnections = options.maxConnections ?? MAX_CONNECTIONS;
    await new Promise<void>((resolve, reject) => {
      server.once("error", (error) =>
        reject(
          new UsageError(`Cannot listen at ${describeAddress(address)}: ${messageOf(error)}`, {
            cause: error,
            hint: "Its directory must exist, and nothing else may listen or lie there",
          }),
        ),
      );
      server.listen(address.transport === "unix" ? { path: address.path } : { ...address }, resolve);
    });
    if (address.transport === "unix") await chmod(address.path, 0o600);
    const bound = server.address();
    const port = typeof bound === "object" && bound !== null ? bound.port : undefined;
    const found = address.transport === "tcp" && port !== undefined ? { ...address, port } : address;
    return new NbdServer(server, found, options);
  }

  /** Hangs up on every client and stops to listen. */
  async close(): Promise<void> {
    const closed = new Promise<void>((resolve) => this.#server.close(() => resolve()));
    this.#stop.abort(new NbdConnectionError("TM_NBD_SERVER_CLOSED", "NBD server is closing"));
    await Promise.all(this.#connections);
    await closed;
    if (this.address.transport === "unix") await rm(this.address.path, { force: true });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  #welcome(socket: Socket): void {
    const serving = this.#serve(socket).finally(() => {
      this.#connections.delete(serving);
      this.#isFull = false;
    });
    this.#connections.add(serving);
  }

  /** Says so once, however often somebody tries. */
  #turnAway(): void {
    if (this.#isFull) return;
    this.#isFull = true;
    const what = `${this.#connections.size} connections are open, and no more are taken until one ends`;
    this.#options.onProblem?.(
      new NbdConnectionError("TM_NBD_SERVER_FULL", `Cannot serve NBD client: ${what}`),
    );
  }

  /** Never throws. */
  async #serve(socket: Socket): Promise<void> {
    // Who says nothing is waited for, since a machine may have nothing to read for days; but not once its host is gone.
    const peer = new Peer(socket.setNoDelay(true).setKeepAlive(true, KEEP_ALIVE));
    const gone = new AbortController();
    socket.once("close", () => gone.abort(new PeerGone("connection closed")));
    const hangUp = (): void => peer.destroy();
    this.#stop.signal.addEventListener("abort", hangUp);
    try {
      const what = "Serve NBD client";
      const agreement = await withDeadline(shakeHands(peer, this.#options.exports), HANDSHAKE_DEADLINE, what);
      if (agreement !== undefined) {
        const signal = anySignal(this.#stop.signal, gone.signal);
        await transmit(peer, agreement, { signal, onFailure: (error) => this.#options.onProblem?.(error) });
      }
      await peer.leave();
    } catch (error) {
      peer.destroy();
      if (!(error instanceof PeerGone) && !this.#stop.signal.aborted) this.#options.onProblem?.(error);
    } finally {
      this.#stop.signal.removeEventListener("abort", hangUp);
    }
  }
}
