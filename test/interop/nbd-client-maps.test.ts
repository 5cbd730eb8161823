import { readFile, rename } from "node:fs/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { KiB, MiB } from "../../src/bytes/index.js";
import {
  BASE_ALLOCATION,
  connect,
  dirtyBitmapContext,
  parseNbdUri,
  QEMU_ALLOCATION_DEPTH,
  reconnect,
  type BlockRun,
} from "../../src/nbd/index.js";
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

let directory: TemporaryDirectory;
/** qcow2 over qcow2: data in one, in the other, in both, in none; the bitmap `b0` knows what came last. */
let top: string;
let noise: string;

beforeAll(async () => {
  directory = await temporaryDirectory("tm-nbd-");
  const base = await createImage(directory.file("base.qcow2"), "qcow2", 32 * MiB);
  await qemuIo(base, "qcow2", ["write -P 1 0 1M", "write -P 2 10M 300k", "write -z 12M 1M"]);
  const backing = { path: base, format: "qcow2" as const };
  top = await createImage(directory.file("top.qcow2"), "qcow2", 32 * MiB, { backing });
  await qemuIo(top, "qcow2", ["write -P 3 512k 64k", "write -P 4 20M 1M", "write -z 10M 64k"]);
  await run("qemu-img", ["bitmap", "--add", "-g", "64k", top, "b0"]);
  await qemuIo(top, "qcow2", ["write -P 5 30M 64k", "discard 20M 128k", "write -P 6 33553920 512"]);
  noise = await writeNoise(directory.file("noise.raw"), 4 * MiB, 21);
});

afterAll(() => directory[Symbol.asyncDispose]());

async function ourMap(server: RealNbdServer, context: string): Promise<BlockRun[]> {
  const client = await connect(parseNbdUri(server.uri("sda")), { contexts: [context] });
  expect(client.export.contexts).toEqual([context]);
  const runs: BlockRun[] = [];
  for await (const found of client.map(context)) runs.push(found);
  await client.close();
  return runs;
}

/** The map as libnbd sees it, neighbours of one kind joined. */
async function nbdinfoMap(server: RealNbdServer, context: string): Promise<BlockRun[]> {
  const { stdout } = await run("nbdinfo", ["--json", `--map=${context}`, server.uri("sda")]);
  const rows = JSON.parse(stdout) as { offset: number; length: number; type: number }[];
  const runs: BlockRun[] = [];
  for (const { offset, length, type } of rows) {
    const last = runs.at(-1);
    if (last?.flags === type) runs[runs.length - 1] = { ...last, length: last.length + length };
    else runs.push({ offset, length, flags: type });
  }
  return runs;
}

const SERVERS: readonly [name: string, start: (place: ServerPlace) => Promise<RealNbdServer>][] = [
  [
    "qemu-nbd",
    (place) =>
      startQemuNbd({
        ...{ ...place, image: top, format: "qcow2", exportName: "sda", bitmaps: ["b0"] },
        extra: ["--allocation-depth"],
      }),
  ],
  [
    "qemu-storage-daemon",
    (place) =>
      startStorageDaemon({
        ...place,
        exports: [{ image: top, format: "qcow2", exportName: "sda", bitmaps: ["b0"], allocationDepth: true }],
      }),
  ],
];
const CASES = SERVERS.flatMap(([name, start]) =>
  (["unix", "tcp"] as const).map((transport) => ({ name, transport, start })),
);

describe("NbdClient.map() of a chain of two images", () => {
  it.each(CASES)(
    "equals nbdinfo's for every context of $name over $transport",
    async ({ start, transport }) => {
      await using server = await start({ transport });
      for (const context of [BASE_ALLOCATION, dirtyBitmapContext("b0"), QEMU_ALLOCATION_DEPTH]) {
        const map = await ourMap(server, context);
        expect(map).toEqual(await nbdinfoMap(server, context));
        expect(map.length).toBeGreaterThan(4);
      }
    },
  );

  it("tells by qemu:allocation-depth which image holds what", async () => {
    await using server = await SERVERS[0]![1]({});
    const map = await ourMap(server, QEMU_ALLOCATION_DEPTH);
    const at = (offset: number): number | undefined =>
      map.find((found) => found.offset <= offset && offset < found.offset + found.length)?.flags;
    expect([at(0), at(512 * KiB), at(5 * MiB), at(10 * MiB + 128 * KiB), at(30 * MiB)]).toEqual([
      2, 1, 0, 2, 1,
    ]);
  });
});

