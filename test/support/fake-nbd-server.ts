import { createServer, type Server, type Socket } from "node:net";
import { once } from "node:events";
import type { NbdAddress } from "../../src/nbd/index.js";
import {
  CHUNK,
  chunk,
  CMD,
  extendedChunk,
  frame,
  greeting,
  OPT,
  optionReply,
  REP,
  type ChunkHead,
  type Field,
} from "./nbd-frames.js";
import { temporaryDirectory, type TemporaryDirectory } from "./temporary.js";

/** An option as the client sent it. */
export interface ReceivedOption {
  readonly option: number;
  readonly data: Buffer;
}

/** A request as the client sent it. */
export interface ReceivedRequest {
  readonly flags: number;
  readonly type: number;
  readonly cookie: bigint;
  readonly offset: number;
  readonly length: number;
  /** What a write brings. */
  readonly payload?: Buffer;
}

/** What the honest part of a handshake says. */
export interface FakeExport {
  readonly size?: number | bigint;
  /** Transmission flags; default: has flags, read-only, DF, multi-conn. */
  readonly flags?: number;
  /** Minimum, preferred, maximum; null: not told. */
  readonly blockSize?: readonly [number, number, number] | null;
  /** What is selected, whatever is asked for. */
  readonly contexts?: readonly { readonly id: number; readonly name: string }[];
  readonly structured?: boolean;
  /** Whether extended headers are granted. */
  readonly extended?: boolean;
}

/** The server's end of one connection, for a script. */
export class Peer {
  readonly #socket: Socket;
  #bytes = Buffer.alloc(0);
  #ended = false;
  #wake: () => void = () => undefined;
  /** Where the requests were, by their handles. */
  readonly #offsets = new Map<bigint, number>();
  /** Extended headers were negotiated: heads have 32 bytes in both directions. */
  extended = false;

  constructor(socket: Socket) {
    this.#socket = socket;
    socket.on("data", (chunk: Buffer) => {
      this.#bytes = Buffer.concat([this.#bytes, chunk]);
      this.#wake();
    });
    socket.on("error", () => undefined);
    socket.on("close", () => {
      this.#ended = true;
      this.#wake();
    });
    socket.on("end", () => {
      this.#ended = true;
      this.#wake();
    });
  }

