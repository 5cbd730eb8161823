import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFile, truncate, writeFile } from "node:fs/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { KiB, MiB, TiB } from "../../src/bytes/index.js";
import {
  BASE_ALLOCATION,
  connect,
  dirtyBitmapContext,
  listExports,
  NBD_STATE_DIRTY,
  negotiate,
  openSocket,
  parseNbdUri,
  type BlockRun,
  type NbdClient,
} from "../../src/nbd/index.js";
import { FakeNbdServer } from "../support/fake-nbd-server.js";
import { createImage, qemuIo, writeNoise } from "../support/image.js";
import {
  startNbdkit,
  startQemuNbd,
  startStorageDaemon,
  type RealNbdServer,
  type ServerPlace,
} from "../support/nbd-servers.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";

const NOISE_SIZE = 8 * MiB + 512;
let directory: TemporaryDirectory;
/** Raw, every byte random. */
let noise: string;
/** qcow2 of 64 MiB: data, holes, zero clusters; the bitmap `b0` knows what came second. */
let patched: string;

beforeAll(async () => {
  directory = await temporaryDirectory("tm-nbd-");
  noise = await writeNoise(directory.file("noise.raw"), NOISE_SIZE, 7);
  patched = await createImage(directory.file("patched.qcow2"), "qcow2", 64 * MiB);
  await qemuIo(patched, "qcow2", ["write -P 1 0 1M", "write -P 2 10M 300k", "write -P 3 50M 4k"]);
  await run("qemu-img", ["bitmap", "--add", "-g", "64k", patched, "b0"]);
  await qemuIo(patched, "qcow2", ["write -P 4 512k 100k", "write -z 10M 64k", "discard 10368k 64k"]);
  await qemuIo(patched, "qcow2", ["write -P 5 30M 64k", "write -P 6 67108352 512"]);
});

afterAll(() => directory[Symbol.asyncDispose]());

async function mapOf(client: NbdClient, context: string): Promise<BlockRun[]> {
  const runs: BlockRun[] = [];
  for await (const found of client.map(context)) runs.push(found);
  return runs;
}

/** The map as libnbd sees it, neighbours of one kind joined. */
async function nbdinfoMap(server: RealNbdServer, exportName: string, context: string): Promise<BlockRun[]> {
  const { stdout } = await run("nbdinfo", ["--json", `--map=${context}`, server.uri(exportName)]);
  const rows = JSON.parse(stdout) as { offset: number; length: number; type: number }[];
  const runs: BlockRun[] = [];
  for (const { offset, length, type } of rows) {
    const last = runs.at(-1);
    if (last?.flags === type) runs[runs.length - 1] = { ...last, length: last.length + length };
    else runs.push({ offset, length, flags: type });
  }
  return runs;
}

type Start = (place: ServerPlace) => Promise<RealNbdServer>;
const NOISE_SERVERS: readonly [name: string, start: Start][] = [
  ["qemu-nbd", (place) => startQemuNbd({ ...place, image: noise, format: "raw", exportName: "sda" })],
  [
    "qemu-storage-daemon",
    (place) =>
      startStorageDaemon({ ...place, exports: [{ image: noise, format: "raw", exportName: "sda" }] }),
  ],
  ["nbdkit", (place) => startNbdkit({ ...place, parameters: ["--exportname", "sda", "file", noise] })],
];
const PLACES = ["unix", "tcp"] as const;