describe("NbdClient.read() through filters of nbdkit", () => {
  const filters: readonly [title: string, parameters: readonly string[]][] = [
    ["delay", ["--filter=delay", "rdelay=20ms"]],
    ["readahead", ["--filter=readahead"]],
    ["noextents", ["--filter=noextents"]],
    ["noparallel", ["--filter=noparallel", "serialize=all-requests"]],
    [
      "blocksize-policy that refuses",
      [
        ...["--filter=blocksize-policy", "blocksize-error-policy=error", "blocksize-minimum=65536"],
        ...["blocksize-preferred=65536", "blocksize-maximum=262144"],
      ],
    ],
    ["multi-conn that denies it", ["--filter=multi-conn", "multi-conn-mode=disable"]],
  ];
  it.each(filters)("gets the bytes of the file: %s", async (_title, parameters) => {
    await using server = await startNbdkit({ parameters: ["file", noise, ...parameters] });
    const client = await connect(server.address);
    const expected = await readFile(noise);
    const target = Buffer.alloc(expected.length - 1001);
    await client.read(1000, target);
    expect(target.equals(expected.subarray(1000, expected.length - 1))).toBe(true);
    await client.close();
    expect(await client.closed).toBeUndefined();
  });

  it("has 16 requests in flight while the disk is slow, and no more", async () => {
    const log = directory.file("reads.log");
    {
      const slow = ["--threads=32", "--filter=log", "--filter=delay", `logfile=${log}`, "rdelay=50ms"];
      await using server = await startNbdkit({ parameters: ["file", noise, ...slow] });
      const client = await connect(server.address);
      await Promise.all([client.read(0, Buffer.alloc(4 * MiB)), client.read(0, Buffer.alloc(4 * MiB))]);
      await client.close();
    }
    let now = 0;
    let most = 0;
    for (const line of (await readFile(log, "utf8")).split("\n")) {
      if (/ \.\.\.Read id=/.test(line)) now -= 1;
      else if (/ Read id=/.test(line)) now += 1;
      most = Math.max(most, now);
    }
    expect([now, most]).toEqual([0, 16]);
  });

  it("is not taken for dead while it is only slow", async () => {
    const slow = ["--filter=delay", "rdelay=300ms"];
    await using server = await startNbdkit({ parameters: ["file", noise, ...slow] });
    const client = await connect(server.address, { requestTimeoutMs: 2000 });
    await client.read(0, Buffer.alloc(512));
    await client.close();
    const hasty = await connect(server.address, { requestTimeoutMs: 100 });
    await expect(hasty.read(0, Buffer.alloc(512))).rejects.toMatchObject({ code: "TM_NBD_TIMEOUT" });
  });
});

describe("reconnect() to real servers", () => {
  it("goes on with the same disk when the server was started anew, and refuses a larger one", async () => {
    const serve = (image: string): Promise<RealNbdServer> =>
      startQemuNbd({ image, format: "raw", exportName: "sda" });
    const first = await serve(noise);
    const { address } = first;
    if (address.transport !== "unix") throw new Error("not a unix socket");
    const place = directory.file("same");
    // A socket under a name that outlives its server: each of them is moved there.
    await rename(address.path, place);
    const client = await connect({ transport: "unix", path: place }, { exportName: "sda" });
    await first[Symbol.asyncDispose]();
    await expect(client.read(0, Buffer.alloc(512))).rejects.toMatchObject({
      code: expect.stringMatching(/^TM_NBD_(EOF|CONNECTION)$/) as string,
    });
    {
      await using second = await serve(noise);
      await rename(second.address.transport === "unix" ? second.address.path : "", place);
      const again = await reconnect(client);
      const target = Buffer.alloc(4 * MiB);
      await again.read(0, target);
      expect(target.equals(await readFile(noise))).toBe(true);
      await again.close();
    }
    const larger = await writeNoise(directory.file("larger.raw"), 8 * MiB, 1);
    await using third = await serve(larger);
    await rename(third.address.transport === "unix" ? third.address.path : "", place);
    await expect(reconnect(client)).rejects.toMatchObject({
      code: "TM_NBD_EXPORT_CHANGED",
      message: expect.stringContaining("its size changed from 4194304 to 8388608") as string,
    });
  });
});