  /** The next bytes of the client. @throws when it closes before */
  async take(count: number): Promise<Buffer> {
    while (this.#bytes.length < count) {
      if (this.#ended) throw new Error(`client closed, ${this.#bytes.length} of ${count} bytes came`);
      await new Promise<void>((resolve) => (this.#wake = resolve));
    }
    const taken = this.#bytes.subarray(0, count);
    this.#bytes = this.#bytes.subarray(count);
    return taken;
  }

  /** Waits until the client closes; returns what it sent before that was not taken. */
  async untilClosed(): Promise<Buffer> {
    while (!this.#ended) await new Promise<void>((resolve) => (this.#wake = resolve));
    return this.#bytes;
  }

  /** Bytes that came and were not taken. */
  get waiting(): number {
    return this.#bytes.length;
  }

  send(...fields: readonly Field[]): void {
    this.#socket.write(frame(...fields));
  }

  /** Sends so that the other side sees two reads; resolves when the first part has left. */
  async sendSplit(bytes: Buffer, at: number): Promise<void> {
    await new Promise<void>((resolve) => this.#socket.write(bytes.subarray(0, at), () => resolve()));
    await new Promise<void>((resolve) => setImmediate(resolve));
    await new Promise<void>((resolve) => this.#socket.write(bytes.subarray(at), () => resolve()));
  }

  /** Closes in the orderly way, everything sent. */
  close(): void {
    this.#socket.end();
  }

  async option(): Promise<ReceivedOption> {
    const head = await this.take(16);
    if (head.toString("latin1", 0, 8) !== "IHAVEOPT") throw new Error("client sent an option without magic");
    return { option: head.readUInt32BE(8), data: await this.take(head.readUInt32BE(12)) };
  }

  async request(): Promise<ReceivedRequest> {
    const head = await this.take(this.extended ? 32 : 28);
    const magic = this.extended ? 0x21e41c71 : 0x25609513;
    if (head.readUInt32BE(0) !== magic) throw new Error("client sent a request without magic");
    const request = {
      flags: head.readUInt16BE(4),
      type: head.readUInt16BE(6),
      cookie: head.readBigUInt64BE(8),
      offset: Number(head.readBigUInt64BE(16)),
      length: this.extended ? Number(head.readBigUInt64BE(24)) : head.readUInt32BE(24),
    };
    this.#offsets.set(request.cookie, request.offset);
    return request.type === CMD.WRITE ? { ...request, payload: await this.take(request.length) } : request;
  }

  /** A chunk of a reply, with the head that was negotiated. */
  chunk(head: ChunkHead, ...data: readonly Field[]): Buffer {
    return this.extended
      ? extendedChunk({ offset: this.#offsets.get(BigInt(head.cookie)) ?? 0, ...head }, ...data)
      : chunk(head, ...data);
  }

  /** A chunk of block status, in the form that was negotiated. */
  status(
    head: Omit<ChunkHead, "type">,
    contextId: number,
    ...extents: readonly (readonly [length: number, flags: number])[]
  ): Buffer {
    const bits = this.extended ? 64 : 32;
    const fields = extents.flatMap(([length, flags]) => [[bits, length] as const, [bits, flags] as const]);
    const count = this.extended ? [[32, extents.length] as const] : [];
    return this.chunk({ ...head, type: this.statusType }, [32, contextId], ...count, ...fields);
  }

  get statusType(): number {
    return this.extended ? CHUNK.BLOCK_STATUS_EXT : CHUNK.BLOCK_STATUS;
  }

  /** The greeting and the client's flags. */
  async greet(): Promise<void> {
    this.send(greeting());
    await this.take(4);
  }

  /**
   * An honest handshake up to the end of NBD_OPT_GO.
   *
   * @param until stops before answering this option, for the script to do so
   */
  async handshake(offer: FakeExport = {}, until?: number): Promise<ReceivedOption> {
    await this.greet();
    for (;;) {
      const received = await this.option();
      if (received.option === until) return received;
      this.#answer(received.option, offer);
      if (received.option === OPT.GO) return received;
    }
  }

  #answer(option: number, offer: FakeExport): void {
    const { size = 1024 * 1024, flags = 0x183, blockSize = [1, 4096, 32 << 20] } = offer;
    const { contexts = [], structured = true } = offer;
    if (option === OPT.EXTENDED_HEADERS) {
      this.extended = offer.extended ?? false;
      this.send(optionReply(option, this.extended ? REP.ACK : REP.ERR_UNSUP));
    } else if (option === OPT.STRUCTURED_REPLY)
      this.send(optionReply(option, structured ? REP.ACK : REP.ERR_UNSUP));
    else if (option === OPT.SET_META_CONTEXT) {
      for (const { id, name } of contexts) this.send(optionReply(option, REP.META_CONTEXT, [32, id], name));
      this.send(optionReply(option, REP.ACK));
    } else if (option === OPT.GO) {
      this.send(optionReply(option, REP.INFO, [16, 0], [64, size], [16, flags]));
      if (blockSize !== null) {
        const [minimum, preferred, maximum] = blockSize;
        this.send(optionReply(option, REP.INFO, [16, 3], [32, minimum], [32, preferred], [32, maximum]));
      }
      this.send(optionReply(option, REP.ACK));
    } else this.send(optionReply(option, REP.ERR_UNSUP));
  }
}

/** What a fake server does with one connection. */
export type Script = (peer: Peer) => Promise<void> | void;

/** A server on a unix socket that runs a script on each connection. */
export class FakeNbdServer implements AsyncDisposable {
  readonly address: NbdAddress;
  readonly #server: Server;
  readonly #directory: TemporaryDirectory;
  readonly #sockets = new Set<Socket>();
  readonly #runs: Promise<void>[] = [];

  private constructor(server: Server, directory: TemporaryDirectory, path: string) {
    this.#server = server;
    this.#directory = directory;
    this.address = { transport: "unix", path };
  }

  static async start(script: Script): Promise<FakeNbdServer> {
    const directory = await temporaryDirectory("tm-nbd-");
    const path = directory.file("s");
    const server = createServer();
    const fake = new FakeNbdServer(server, directory, path);
    server.on("connection", (socket) => {
      fake.#sockets.add(socket);
      const run = Promise.resolve(script(new Peer(socket)));
      run.catch(() => undefined);
      fake.#runs.push(run);
    });
    server.listen(path);
    await once(server, "listening");
    return fake;
  }

  /** Waits until the script has run to its end on every connection. @throws when it failed, or none came */
  async played(): Promise<void> {
    if (this.#runs.length === 0) throw new Error("nobody connected to the fake server");
    await Promise.all(this.#runs);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const socket of this.#sockets) socket.destroy();
    await new Promise<void>((resolve) => this.#server.close(() => resolve()));
    await this.#directory[Symbol.asyncDispose]();
  }
}
