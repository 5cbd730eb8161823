import { once } from "node:events";
import { rename } from "node:fs/promises";
import { connect, createServer, type Server, type Socket } from "node:net";
import { join } from "node:path";
import { temporaryDirectory, type TemporaryDirectory } from "./temporary.js";

export interface CutOptions {
  /**
   * After how many bytes of the server's the connection is cut, in the middle of a message if need be; undefined: never.
   *
   * @param number of the connection, from 0
   */
  readonly limitOf: (number: number) => number | undefined;
  /** The server does not notice the cut: its end stays open until this is disposed of. Default false. */
  readonly keepServerEnd?: boolean;
  /** Called with the connection's number when it was cut. */
  readonly onCut?: (number: number) => Promise<void>;
}

/**
 * Takes the place of an NBD server's unix socket and cuts connections through it, as a peer, a proxy or the kernel may.
 * A cut that was to be and never was fails a test: look at `cuts`.
 */
export class NbdCutter implements AsyncDisposable {
  /** Numbers of the connections that were cut. */
  readonly cuts: number[] = [];
  readonly #path: string;
  readonly #directory: TemporaryDirectory;
  readonly #listener: Server;
  readonly #options: CutOptions;
  readonly #sockets: Socket[] = [];
  #connections = 0;
  #isAside = false;

  private constructor(path: string, directory: TemporaryDirectory, listener: Server, options: CutOptions) {
    this.#path = path;
    this.#directory = directory;
    this.#listener = listener;
    this.#options = options;
  }

  /** @param path of the server's socket, on the file system of temporary directories */
  static async takePlace(path: string, options: CutOptions): Promise<NbdCutter> {
    const directory = await temporaryDirectory("tm-cut-");
    const listener = createServer().listen(directory.file("own"));
    await once(listener, "listening");
    const cutter = new NbdCutter(path, directory, listener, options);
    listener.on("connection", (client) => cutter.#accept(client));
    await rename(path, cutter.#real);
    await rename(directory.file("own"), path);
    return cutter;
  }

  /** How many connections there were. */
  get connections(): number {
    return this.#connections;
  }

  /** Puts the server's socket back; connections that there are stay. Harmless when called twice. */
  async stepAside(): Promise<void> {
    if (this.#isAside) return;
    this.#isAside = true;
    await rename(this.#real, this.#path);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const socket of this.#sockets) socket.destroy();
    await new Promise((resolve) => this.#listener.close(resolve));
    await this.#directory[Symbol.asyncDispose]();
  }

  get #real(): string {
    return join(this.#directory.path, "real");
  }

  #accept(client: Socket): void {
    const number = this.#connections++;
    const limit = this.#options.limitOf(number) ?? Infinity;
    const server = connect(this.#isAside ? this.#path : this.#real);
    this.#sockets.push(client, server);
    let passed = 0;
    const isCut = (): boolean => passed >= limit;
    client.on("data", (bytes) => server.write(bytes));
    server.on("data", (bytes) => {
      if (isCut()) return;
      const part = bytes.subarray(0, limit - passed);
      passed += part.length;
      if (!isCut()) {
        client.write(part);
        return;
      }
      this.cuts.push(number);
      if (this.#options.keepServerEnd !== true) server.destroy();
      // Whoever is told does what he must before the client can see the end.
      void (this.#options.onCut?.(number) ?? Promise.resolve()).then(() =>
        client.write(part, () => client.destroy()),
      );
    });
    client.on("close", () => {
      if (!isCut() || this.#options.keepServerEnd !== true) server.destroy();
    });
    server.on("close", () => {
      if (!isCut()) client.destroySoon();
    });
    // Either end may break off: the other one is told by the end of its connection.
    for (const socket of [client, server]) socket.on("error", () => undefined);
  }
}
