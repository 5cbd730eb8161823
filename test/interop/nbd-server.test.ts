import { readFile, stat, writeFile } from "node:fs/promises";
import { connect as connectSocket, type Socket } from "node:net";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { connect, NbdServer, type ServedExport } from "../../src/nbd/index.js";
import { frame, type Field } from "../support/nbd-frames.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";

const KiB = 1024;
const MiB = 1024 * KiB;
const SIZE = 5 * MiB + 1536;
/** Bytes that an export hands out at a time. */
const PIECE = 96 * KiB;

/** Data in the first MiB and at the end, zeroes between; one sector in the middle cannot be read. */
function sampleContent(): Buffer {
  const content = Buffer.alloc(SIZE);
  for (let at = 0; at < MiB; at += 1) content[at] = (at * 7 + (at >> 9)) & 0xff;
  content.fill(0x5a, SIZE - 3072);
  return content;
}

interface Sample extends ServedExport {
  readonly content: Buffer;
  /** Reads that touch it fail; none when negative. */
  broken: number;
  reads: number;
  /** Pieces that were read. */
  pieces: number;
}

function sampleExport(name: string): Sample {
  const content = sampleContent();
  const data = [
    { from: 0, to: MiB },
    { from: SIZE - 3072, to: SIZE },
  ];
  const changed = [{ from: 64 * KiB, to: 192 * KiB }];
  async function* runs(
    marked: readonly { from: number; to: number }[],
    [inside, outside]: readonly [number, number],
    offset: number,
    length: number,
  ): AsyncGenerator<{ offset: number; length: number; flags: number }> {
    await Promise.resolve();
    for (let at = offset; at < offset + length;) {
      const here = marked.find(({ from, to }) => at >= from && at < to);
      const end = here?.to ?? marked.find(({ from }) => from > at)?.from ?? SIZE;
      yield { offset: at, length: end - at, flags: here === undefined ? outside : inside };
      at = end;
    }
  }
  const sample: Sample = {
    name,
    description: `disk "${name}"`,
    size: SIZE,
    preferredBlock: 64 * KiB,
    content,
    broken: -1,
    reads: 0,
    pieces: 0,
    contexts: [
      { name: "base:allocation", runs: (offset, length) => runs(data, [0, 3], offset, length) },
      { name: "qemu:dirty-bitmap:changed", runs: (offset, length) => runs(changed, [1, 0], offset, length) },
    ],
    async *read(offset, length) {
      sample.reads += 1;
      for (let at = offset; at < offset + length;) {
        await Promise.resolve();
        const end = Math.min(at + PIECE, offset + length);
        if (sample.broken >= at && sample.broken < end) throw new Error("broken sector");
        const bytes = content.subarray(at, end);
        sample.pieces += 1;
        yield { offset: at, length: end - at, bytes: bytes.some((byte) => byte !== 0) ? bytes : undefined };
        at = end;
      }
    },
  };
  return sample;
}

let directory: TemporaryDirectory;
let server: NbdServer;
let sda: Sample;
let problems: string[];

beforeEach(async () => {
  directory = await temporaryDirectory("tm-nbd-");
  sda = sampleExport("sda");
  problems = [];
  server = await NbdServer.listen(
    { transport: "unix", path: directory.file("s") },
    {
      exports: [sda, sampleExport("s d/b")],
      onProblem: (error) => problems.push((error as Error).message),
    },
  );
});

afterEach(async () => {
  await server.close();
  await directory[Symbol.asyncDispose]();
});

const uri = (name: string): string => `nbd+unix:///${encodeURIComponent(name)}?socket=${directory.file("s")}`;

