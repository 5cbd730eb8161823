import { readFile, stat, writeFile } from "node:fs/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { KiB, MiB } from "../../src/bytes/index.js";
import { connect, connectSeveral, NbdRequestError, type NbdClient } from "../../src/nbd/index.js";
import { createImage, writeNoise } from "../support/image.js";
import {
  startNbdkit,
  startQemuNbd,
  startStorageDaemon,
  type RealNbdServer,
  type ServerPlace,
} from "../support/nbd-servers.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";

const SIZE = 16 * MiB;
let directory: TemporaryDirectory;
let noise: Buffer;

beforeAll(async () => {
  directory = await temporaryDirectory("tm-nbd-");
  noise = await readFile(await writeNoise(directory.file("noise.raw"), SIZE, 11));
});

afterAll(() => directory[Symbol.asyncDispose]());

/** The changes of the table below, made on the disk and on a model of it. */
class Model {
  readonly bytes = Buffer.alloc(SIZE);

  async apply(client: NbdClient): Promise<void> {
    const write = async (offset: number, length: number): Promise<void> => {
      const bytes = noise.subarray(SIZE - offset - length, SIZE - offset);
      await client.write(offset, bytes);
      bytes.copy(this.bytes, offset);
    };
    const zero = async (offset: number, length: number, noHole: boolean): Promise<void> => {
      await client.writeZeroes(offset, length, { noHole });
      this.bytes.fill(0, offset, offset + length);
    };
    // Side by side, nothing overlaps: whole requests, pieces, odd ends in one block, the first and the last byte.
    await Promise.all([
      ...[write(1, 7), write(9, 100), write(511, 2), write(0, 1), write(4095, 5 * MiB + 3)],
      ...[write(7 * MiB, 300 * KiB), write(SIZE - 1, 1), write(SIZE - 70_000, 4096)],
      write(9 * MiB + 513, 3 * MiB),
    ]);
    await Promise.all([
      ...[zero(2 * MiB + 1, MiB, false), zero(4 * MiB, MiB, true), zero(7 * MiB + 100, 3, false)],
      ...[zero(7 * MiB + 200, 3, true), zero(10 * MiB + 4097, 70_000, true), zero(SIZE - 1, 1, false)],
    ]);
    await client.flush();
  }
}

/** Whether an image is the model: the judge is qemu-img. */
async function expectModel(model: Model, image: string, format: "raw" | "qcow2"): Promise<void> {
  const expected = directory.file("expected.raw");
  await writeFile(expected, model.bytes);
  const args = ["compare", "-f", "raw", "-F", format, expected, image];
  expect((await run("qemu-img", args)).stdout).toContain("Images are identical");
}

type Start = (image: string, place: ServerPlace) => Promise<RealNbdServer>;
const FORMATS = ["raw", "qcow2"] as const;
const QEMU = FORMATS.flatMap((format) => [
  {
    ...{ name: "qemu-nbd", format },
    start: (image: string, place: ServerPlace) =>
      startQemuNbd({ ...place, image, format, exportName: "", writable: true }),
  },
  {
    ...{ name: "qemu-storage-daemon", format },
    start: (image: string, place: ServerPlace) =>
      startStorageDaemon({
        ...place,
        exports: [{ image, format, exportName: "sda", writable: true }],
      }),
  },
]);
const nbdkit =
  (...parameters: readonly string[]): Start =>
  (image, place) =>
    startNbdkit({ ...place, parameters: ["file", image, ...parameters] });
const POLICY = ["--filter=blocksize-policy", "blocksize-error-policy=error", "blocksize-minimum=4096"];
const NBDKIT = [
  { name: "nbdkit", start: nbdkit() },
  { name: "nbdkit without structured replies", start: nbdkit("--no-sr") },
  { name: "nbdkit without write zeroes", start: nbdkit("--filter=nozero") },
  {
    name: "nbdkit with blocks of 4 KiB to 64 KiB",
    start: nbdkit(...POLICY, "blocksize-preferred=4096", "blocksize-maximum=65536"),
  },
].map((server) => ({ ...server, format: "raw" as const }));