describe("NbdClient.read() against real servers", () => {
  it.each(NOISE_SERVERS.flatMap(([name, start]) => PLACES.map((transport) => ({ name, transport, start }))))(
    "gets the bytes of the file from $name over $transport",
    async ({ transport, start }) => {
      await using server = await start({ transport });
      const expected = await readFile(noise);
      const client = await connect(parseNbdUri(server.uri("sda")), { requestSize: 512 * KiB });
      expect(client.export).toMatchObject({ name: "sda", size: NOISE_SIZE, structuredReplies: true });
      const whole = Buffer.alloc(NOISE_SIZE);
      const parts = [[1, 1] as const, [4095, 70_000] as const, [NOISE_SIZE - 3, 3] as const];
      const targets = parts.map(([, length]) => Buffer.alloc(length));
      await Promise.all([
        client.read(0, whole),
        ...parts.map(([offset], index) => client.read(offset, targets[index]!)),
      ]);
      expect(whole.equals(expected)).toBe(true);
      for (const [index, [offset, length]] of parts.entries()) {
        expect(targets[index]!.equals(expected.subarray(offset, offset + length))).toBe(true);
      }
      await client.close();
      expect(client.pending).toBe(0);
      expect(await client.closed).toBeUndefined();
    },
  );

  it.each(NOISE_SERVERS)(
    "beyond the end is refused by %s and the connection lives on",
    async (_name, start) => {
      await using server = await start({});
      const client = await connect(server.address, { exportName: "sda", contexts: [BASE_ALLOCATION] });
      await expect(client.read(NOISE_SIZE - 512, Buffer.alloc(1024))).rejects.toMatchObject({
        code: "TM_NBD_REQUEST",
        errorName: "EINVAL",
      });
      await expect(client.blockStatus(BASE_ALLOCATION, NOISE_SIZE, 4096)).rejects.toMatchObject({
        code: "TM_NBD_REQUEST",
      });
      const target = Buffer.alloc(4096);
      await client.read(0, target);
      expect(target.equals((await readFile(noise)).subarray(0, 4096))).toBe(true);
      await client.close();
    },
  );

  it("reads a sparse disk, the same bytes as nbdcopy", async () => {
    await using server = await startQemuNbd({ image: patched, format: "qcow2", exportName: "sda" });
    const client = await connect(server.address, { exportName: "sda" });
    const target = Buffer.alloc(64 * MiB, 0xee);
    await client.read(0, target);
    await client.close();
    const copy = directory.file("copy.raw");
    await run("nbdcopy", [server.uri("sda"), copy]);
    expect(target.equals(await readFile(copy))).toBe(true);
  });

  it("reads from a server without structured replies", async () => {
    await using server = await startNbdkit({ parameters: ["--no-sr", "file", noise] });
    const client = await connect(server.address, { contexts: [BASE_ALLOCATION] });
    expect(client.export).toMatchObject({ structuredReplies: false, contexts: [] });
    const target = Buffer.alloc(NOISE_SIZE);
    await client.read(0, target);
    expect(target.equals(await readFile(noise))).toBe(true);
    await expect(client.read(NOISE_SIZE, Buffer.alloc(1))).rejects.toMatchObject({ errorName: "EINVAL" });
    await client.close();
  });

  it("ends only its own request when the disk fails", async () => {
    const parameters = ["--filter=error", "pattern", "1M", "error-pread=EIO", "error-pread-rate=50%"];
    await using server = await startNbdkit({ parameters });
    const client = await connect(server.address);
    const reads = Array.from({ length: 64 }, () => client.read(0, Buffer.alloc(512)));
    const outcomes = await Promise.allSettled(reads);
    const failures = outcomes.flatMap((outcome) =>
      outcome.status === "rejected" ? [outcome.reason as unknown] : [],
    );
    expect(failures.length).toBeGreaterThan(0);
    expect(failures.length).toBeLessThan(64);
    for (const failure of failures) expect(failure).toMatchObject({ errorName: "EIO" });
    await client.close();
    expect(await client.closed).toBeUndefined();
  });
});

