import { randomBytes, randomInt } from "node:crypto";
import { once } from "node:events";
import { readdir, readFile, rm, stat } from "node:fs/promises";
import { connect as connectSocket, type Socket } from "node:net";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { connect } from "../../src/nbd/index.js";
import { initRepository, type PointManifest } from "../../src/repository/index.js";
import { servePoint } from "../../src/serve/index.js";
import { MemoryStorage } from "../../src/storage/index.js";
import { startTidemark, type RunningTidemark } from "../support/cli.js";
import { readTrail } from "../support/guest.js";
import { compareImages, sha256OfFile, toRaw } from "../support/image.js";
import { frame } from "../support/nbd-frames.js";
import { startMachine } from "../support/qemu.js";
import { Rig, type PointView } from "../support/rig.js";
import { temporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";
import { pointId, writePoint } from "./repository-points.js";

const KiB = 1024;
const MiB = 1024 * KiB;
const CLUSTER = 64 * KiB;

let rig: Rig;
let image: string;
const points: PointView[] = [];

/** Three points of a machine whose guest writes all the time; before the last one a range is discarded. */
beforeAll(async () => {
  rig = await Rig.create();
  image = await rig.image("a.qcow2", "qcow2", 24 * MiB);
  const machine = await rig.start([{ path: image, format: "qcow2" }], {
    guest: "counter",
    deadline: 240_000,
  });
  for (let number = 1; number <= 3; number += 1) {
    await machine.waitForGuestWriting(60);
    if (number === 2) await machine.qemuIo(0, "write -P 7 18M 2M");
    if (number === 3) await machine.qemuIo(0, "write -z -u 19M 512k");
    points.push(await rig.backup());
  }
  await machine.quit();
}, 120_000);

afterAll(async () => {
  await rig[Symbol.asyncDispose]();
});

const at = (number: number): PointView => points[number - 1]!;
const stored = (number: number): string =>
  `${rig.repository}/vm/${at(number).id}/${at(number).disks[0]!.image}`;

/** Starts `tidemark serve`, and waits until it serves. */
async function serve(number: number, socket: string): Promise<RunningTidemark> {
  const args = ["serve", `vm@${at(number).id}`, "--repo", rig.repository, "--socket", socket, "--json"];
  const server = startTidemark(args, { deadline: 120_000 });
  await server.nextEvent(({ event }) => event === "serving");
  return server;
}

const uriOf = (socket: string): string => `nbd+unix:///vd0?socket=${socket}`;

async function allOfRepository(): Promise<Record<string, string>> {
  const files = (await readdir(rig.repository, { recursive: true, withFileTypes: true }))
    .filter((entry) => entry.isFile())
    .map((entry) => `${entry.parentPath}/${entry.name}`);
  const sums = await Promise.all(files.map(async (file) => [file, await sha256OfFile(file)] as const));
  return Object.fromEntries(sums);
}

describe("tidemark serve", () => {
  it("calls changed all that differs from the parent, by the bytes of both, and little else", async () => {
    for (const number of [2, 3]) {
      const socket = rig.directory.file(`map${number}`);
      await using server = await serve(number, socket);
      const { stdout } = await run("nbdinfo", ["--json", "--map=qemu:dirty-bitmap:changed", uriOf(socket)]);
      const map = JSON.parse(stdout) as { offset: number; length: number; type: number }[];
      const changed = new Set<number>();
      for (const { offset, length, type } of map) {
        expect([0, 1]).toContain(type);
        if (type === 1)
          for (let byte = offset; byte < offset + length; byte += CLUSTER) changed.add(byte / CLUSTER);
      }
      const [before, now] = await Promise.all(
        [number - 1, number].map(async (point) =>
          readFile(await toRaw(stored(point), "qcow2", rig.directory.file(`bytes-${number}-${point}`))),
        ),
      );
      const differing = [...Array(24 * 16).keys()].filter(
        (cluster) =>
          !before!
            .subarray(cluster * CLUSTER, (cluster + 1) * CLUSTER)
            .equals(now!.subarray(cluster * CLUSTER, (cluster + 1) * CLUSTER)),
      );
      expect(differing.length).toBeGreaterThan(30);
      expect(differing.filter((cluster) => !changed.has(cluster))).toEqual([]);
      const { dataClusters, zeroClusters } = at(number).disks[0]!;
      expect(changed.size).toBe(dataClusters + zeroClusters);
      expect(changed.size).toBeLessThan(differing.length + 32);
      server.kill("SIGINT");
      expect((await server.ended).code).toBe(130);
    }
  });

  it("is below a machine that boots from an overlay and writes, while the point stays as it is", async () => {
    const socket = rig.directory.file("boot");
    const before = await allOfRepository();
    await using server = await serve(2, socket);
    const overlay = rig.directory.file("overlay.qcow2");
    await run("qemu-img", ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", uriOf(socket), overlay]);
    const reference = rig.reference(at(2), image);
    const counter = await readTrail(reference);

    await using machine = await startMachine({
      disks: [{ path: overlay, format: "qcow2" }],
      guest: "counter",
    });
    await machine.waitForGuestWriting(600);
    // While it writes, others read the point.
    await run("nbdcopy", ["--connections=4", uriOf(socket), rig.directory.file("meanwhile")]);
    expect(await compareImages(rig.directory.file("meanwhile"), reference)).toBe("identical");
    await machine.quit();

    const written = await toRaw(overlay, "qcow2", rig.directory.file("written"));
    // All that it found, and all that it wrote: from the number on that the point held.
    expect(await readTrail(written)).toBeGreaterThan(counter + 200);
    const compared = await run("qemu-img", ["compare", "-f", "raw", "-F", "raw", uriOf(socket), reference]);
    expect(compared.stdout).toContain("identical");
    expect(await allOfRepository()).toEqual(before);
    server.kill("SIGINT");
    expect((await server.ended).code).toBe(130);
  });

  it("serves on while clients ask for everything and take nothing, with bounded memory, and ends on SIGTERM", async () => {
    const socket = rig.directory.file("slow");
    await using server = await serve(3, socket);
    const slow = await Promise.all(Array.from({ length: 48 }, () => greedyClient(socket)));
    const reference = rig.reference(at(3), image);
    const copies = ["c1", "c2", "c3"].map((name) => rig.directory.file(name));
    await Promise.all(copies.map((copy) => run("nbdcopy", ["--connections=4", uriOf(socket), copy])));
    for (const copy of copies) expect(await compareImages(copy, reference)).toBe("identical");
    const status = await readFile(`/proc/${server.pid}/status`, "utf8");
    const peak = Number(/VmHWM:\s+(\d+) kB/.exec(status)?.[1]) / KiB;
    // They want 48 times 24 MiB, again and again.
    expect(peak).toBeGreaterThan(50);
    expect(peak).toBeLessThan(640);

    expect(slow.filter((client) => client.destroyed)).toEqual([]);
    const ends = slow.map((client) => once(client.resume(), "close"));
    server.kill("SIGTERM");
    expect(await server.ended).toMatchObject({ code: 130, signal: null });
    await Promise.all(ends);
    await expect(stat(socket)).rejects.toMatchObject({ code: "ENOENT" });
    for (const copy of copies) await rm(copy);
  });
});

/** Asks for the whole disk, many times, in every way, and takes nothing. */
async function greedyClient(path: string): Promise<Socket> {
  const socket = connectSocket(path).on("error", () => undefined);
  await once(socket, "connect");
  socket.pause();
  const option = (number: number, data: string): void => {
    socket.write(frame("IHAVEOPT", [32, number], [32, data.length], data));
  };
  socket.write(frame([32, 3]));
  if (randomInt(2) === 1) option(8, "");
  option(1, "vd0");
  for (let cookie = 0; cookie < 500; cookie += 1) {
    const length = cookie % 3 === 0 ? 24 * MiB : 256 * KiB;
    const [offset, flags] = [length === 24 * MiB ? 0 : (cookie % 90) * 256 * KiB, (cookie % 2) * 4];
    socket.write(frame([32, 0x25609513], [16, flags], [16, 0], [64, cookie], [64, offset], [32, length]));
  }
  return socket;
}

describe("servePoint()", () => {
  it("reads any range as it was, of chains whose sizes changed, however requests cut through clusters", async () => {
    await using directory = await temporaryDirectory();
    const repository = await initRepository(new MemoryStorage());
    const clusterSize = 4 * KiB;
    let content = Buffer.alloc(0);
    let parent: PointManifest | undefined;
    for (const [index, size] of [
      300 * clusterSize + 512,
      130 * clusterSize - 1024,
      281 * clusterSize + 1536,
    ].entries()) {
      content = Buffer.concat([content.subarray(0, size), Buffer.alloc(Math.max(0, size - content.length))]);
      const data = new Map<number, Buffer>();
      const zero: number[] = [];
      for (let cluster = 0; cluster * clusterSize < size; cluster += 1) {
        const [start, end] = [cluster * clusterSize, Math.min((cluster + 1) * clusterSize, size)];
        const part = content.subarray(start, end);
        if ((cluster >> 2) % 3 === index) data.set(cluster, randomBytes(end - start));
        else if (cluster % 7 === 0) zero.push(cluster);
        // What was cut off is zero when the disk has grown again.
        else if (index === 2 && cluster >= 129) zero.push(cluster);
        else continue;
        part.set(data.get(cluster) ?? Buffer.alloc(end - start));
      }
      const disk = { name: "sda", token: "00c0ffee", virtualSize: size, clusterSize, data, zero, parent };
      parent = await writePoint(repository, { machine: "web", id: pointId(index + 1), disks: [disk] });
    }
    const address = { transport: "unix", path: directory.file("s") } as const;
    await using server = await servePoint({ repository, point: parent!, address });
    await run("nbdcopy", [`nbd+unix:///sda?socket=${address.path}`, directory.file("copy")]);
    expect((await readFile(directory.file("copy"))).equals(content)).toBe(true);

    const clients = await Promise.all([1, 2, 3].map(() => connect(server.address, { exportName: "sda" })));
    const reads = Array.from({ length: 600 }, async (_, index) => {
      const offset = randomInt(content.length);
      const length = Math.min(
        1 + randomInt(randomInt(10) === 0 ? content.length : 3 * clusterSize),
        content.length - offset,
      );
      const target = Buffer.alloc(length, 0xee);
      await clients[index % 3]!.read(offset, target);
      if (!target.equals(content.subarray(offset, offset + length)))
        throw new Error(`${length} bytes at ${offset} read wrong`);
    });
    await Promise.all(reads);
    await Promise.all(clients.map((client) => client.close()));
  });

  it("answers a read of damaged data with an error, and all others as they were", async () => {
    await using directory = await temporaryDirectory();
    const storage = new MemoryStorage();
    const repository = await initRepository(storage);
    const data = new Map([0, 1, 2].map((cluster) => [cluster, randomBytes(CLUSTER)]));
    const disk = { name: "sda", token: "00c0ffee", virtualSize: 4 * CLUSTER, data };
    const point = await writePoint(repository, { machine: "web", id: pointId(1), disks: [disk] });
    const key = `web/${point.id}/sda.qcow2`;
    const bytes = await storage.get(key, { maxLength: MiB });
    // In the middle of the second frame, behind the header cluster and the first one.
    bytes[2.5 * CLUSTER]! ^= 4;
    await storage.put(key, bytes);
    const problems: unknown[] = [];
    const address = { transport: "unix", path: directory.file("s") } as const;
    await using server = await servePoint({
      repository,
      point,
      address,
      onProblem: (error) => problems.push(error),
    });
    const client = await connect(server.address, { exportName: "sda" });
    const target = Buffer.alloc(CLUSTER);
    for (const [offset, length] of [
      [CLUSTER, CLUSTER],
      [CLUSTER + 512, 512],
      [0, 4 * CLUSTER],
    ] as const)
      await expect(client.read(offset, Buffer.alloc(length))).rejects.toMatchObject({ errorName: "EIO" });
    for (const cluster of [0, 2, 0]) {
      await client.read(cluster * CLUSTER, target);
      expect(target.equals(data.get(cluster)!)).toBe(true);
    }
    await client.close();
    expect(problems).toHaveLength(3);
    for (const problem of problems)
      expect(problem).toMatchObject({ damage: { object: key, points: [point.id] } });
  });
});