describe("NbdServer", () => {
  it("lists its exports to nbdinfo, with sizes, contexts and descriptions", async () => {
    const { stdout } = await run("nbdinfo", ["--json", "--list", uri("")]);
    const { exports } = JSON.parse(stdout) as {
      exports: {
        "export-name": string;
        description: string;
        contexts: string[];
        "export-size": number;
        is_read_only: boolean;
        can_multi_conn: boolean;
        can_df: boolean;
        block_size_preferred: number;
      }[];
    };
    expect(exports.map((item) => item["export-name"])).toEqual(["sda", "s d/b"]);
    expect(exports[0]).toMatchObject({
      ...{
        description: 'disk "sda"',
        "export-size": SIZE,
        contexts: ["base:allocation", "qemu:dirty-bitmap:changed"],
      },
      ...{ is_read_only: true, can_multi_conn: true, can_df: true, block_size_preferred: 64 * KiB },
    });
  });

  it.each([
    [
      "base:allocation",
      [
        [0, MiB, 0],
        [MiB, SIZE - 3072 - MiB, 3],
        [SIZE - 3072, 3072, 0],
      ],
    ],
    [
      "qemu:dirty-bitmap:changed",
      [
        [0, 64 * KiB, 0],
        [64 * KiB, 128 * KiB, 1],
        [192 * KiB, SIZE - 192 * KiB, 0],
      ],
    ],
  ])("answers nbdinfo --map=%s", async (context, expected) => {
    const { stdout } = await run("nbdinfo", ["--json", `--map=${context}`, uri("sda")]);
    const map = JSON.parse(stdout) as { offset: number; length: number; type: number }[];
    expect(map.map(({ offset, length, type }) => [offset, length, type])).toEqual(expected);
  });

  it.each([["sda"], ["s d/b"], [""]])(
    "gives nbdcopy all bytes of export %j, over several connections",
    async (name) => {
      const copy = directory.file("copy");
      await run("nbdcopy", ["--connections=4", "--requests=16", uri(name), copy]);
      expect((await readFile(copy)).equals(sda.content)).toBe(true);
    },
  );

  it("is read by QEMU: qemu-img convert and compare", async () => {
    await writeFile(directory.file("raw"), sda.content);
    await run("qemu-img", [
      "convert",
      "-f",
      "raw",
      "-O",
      "qcow2",
      "-W",
      "-m",
      "8",
      uri("sda"),
      directory.file("q"),
    ]);
    expect(
      (
        await run("qemu-img", [
          "compare",
          "-f",
          "qcow2",
          "-F",
          "raw",
          directory.file("q"),
          directory.file("raw"),
        ])
      ).stdout,
    ).toContain("identical");
    expect(
      (await run("qemu-img", ["compare", "-f", "raw", "-F", "raw", uri("sda"), directory.file("raw")]))
        .stdout,
    ).toContain("identical");
    // What is zero is not read from the disk: neither by the client nor by the server.
    expect((await stat(directory.file("q"))).blocks * 512).toBeLessThan(2 * MiB);
  });

  it("serves our own client, holes and pieces included", async () => {
    const client = await connect(server.address, { exportName: "sda", contexts: ["base:allocation"] });
    const target = Buffer.alloc(SIZE, 0xee);
    await Promise.all([
      client.read(0, target.subarray(0, 3 * MiB)),
      client.read(3 * MiB, target.subarray(3 * MiB)),
    ]);
    expect(target.equals(sda.content)).toBe(true);
    await client.close();
  });

  it("answers a read that fails with EIO, tells why to its owner, and goes on", async () => {
    sda.broken = 70_000;
    const client = await connect(server.address, { exportName: "sda" });
    await expect(client.read(65_536, Buffer.alloc(65_536))).rejects.toMatchObject({ errorName: "EIO" });
    const target = Buffer.alloc(512);
    await client.read(0, target);
    expect(target.equals(sda.content.subarray(0, 512))).toBe(true);
    await client.close();
    expect(problems).toEqual(["broken sector"]);
  });

  it("serves many connections without a warning of Node's", async () => {
    const warnings: Error[] = [];
    const note = (warning: Error): void => void warnings.push(warning);
    process.on("warning", note);
    try {
      const address = { transport: "unix", path: directory.file("s") } as const;
      const clients = await Promise.all(
        Array.from({ length: 12 }, () => connect(address, { exportName: "sda" })),
      );
      await new Promise(setImmediate);
      await Promise.all(clients.map((client) => client.close()));
    } finally {
      process.off("warning", note);
    }
    expect(warnings).toEqual([]);
  });

  it("hangs up on its clients and leaves no socket when closed", async () => {
    const client = await connect(server.address, { exportName: "sda" });
    await server.close();
    await expect(client.read(0, Buffer.alloc(512))).rejects.toMatchObject({ code: "TM_NBD_EOF" });
    await expect(stat(directory.file("s"))).rejects.toMatchObject({ code: "ENOENT" });
    expect(problems).toEqual([]);
  });

  it("makes a socket for its owner alone, and never takes a path that is there", async () => {
    expect((await stat(directory.file("s"))).mode & 0o777).toBe(0o600);
    await expect(NbdServer.listen(server.address, { exports: [] })).rejects.toMatchObject({
      code: "TM_USAGE",
    });
    await writeFile(directory.file("f"), "precious");
    const taken = { transport: "unix", path: directory.file("f") } as const;
    await expect(NbdServer.listen(taken, { exports: [] })).rejects.toMatchObject({ code: "TM_USAGE" });
    expect(await readFile(taken.path, "utf8")).toBe("precious");
  });

  it("finds a free port when asked for port 0", async () => {
    await using tcp = await NbdServer.listen(
      { transport: "tcp", host: "127.0.0.1", port: 0 },
      { exports: [sda] },
    );
    if (tcp.address.transport !== "tcp") throw new Error("no TCP address");
    const { stdout } = await run("nbdinfo", ["--size", `nbd://127.0.0.1:${tcp.address.port}/sda`]);
    expect(Number(stdout)).toBe(SIZE);
  });
});