describe("NbdClient.map() against real servers", () => {
  const startWithBitmap: readonly [name: string, start: Start][] = [
    [
      "qemu-nbd",
      (place) =>
        startQemuNbd({ ...place, image: patched, format: "qcow2", exportName: "sda", bitmaps: ["b0"] }),
    ],
    [
      "qemu-storage-daemon",
      (place) =>
        startStorageDaemon({
          ...place,
          exports: [{ image: patched, format: "qcow2", exportName: "sda", bitmaps: ["b0"] }],
        }),
    ],
  ];

  it.each(startWithBitmap)(
    "equals nbdinfo's for base:allocation and a dirty bitmap on %s",
    async (_name, start) => {
      await using server = await start({});
      for (const context of [BASE_ALLOCATION, dirtyBitmapContext("b0")]) {
        const client = await connect(server.address, { exportName: "sda", contexts: [context] });
        expect(client.export.contexts).toEqual([context]);
        const map = await mapOf(client, context);
        expect(map).toEqual(await nbdinfoMap(server, "sda", context));
        expect(map.length).toBeGreaterThan(4);
        await client.close();
      }
    },
  );

  it("marks as dirty what was written, zeroed or discarded since the bitmap was made", async () => {
    await using server = await startQemuNbd({
      ...{ image: patched, format: "qcow2", exportName: "sda", bitmaps: ["b0"] },
    });
    const context = dirtyBitmapContext("b0");
    const client = await connect(server.address, { exportName: "sda", contexts: [context] });
    const dirty = (await mapOf(client, context)).filter(({ flags }) => (flags & NBD_STATE_DIRTY) !== 0);
    expect(dirty.map(({ offset, length }) => [offset / KiB, length / KiB])).toEqual([
      [512, 128],
      [10240, 64],
      [10368, 64],
      [30 * KiB, 64],
      [64 * KiB - 64, 64],
    ]);
    await client.close();
  });

  it("answers for each of several contexts on one connection", async () => {
    await using server = await startQemuNbd({
      ...{ image: patched, format: "qcow2", exportName: "sda", bitmaps: ["b0"] },
    });
    const contexts = [BASE_ALLOCATION, dirtyBitmapContext("b0")];
    const client = await connect(server.address, { exportName: "sda", contexts });
    for (const context of contexts) {
      expect(await mapOf(client, context)).toEqual(await nbdinfoMap(server, "sda", context));
    }
    await expect(client.blockStatus(BASE_ALLOCATION, 64 * MiB, 512)).rejects.toMatchObject({ errno: 22 });
    expect(await mapOf(client, BASE_ALLOCATION)).toHaveLength(
      (await nbdinfoMap(server, "sda", BASE_ALLOCATION)).length,
    );
    await client.close();
  });

  it("leaves out contexts that the server lacks", async () => {
    await using server = await startQemuNbd({ image: patched, format: "qcow2", exportName: "sda" });
    const contexts = [dirtyBitmapContext("nope"), BASE_ALLOCATION];
    const client = await connect(server.address, { exportName: "sda", contexts });
    expect(client.export.contexts).toEqual([BASE_ALLOCATION]);
    await expect(client.blockStatus(dirtyBitmapContext("nope"), 0, 512)).rejects.toMatchObject({
      code: "TM_NBD_NO_CONTEXT",
    });
    await client.close();
  });

  it("covers a sparse disk of 1 TiB, as nbdinfo does", async () => {
    const image = await createImage(directory.file("tib.qcow2"), "qcow2", TiB);
    await run("qemu-img", ["bitmap", "--add", "-g", "64k", image, "b0"]);
    const writes = [0, 5 * 2 ** 30, 2 ** 39, TiB - 65536].map((offset) => `write -P 7 ${offset} 64k`);
    await qemuIo(image, "qcow2", writes);
    await using server = await startQemuNbd({
      ...{ image, format: "qcow2", exportName: "big", bitmaps: ["b0"] },
    });
    for (const context of [BASE_ALLOCATION, dirtyBitmapContext("b0")]) {
      const client = await connect(server.address, { exportName: "big", contexts: [context] });
      const map = await mapOf(client, context);
      expect(map).toEqual(await nbdinfoMap(server, "big", context));
      // Data at both ends and twice between: seven runs.
      expect(map).toHaveLength(7);
      await client.close();
    }
  });

  it("covers a fragmented disk, whose map comes in many replies", async () => {
    const image = directory.file("comb.raw");
    await truncate(await createImage(image, "raw", 1), 400 * MiB);
    await using server = await startNbdkit({
      // 4 KiB of data in every 8 KiB: 102,400 extents
      parameters: ["--filter=extentlist", "file", image, `extentlist=${await writeComb(400 * MiB)}`],
    });
    const client = await connect(server.address, { contexts: [BASE_ALLOCATION] });
    const map = await mapOf(client, BASE_ALLOCATION);
    expect(map).toHaveLength(102_400);
    expect(map).toEqual(await nbdinfoMap(server, "", BASE_ALLOCATION));
    await client.close();
  });

  async function writeComb(size: number): Promise<string> {
    const path = directory.file("comb.list");
    let text = "";
    for (let offset = 0; offset < size; offset += 8192) {
      text += `${offset} 4096\n${offset + 4096} 4096 hole,zero\n`;
    }
    await writeFile(path, text);
    return path;
  }
});