describe("NbdClient.write(), writeZeroes() and flush()", () => {
  it.each([...QEMU, ...NBDKIT])(
    "leave on $name ($format) what qemu-img finds equal to the model",
    async ({ name, format, start }) => {
      const image = await createImage(directory.file(`disk.${format}`), format, SIZE);
      const model = new Model();
      {
        await using server = await start(image, { transport: "unix" });
        const exportName = name === "qemu-storage-daemon" ? "sda" : "";
        const client = await connect(server.address, { exportName });
        expect(client.export.flags.readOnly).toBe(false);
        await model.apply(client);
        const back = Buffer.alloc(SIZE);
        await client.read(0, back);
        expect(back.equals(model.bytes)).toBe(true);
        await client.close();
        expect(await client.closed).toBeUndefined();
      }
      await expectModel(model, image, format);
    },
  );

  it("are refused beyond the end, and the connection lives on", async () => {
    const image = await createImage(directory.file("end.raw"), "raw", MiB);
    await using server = await startQemuNbd({ image, format: "raw", exportName: "sda", writable: true });
    const client = await connect(server.address, { exportName: "sda" });
    await expect(client.write(MiB - 512, Buffer.alloc(1024))).rejects.toMatchObject({
      code: "TM_NBD_REQUEST",
      errorName: expect.stringMatching(/^E(NOSPC|INVAL)$/) as string,
      message: expect.stringContaining('Cannot write 1024 bytes at 1048064 of export "sda"') as string,
    });
    await expect(client.writeZeroes(MiB, 512)).rejects.toThrow(NbdRequestError);
    await client.write(MiB - 512, Buffer.alloc(512, 0x5a));
    await client.flush();
    await client.close();
    expect((await readFile(image)).subarray(MiB - 512).equals(Buffer.alloc(512, 0x5a))).toBe(true);
  });

  it("are refused by the client when the export is read-only", async () => {
    const image = await createImage(directory.file("ro.raw"), "raw", MiB);
    await using server = await startQemuNbd({ image, format: "raw", exportName: "sda" });
    const client = await connect(server.address, { exportName: "sda" });
    const refusal = { code: "TM_USAGE", message: 'Cannot write to export "sda": it is read-only' };
    await expect(client.write(0, Buffer.alloc(512))).rejects.toMatchObject(refusal);
    await expect(client.writeZeroes(0, 512)).rejects.toMatchObject(refusal);
    await client.flush();
    await client.close();
  });

  it.each(["ENOSPC", "EIO"])("end with %s of the disk, each write for itself", async (errorName) => {
    const image = await createImage(directory.file("full.raw"), "raw", 4 * MiB);
    const filter = ["--filter=error", `error-pwrite=${errorName}`, "error-pwrite-rate=50%"];
    await using server = await startNbdkit({ parameters: ["file", image, ...filter] });
    const client = await connect(server.address);
    const writes = Array.from({ length: 64 }, (_, index) =>
      client.write(index * 512, noise.subarray(0, 512)),
    );
    const outcomes = await Promise.allSettled(writes);
    const failures = outcomes.flatMap((outcome) =>
      outcome.status === "rejected" ? [outcome.reason as unknown] : [],
    );
    expect(failures.length).toBeGreaterThan(0);
    expect(failures.length).toBeLessThan(64);
    for (const failure of failures) expect(failure).toMatchObject({ errorName });
    await client.flush();
    await client.close();
    const written = await readFile(image);
    for (const [index, { status }] of outcomes.entries()) {
      if (status !== "fulfilled") continue;
      expect(written.subarray(index * 512, index * 512 + 512).equals(noise.subarray(0, 512))).toBe(true);
    }
  });
});

describe("NbdClient.writeZeroes()", () => {
  const blocksOf = async (image: string): Promise<number> => (await stat(image)).blocks * 512;

  it.each(["qemu-nbd", "nbdkit"])("punches holes on %s, and with noHole leaves none", async (name) => {
    const image = await writeNoise(directory.file("holes.raw"), 4 * MiB, 5);
    await using server =
      name === "nbdkit"
        ? await startNbdkit({ parameters: ["file", image] })
        : await startQemuNbd({ image, format: "raw", exportName: "", writable: true });
    const client = await connect(server.address);
    const before = await blocksOf(image);
    await client.writeZeroes(0, MiB, { noHole: true });
    await client.flush();
    expect(await blocksOf(image)).toBe(before);
    await client.writeZeroes(2 * MiB, MiB);
    await client.flush();
    expect(await blocksOf(image)).toBe(before - MiB);
    await client.close();
    const bytes = await readFile(image);
    expect(bytes.subarray(0, MiB).equals(Buffer.alloc(MiB))).toBe(true);
    expect(bytes.subarray(2 * MiB, 3 * MiB).equals(Buffer.alloc(MiB))).toBe(true);
  });
});