/** A client that says what it likes. */
class RawClient implements AsyncDisposable {
  readonly socket: Socket;
  #bytes: Buffer = Buffer.alloc(0);
  #wake: (() => void) | undefined;
  #isClosed = false;

  constructor(path: string, reads = true) {
    this.socket = connectSocket(path);
    this.socket.on("error", () => undefined);
    if (!reads) return;
    this.socket.on("data", (bytes: Buffer) => {
      this.#bytes = Buffer.concat([this.#bytes, bytes]);
      this.#wake?.();
    });
    this.socket.on("close", () => {
      this.#isClosed = true;
      this.#wake?.();
    });
  }

  say(...fields: readonly Field[]): this {
    this.socket.write(frame(...fields));
    return this;
  }

  option(option: number, ...fields: readonly Field[]): this {
    const data = frame(...fields);
    return this.say("IHAVEOPT", [32, option], [32, data.length], data);
  }

  request(type: number, offset: number | bigint, length: number, flags = 0, cookie = 1): this {
    return this.say([32, 0x25609513], [16, flags], [16, type], [64, cookie], [64, offset], [32, length]);
  }

  /** The next `count` bytes of the server. */
  async hear(count: number): Promise<Buffer> {
    while (this.#bytes.length < count) {
      if (this.#isClosed) throw new Error(`closed after ${this.#bytes.length} of ${count} bytes`);
      await new Promise<void>((resolve) => (this.#wake = resolve));
    }
    const bytes = this.#bytes.subarray(0, count);
    this.#bytes = this.#bytes.subarray(count);
    return bytes;
  }

  /** Waits until the server hangs up. @returns what it said before */
  async hungUp(): Promise<Buffer> {
    while (!this.#isClosed) await new Promise<void>((resolve) => (this.#wake = resolve));
    return this.#bytes;
  }

  /** Chooses export sda. @param structured with structured replies */
  async enter(structured: boolean): Promise<this> {
    await this.hear(18);
    this.say([32, 3]);
    if (structured) {
      this.option(8);
      await this.hear(20);
    }
    this.option(1, "sda");
    await this.hear(10);
    return this;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.socket.destroy();
    await Promise.resolve();
  }
}

const errorOf = (reply: Buffer): number => reply.readUInt32BE(4);

describe("NbdServer, met by a client that misbehaves", () => {
  /** Somebody else, who must not notice. */
  async function expectServes(): Promise<void> {
    const { stdout } = await run("nbdinfo", ["--size", uri("sda")]);
    expect(Number(stdout)).toBe(SIZE);
  }
  const raw = (): RawClient => new RawClient(directory.file("s"));

  it.each<[what: string, misbehave: (client: RawClient) => void, problem: RegExp]>([
    ["flags that nobody knows", (client) => client.say([32, 0x80]), /flags 0x80/],
    ["no IHAVEOPT", (client) => client.say([32, 3], "HTTP/1.1", [32, 7], [32, 0]), /IHAVEOPT/],
    [
      "an option of 4 GiB",
      (client) => client.say([32, 3], "IHAVEOPT", [32, 7], [32, 0xffffffff]),
      /4294967295 bytes/,
    ],
    [
      "an export that is not there, the old way",
      (client) => client.say([32, 3]).option(1, "nope"),
      /no export "nope"/,
    ],
    [
      "options without end",
      (client) => {
        client.say([32, 3]);
        for (let count = 0; count < 1024; count += 1) client.option(3);
      },
      /1024 options/,
    ],
  ])("hangs up on %s", async (_what, misbehave, problem) => {
    await using client = raw();
    misbehave(client);
    await client.hungUp();
    expect(problems).toEqual([expect.stringMatching(problem)]);
    await expectServes();
  });

  it.each([
    ["a name longer than its data", 7, [[32, 100], "sda"]],
    ["no count of informations", 7, [[32, 3], "sda"]],
    ["fewer informations than counted", 7, [[32, 3], "sda", [16, 2], [16, 0]]],
    ["data behind the queries", 9, [[32, 3], "sda", [32, 0], [8, 1]]],
    ["more queries than data", 9, [[32, 3], "sda", [32, 4_000_000_000]]],
    ["a context before structured replies", 10, [[32, 3], "sda", [32, 0]]],
    ["data with a list", 3, [[8, 0]]],
  ] as const)("refuses %s, and the client may go on", async (_what, option, fields) => {
    await using client = raw();
    await client.hear(18);
    client.say([32, 3]).option(option, ...fields);
    const head = await client.hear(20);
    expect([head.readUInt32BE(8), head.readUInt32BE(12)]).toEqual([option, 0x80000003]);
    await client.hear(head.readUInt32BE(16));
    client.option(99);
    expect((await client.hear(20)).readUInt32BE(12)).toBe(0x80000001);
  });

  it("forgets contexts that were chosen for another export", async () => {
    await using client = raw();
    await client.hear(18);
    client.say([32, 3]).option(8);
    await client.hear(20);
    client.option(10, [32, 5], "s d/b", [32, 1], [32, 15], "base:allocation");
    await client.hear(20 + 4 + 15 + 20);
    client.option(1, "sda");
    await client.hear(10);
    client.request(7, 0, 4096);
    const head = await client.hear(20);
    expect(head.readUInt16BE(6)).toBe(0x8001);
    expect((await client.hear(head.readUInt32BE(16))).readUInt32BE(0)).toBe(22);
  });

  it.each([
    ["beyond the end", 0, SIZE - 512, 1024, 22],
    ["at 2^64 - 1", 0, 0xffffffffffffffffn, 1, 22],
    ["of more than 32 MiB", 0, 0, 33 * MiB, 22],
    ["of zeroes to be written", 6, 0, 4096, 1],
    ["of a trim", 4, 0, 4096, 1],
    ["of a type that nobody knows", 77, 0, 0, 95],
    ["for the state of nothing", 7, 0, 0, 22],
  ] as const)("refuses a request %s, and serves the next", async (_what, type, offset, length, error) => {
    await using client = await raw().enter(false);
    client.request(type, offset, length).request(0, 0, 16);
    const replies = await client.hear(16 + 16 + 16);
    expect([errorOf(replies), errorOf(replies.subarray(16))].sort()).toEqual([0, error]);
    expect(
      replies.subarray(32).equals(sda.content.subarray(0, 16)) ||
        replies.subarray(16, 32).equals(sda.content.subarray(0, 16)),
    ).toBe(true);
  });

  it("takes a write's data off the wire, and refuses it", async () => {
    await using client = await raw().enter(false);
    client.request(1, 0, 70_000).say(Buffer.alloc(70_000, 0xff)).request(0, 0, 16);
    expect(errorOf(await client.hear(16))).toBe(1);
    const reply = await client.hear(32);
    expect(errorOf(reply)).toBe(0);
    expect(reply.subarray(16).equals(sda.content.subarray(0, 16))).toBe(true);
  });

  it("hangs up on a request without magic, half a request, and a write of 4 GiB", async () => {
    await using magic = await raw().enter(true);
    magic.say([32, 0x25609514], [64, 0], [64, 0], [64, 0]);
    await magic.hungUp();
    await using half = await raw().enter(true);
    half.say([32, 0x25609513], [16, 0]).socket.end();
    await half.hungUp();
    await using huge = await raw().enter(true);
    huge.request(1, 0, 0xffffffff);
    await huge.hungUp();
    expect(problems).toEqual([
      expect.stringContaining("magic"),
      expect.stringContaining("4294967295 bytes at once"),
    ]);
    await expectServes();
  });

  it("waits for one that never reads, with bounded memory, and serves the others meanwhile", async () => {
    await using client = await raw().enter(false);
    client.socket.pause();
    for (let cookie = 0; cookie < 1000; cookie += 1) client.request(0, 0, 4 * MiB, 0, cookie);
    await expectServes();
    await expectServes();
    // One of 4 MiB is as much as may be in memory.
    expect(sda.reads).toBe(1);
  });

  it("reads no further than the client takes, however much it wants at once, in one piece or in chunks", async () => {
    for (const isStructured of [false, true]) {
      sda.pieces = 0;
      await using client = await raw().enter(isStructured);
      client.socket.pause();
      client.request(0, 0, SIZE);
      await expectServes();
      // What fits into the socket's buffers, and the piece that waits: the rest is not read.
      expect(sda.pieces).toBeGreaterThan(0);
      expect(sda.pieces).toBeLessThan(SIZE / PIECE / 2);
    }
  });

  it("answers a long read of an old client in one piece, and nothing comes between its parts", async () => {
    await using client = await raw().enter(false);
    client.request(0, 0, SIZE, 0, 1).request(0, 0, 16, 0, 2).request(0, 16, 16, 0, 3);
    const contents = new Map<bigint, Buffer>();
    for (
      const lengths = new Map([
        [1n, SIZE],
        [2n, 16],
        [3n, 16],
      ]);
      contents.size < 3;
    ) {
      const head = await client.hear(16);
      expect([head.readUInt32BE(0), errorOf(head)]).toEqual([0x67446698, 0]);
      const cookie = head.readBigUInt64BE(8);
      contents.set(cookie, await client.hear(lengths.get(cookie) ?? 0));
    }
    expect(contents.get(1n)?.equals(sda.content)).toBe(true);
    expect(contents.get(2n)?.equals(sda.content.subarray(0, 16))).toBe(true);
    expect(contents.get(3n)?.equals(sda.content.subarray(16, 32))).toBe(true);
  });

  it("reads together what is asked for in small parts, and an error belongs to the part that it is about", async () => {
    const [count, length] = [24, 16 * KiB];
    for (const broken of [-1, 70_000]) {
      sda.broken = broken;
      sda.reads = 0;
      await using client = await raw().enter(true);
      client.socket.cork();
      for (let cookie = 0; cookie < count; cookie += 1) client.request(0, cookie * length, length, 0, cookie);
      client.socket.uncork();
      const contents = Array.from({ length: count }, () => Buffer.alloc(length, 0xee));
      const errors: bigint[] = [];
      for (let ended = 0; ended < count;) {
        const head = await client.hear(20);
        const [flags, type, cookie] = [head.readUInt16BE(4), head.readUInt16BE(6), head.readBigUInt64BE(8)];
        const payload = await client.hear(head.readUInt32BE(16));
        if (type === 0x8001) errors.push(cookie);
        else if (type !== 0) {
          const at = Number(payload.readBigUInt64BE(0)) - Number(cookie) * length;
          if (type === 1) payload.subarray(8).copy(contents[Number(cookie)]!, at);
          else contents[Number(cookie)]!.fill(0, at, at + payload.readUInt32BE(8));
        }
        ended += flags & 1;
      }
      const wrong = contents.flatMap((content, index) =>
        content.equals(sda.content.subarray(index * length, (index + 1) * length)) ? [] : [BigInt(index)],
      );
      const expected = broken < 0 ? [] : [BigInt(Math.floor(broken / length))];
      expect({ errors, wrong }).toEqual({ errors: expected, wrong: expected });
      if (broken < 0) expect(sda.reads).toBeLessThan(count / 2);
    }
  });

  it("hangs up where a long read fails in the middle of its answer: what was sent never passes for the whole", async () => {
    sda.broken = 3 * MiB;
    await using client = await raw().enter(false);
    client.request(0, 0, SIZE);
    const said = await client.hungUp();
    expect(said.length).toBeLessThanOrEqual(16 + 3 * MiB);
    expect(said.subarray(16).equals(sda.content.subarray(0, said.length - 16))).toBe(true);
    expect(problems).toEqual([expect.stringContaining("broken sector")]);
    await expectServes();
    // Of a shorter one, nothing was sent before: an error can be told.
    await using other = await raw().enter(false);
    other.request(0, 2 * MiB, 2 * MiB);
    expect(errorOf(await other.hear(16))).toBe(5);
  });

  it("hangs up on one that says nothing for ten seconds", async () => {
    await using client = raw();
    const started = performance.now();
    await client.hungUp();
    expect(performance.now() - started).toBeGreaterThan(9000);
    expect(problems).toEqual([expect.stringContaining("no answer within 10 s")]);
  });

  it("hangs up on connections beyond its limit, and says so", async () => {
    const full: string[] = [];
    await using small = await NbdServer.listen(
      { transport: "unix", path: directory.file("t") },
      { exports: [sda], maxConnections: 1, onProblem: (error) => full.push((error as Error).message) },
    );
    await using first = await new RawClient(directory.file("t")).enter(false);
    await using second = new RawClient(directory.file("t"));
    expect((await second.hungUp()).length).toBe(0);
    first.request(0, 0, 16);
    expect(errorOf(await first.hear(32))).toBe(0);
    // It is said once, however many try.
    await using third = new RawClient(directory.file("t"));
    expect((await third.hungUp()).length).toBe(0);
    expect(full).toEqual([expect.stringContaining("1 connections are open")]);
    // Who waits until one has left is welcome.
    first.socket.end();
    await first.hungUp();
    await using fourth = await new RawClient(directory.file("t")).enter(false);
    fourth.request(0, 0, 16);
    expect(errorOf(await fourth.hear(32))).toBe(0);
    expect(small.address).toEqual({ transport: "unix", path: directory.file("t") });
  });
});