describe("connect() to exports of odd sizes", () => {
  it.each([0, 512, 1000 * 512, 4096 * 3 + 512])(
    "reads and maps %i bytes from qemu-storage-daemon",
    async (size) => {
      const image = await writeNoise(directory.file(`n${size}.raw`), size, size + 1);
      await using server = await startStorageDaemon({
        exports: [{ image, format: "raw", exportName: "odd" }],
      });
      const client = await connect(server.address, { exportName: "odd", contexts: [BASE_ALLOCATION] });
      expect(client.export.size).toBe(size);
      const target = Buffer.alloc(size);
      await client.read(0, target);
      expect(target.equals(await readFile(image))).toBe(true);
      const map = await mapOf(client, BASE_ALLOCATION);
      expect(map.reduce((sum, { length }) => sum + length, 0)).toBe(size);
      if (size > 0) expect(map).toEqual(await nbdinfoMap(server, "odd", BASE_ALLOCATION));
      await client.close();
    },
  );

  it("reads 1,000,001 bytes from nbdkit, to the last one", async () => {
    const image = await writeNoise(directory.file("prime.raw"), 1_000_001, 3);
    await using server = await startNbdkit({ parameters: ["file", image] });
    const client = await connect(server.address, { contexts: [BASE_ALLOCATION] });
    const target = Buffer.alloc(1_000_001);
    await client.read(0, target);
    expect(target.equals(await readFile(image))).toBe(true);
    expect(await mapOf(client, BASE_ALLOCATION)).toEqual([{ offset: 0, length: 1_000_001, flags: 0 }]);
    await client.close();
  });
});

describe("block size limits", () => {
  const limits = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=65536"];

  it("are kept with a server that refuses what does not: nbdkit, 4 KiB to 64 KiB", async () => {
    const image = await writeNoise(directory.file("blocks.raw"), 2 * MiB, 9);
    await using server = await startNbdkit({
      parameters: ["--filter=blocksize-policy", "file", image, "blocksize-error-policy=error", ...limits],
    });
    const client = await connect(server.address, { contexts: [BASE_ALLOCATION] });
    expect(client.export.blockSize).toEqual({ minimum: 4096, preferred: 4096, maximum: 65536 });
    const expected = await readFile(image);
    const target = Buffer.alloc(1_234_567);
    await client.read(4_321, target);
    expect(target.equals(expected.subarray(4_321, 4_321 + target.length))).toBe(true);
    const tiny = Buffer.alloc(1);
    await client.read(2 * MiB - 1, tiny);
    expect(tiny[0]).toBe(expected.at(-1));
    expect(await client.blockStatus(BASE_ALLOCATION, 1, 10)).toEqual([{ offset: 1, length: 10, flags: 0 }]);
    expect(await mapOf(client, BASE_ALLOCATION)).toEqual([{ offset: 0, length: 2 * MiB, flags: 0 }]);
    await client.close();
  });

  it("are really refused by that server, when the client asks otherwise", async () => {
    await using server = await startNbdkit({
      parameters: ["--filter=blocksize-policy", "pattern", "1M", "blocksize-error-policy=error", ...limits],
    });
    const { stderr, stdout } = await run("qemu-io", ["-r", "-f", "raw", "-c", "read 0 4096", server.uri("")]);
    expect(stdout + stderr).toContain("read 4096/4096");
    const strict = await run("nbdcopy", ["--request-size=131072", server.uri(""), "null:"], {
      codes: [0, 1],
    });
    expect(strict.code).toBe(1);
  });
});

describe("listExports()", () => {
  it.each(PLACES)("lists the exports of qemu-storage-daemon over %s, as nbdinfo does", async (transport) => {
    await using server = await startStorageDaemon({
      transport,
      exports: [
        { image: noise, format: "raw", exportName: "noise" },
        { image: patched, format: "qcow2", exportName: "spaced name/ü" },
      ],
    });
    const names = (await listExports(server.address)).map(({ name }) => name);
    const { stdout } = await run("nbdinfo", ["--json", "--list", server.uri("")]);
    const listed = (JSON.parse(stdout) as { exports: { "export-name": string }[] }).exports;
    expect(names.sort()).toEqual(listed.map((item) => item["export-name"]).sort());
    expect(names).toEqual(["noise", "spaced name/ü"]);
    const client = await connect(parseNbdUri(server.uri("spaced name/ü")));
    expect(client.export.size).toBe(64 * MiB);
    await client.close();
  });

  it("tells what servers say about an export", async () => {
    await using server = await startNbdkit({
      parameters: [
        "--filter=exportname",
        "null",
        "1M",
        "exportname=a",
        "exportname-list=explicit",
        "exportdesc=fixed:my disk",
      ],
    });
    expect(await listExports(server.address)).toEqual([{ name: "a", description: "my disk" }]);
  });
});