/** One line of nbdkit's log filter. */
interface LoggedRequest {
  readonly connection: number;
  readonly id: number;
  readonly kind: string;
  readonly isReturn: boolean;
}

async function readLog(path: string): Promise<LoggedRequest[]> {
  const lines = (await readFile(path, "utf8")).split("\n");
  return lines.flatMap((line) => {
    const [, connection, returned, kind, id] =
      /connection=(\d+) (\.\.\.)?(Write|Zero|Flush) id=(\d+)/.exec(line) ?? [];
    if (kind === undefined) return [];
    return [{ connection: Number(connection), id: Number(id), kind, isReturn: returned !== undefined }];
  });
}

/** The most requests that were under way on one connection. */
function mostInFlight(log: readonly LoggedRequest[], connection: number): number {
  let now = 0;
  let most = 0;
  for (const entry of log.filter((logged) => logged.connection === connection)) {
    now += entry.isReturn ? -1 : 1;
    most = Math.max(most, now);
  }
  return most;
}

describe("connectSeveral()", () => {
  it("gives connections that write side by side, 16 requests in flight on each, and one flush covers all", async () => {
    const image = await createImage(directory.file("several.raw"), "raw", SIZE);
    const log = directory.file("requests.log");
    {
      await using server = await startNbdkit({
        parameters: [
          "--threads=16",
          "--filter=log",
          "--filter=delay",
          "file",
          image,
          `logfile=${log}`,
          "wdelay=50ms",
        ],
      });
      const clients = await connectSeveral(server.address, 4);
      expect(clients).toHaveLength(4);
      const share = SIZE / clients.length;
      await Promise.all(
        clients.map((client, index) =>
          client.write(index * share, noise.subarray(index * share, (index + 1) * share)),
        ),
      );
      await clients[0].flush();
      await Promise.all(clients.map((client) => client.close()));
    }
    expect((await readFile(image)).equals(noise)).toBe(true);
    const requests = await readLog(log);
    const connections = [...new Set(requests.map(({ connection }) => connection))];
    expect(connections).toHaveLength(4);
    // 4 MiB in pieces of 256 KiB are 16 requests on each connection: all of them at once.
    expect(connections.map((connection) => mostInFlight(requests, connection))).toEqual([16, 16, 16, 16]);
    const flushes = requests.filter(({ kind }) => kind === "Flush");
    expect(flushes.map(({ isReturn }) => isReturn)).toEqual([false, true]);
    expect(requests.slice(-2)).toEqual(flushes);
  });

  it("gives qemu-nbd's disk several connections, and what they wrote is what qemu-img finds", async () => {
    const image = await createImage(directory.file("multi.qcow2"), "qcow2", SIZE);
    {
      await using server = await startQemuNbd({ image, format: "qcow2", exportName: "sda", writable: true });
      const clients = await connectSeveral(server.address, 3, { exportName: "sda" });
      expect(clients).toHaveLength(3);
      const piece = 512 * KiB;
      await Promise.all(
        Array.from({ length: SIZE / piece }, (_, index) =>
          clients[index % 3]!.write(index * piece, noise.subarray(index * piece, (index + 1) * piece)),
        ),
      );
      await clients[0].flush();
      await Promise.all(clients.map((client) => client.close()));
    }
    await run("qemu-img", ["check", image]);
    const noisy = directory.file("noise.raw");
    const { stdout } = await run("qemu-img", ["compare", "-f", "raw", "-F", "qcow2", noisy, image]);
    expect(stdout).toContain("identical");
  });

  it("gives one connection where the server does not say that several see one state", async () => {
    const image = await createImage(directory.file("single.raw"), "raw", MiB);
    await using server = await startQemuNbd({
      ...{ image, format: "raw", exportName: "sda", writable: true, extra: ["--shared=1"] },
    });
    const clients = await connectSeveral(server.address, 4, { exportName: "sda" });
    expect(clients).toHaveLength(1);
    expect(clients[0].export.flags.canMultiConn).toBe(false);
    await clients[0].close();
  });
});
