import { once } from "node:events";
import { connect, createServer, type Server, type Socket } from "node:net";
import type { NbdAddress } from "../../src/nbd/index.js";

/** More than a handshake sends, and less than one write of a cluster. */
const HANDSHAKE_AT_MOST = 8192;

interface Relayed {
  readonly client: Socket;
  readonly server: Socket;
  /** Bytes that the client sent. */
  sent: number;
}

/**
 * Stands between NBD clients and their server, and counts. A connection *writes* once it has sent more than any
 * handshake does. Answers to writes are held back until as many connections write at the same time as are
 * wanted: a client that waits for one connection before it writes on the next never gets any further.
 */
export class NbdRelay implements AsyncDisposable {
  readonly socket: string;
  readonly #listener: Server;
  readonly #wanted: number;
  readonly #connections: Relayed[] = [];
  #isOpen = false;
  #open = 0;
  #mostOpen = 0;

  private constructor(socket: string, listener: Server, wanted: number) {
    this.socket = socket;
    this.#listener = listener;
    this.#wanted = wanted;
  }

  /**
   * @param socket the path to listen at
   * @param wanted connections that must have unanswered writes before the first of these is answered
   */
  static async start(socket: string, target: NbdAddress, wanted: number): Promise<NbdRelay> {
    const listener = createServer().listen(socket);
    await once(listener, "listening");
    const relay = new NbdRelay(socket, listener, wanted);
    listener.on("connection", (client) => relay.#accept(client, target));
    return relay;
  }

  /** Bytes that the client sent on each connection that wrote. */
  get written(): readonly number[] {
    return this.#connections.filter(writes).map(({ sent }) => sent);
  }

  /** The most connections that were open at the same time. */
  get mostOpen(): number {
    return this.#mostOpen;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const { client, server } of this.#connections) {
      client.destroy();
      server.destroy();
    }
    await new Promise((resolve) => this.#listener.close(resolve));
  }

  #accept(client: Socket, target: NbdAddress): void {
    const server = target.transport === "unix" ? connect(target.path) : connect(target.port, target.host);
    const connection: Relayed = { client, server, sent: 0 };
    this.#connections.push(connection);
    this.#mostOpen = Math.max(this.#mostOpen, ++this.#open);
    client.on("data", (bytes) => {
      connection.sent += bytes.length;
      if (!this.#isOpen && writes(connection)) this.#hold(connection);
      server.write(bytes);
    });
    server.on("data", (bytes) => client.write(bytes));
    client.on("close", () => {
      this.#open -= 1;
      server.destroySoon();
    });
    server.on("close", () => client.destroySoon());
    // Either end may break off: the other one is told by the end of its connection.
    for (const socket of [client, server]) socket.on("error", () => undefined);
  }

  /** Holds the server's answers to a connection that writes, until enough of them do. */
  #hold(connection: Relayed): void {
    connection.server.pause();
    const writing = this.#connections.filter(writes);
    if (writing.length < this.#wanted) return;
    this.#isOpen = true;
    for (const { server } of writing) server.resume();
  }
}

function writes({ sent }: Relayed): boolean {
  return sent > HANDSHAKE_AT_MOST;
}