describe("connect() to what is not there", () => {
  it("names the export that a server does not have", async () => {
    await using server = await startQemuNbd({ image: noise, format: "raw", exportName: "sda" });
    await expect(connect(server.address, { exportName: "sdb" })).rejects.toMatchObject({
      code: "TM_NBD_NO_EXPORT",
      message: expect.stringContaining('"sdb"') as string,
    });
    const client = await connect(server.address, { exportName: "sda" });
    await client.close();
  });

  it("ends every request when the server is killed", async () => {
    let client: NbdClient;
    {
      await using server = await startNbdkit({
        parameters: ["--filter=delay", "pattern", "64M", "rdelay=60"],
      });
      client = await connect(server.address);
      client.read(0, Buffer.alloc(64 * MiB)).catch(() => undefined);
      expect(client.pending).toBe(16);
    }
    expect(await client.closed).toMatchObject({
      code: expect.stringMatching(/^TM_NBD_(EOF|CONNECTION)$/) as string,
    });
    expect(client.pending).toBe(0);
  });

  it("does not blame a server for the time in which this process was held up", async () => {
    await using server = await startQemuNbd({ image: noise, format: "raw", exportName: "sda" });
    const client = await connect(server.address, { exportName: "sda", requestTimeoutMs: 200 });
    const target = Buffer.alloc(NOISE_SIZE);
    const reading = client.read(0, target);
    // Blocks the thread, event loop and all, for longer than the time-out.
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1500);
    await reading;
    expect(target.equals(await readFile(noise))).toBe(true);
    await client.close();
  });

  it("ends every request when the server is stopped and not dead: TM_NBD_TIMEOUT", async () => {
    await using server = await startQemuNbd({ image: noise, format: "raw", exportName: "sda" });
    const client = await connect(server.address, { exportName: "sda", requestTimeoutMs: 300 });
    process.kill(server.pid, "SIGSTOP");
    await expect(client.read(0, Buffer.alloc(NOISE_SIZE))).rejects.toMatchObject({ code: "TM_NBD_TIMEOUT" });
    expect(client.pending).toBe(0);
    await expect(connect(server.address, { exportName: "sda", timeoutMs: 300 })).rejects.toMatchObject({
      code: "TM_NBD_TIMEOUT",
    });
  });
});

describe("openSocket()", () => {
  it("gives a descriptor whose duplicate keeps the connection when the client is destroyed", async () => {
    const ended: number[] = [];
    let connections = 0;
    await using server = await FakeNbdServer.start(async (peer) => {
      connections += 1;
      const number = connections;
      await peer.handshake();
      await peer.untilClosed();
      ended.push(number);
    });
    const socket = await openSocket(server.address);
    // cat holds the duplicate until its standard input ends.
    const holder = spawn("cat", [], { stdio: ["pipe", "ignore", "ignore", socket.fd] });
    await once(holder, "spawn");
    const client = await negotiate(socket, { exportName: "sda" });
    const reading = client.read(0, Buffer.alloc(512));
    client.destroy();
    await expect(reading).rejects.toMatchObject({ code: "TM_NBD_CLOSED" });
    expect(socket.fd).toBeUndefined();
    // Another connection comes and goes meanwhile: the server would have seen the first one's end by then.
    const second = await connect(server.address, { exportName: "sda" });
    await second.close();
    while (ended.length === 0) await new Promise((resolve) => setImmediate(resolve));
    expect(ended).toEqual([2]);

    const exited = once(holder, "exit");
    holder.stdin?.end();
    await exited;
    await server.played();
    expect(ended).toEqual([2, 1]);
  });
});
