import { open, readdir, readFile, stat, writeFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";
import { afterEach, describe, expect, it, vi } from "vitest";
import { createImage, sha256OfFile, writeNoise } from "../support/image.js";
import { Rig } from "../support/rig.js";
import { run } from "../support/tools.js";

const MiB = 1024 * 1024;
const GiB = 1024 * MiB;
const TiB = 1024 * GiB;

/** Pieces of 1 MiB each, nearly all at places where no cluster begins. */
const PIECES = 200;
const placeOf = (piece: number): number => piece * 5 * GiB + piece * 13 * 512 + 1536;

/** Clusters of 64 KiB that the pieces touch. */
const CLUSTERS = Array.from({ length: PIECES }, (_, piece) => {
  const [first, last] = [placeOf(piece), placeOf(piece) + MiB - 1].map((at) => Math.floor(at / 65_536));
  return (last ?? 0) - (first ?? 0) + 1;
}).reduce((sum, clusters) => sum + clusters);

/** Seconds that nobody should wait for either backup; includes the reference copies that are made at the freeze. */
const MOST_SECONDS = 60;
const MOST_RESIDENT = 300 * MiB;
/** As many as a host of many cores would get. */
const WORKERS = ["--workers", "4"];

afterEach(() => {
  vi.unstubAllEnvs();
});

/** A sparse qcow2 disk with `PIECES` pieces of noise, no two alike. */
async function largeDisk(rig: Rig): Promise<string> {
  const raw = await createImage(rig.directory.file("large.raw"), "raw", TiB);
  const noise = await readFile(await writeNoise(rig.directory.file("noise"), PIECES * MiB, 7));
  await using file = await open(raw, "r+");
  for (let piece = 0; piece < PIECES; piece += 1) {
    await file.write(noise, piece * MiB, MiB, placeOf(piece));
  }
  const path = rig.directory.file("large.qcow2");
  await run("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", raw, path]);
  return path;
}

/** From now on every run of the command line writes down the most memory it had, threads included, as it exits; its guards do not. */
async function recordMemory(rig: Rig): Promise<() => Promise<number>> {
  const hook = rig.directory.file("record-memory.mjs");
  await writeFile(
    hook,
    `import { readFileSync, writeFileSync } from "node:fs";
     import { isMainThread } from "node:worker_threads";
     if (isMainThread && process.argv[1].endsWith("cli/main.js")) process.on("exit", () => {
       const peak = /^VmHWM:\\s+(\\d+) kB$/m.exec(readFileSync("/proc/self/status", "utf8"))[1];
       writeFileSync(${JSON.stringify(rig.directory.path)} + "/" + process.pid + ".peak", String(peak * 1024));
     });`,
  );
  vi.stubEnv("NODE_OPTIONS", `--import=${pathToFileURL(hook).href}`);
  const seen = new Set<string>();
  return async () => {
    const files = (await readdir(rig.directory.path)).filter((name) => name.endsWith(".peak"));
    const [file, ...more] = files.filter((name) => !seen.has(name));
    if (file === undefined || more.length > 0) throw new Error(`New measurements: ${files.join(", ")}`);
    seen.add(file);
    return Number(await readFile(rig.directory.file(file), "utf8"));
  };
}

async function timed<T>(what: string, peakOf: () => Promise<number>, action: () => Promise<T>): Promise<T> {
  const started = performance.now();
  const result = await action();
  const seconds = (performance.now() - started) / 1000;
  const peak = await peakOf();
  process.stderr.write(`${what}: ${seconds.toFixed(1)} s, ${Math.round(peak / MiB)} MiB resident at most\n`);
  expect(seconds, `seconds of the ${what}`).toBeLessThan(MOST_SECONDS);
  // Node alone has tens of MiB: less would be a measurement of something else.
  expect(peak).toBeGreaterThan(30 * MiB);
  expect(peak, `resident bytes of the ${what}`).toBeLessThan(MOST_RESIDENT);
  return result;
}

describe("backup of a disk of 1 TiB with 200 MiB in it", () => {
  it("takes seconds and little memory, full, increment and comparison, and so does the restore; empty and tiny disks go along", async () => {
    await using rig = await Rig.create();
    const large = await largeDisk(rig);
    const empty = await rig.image("empty.raw", "raw", 0);
    const tiny = await rig.image("tiny.raw", "raw", 512);
    const images = { large, empty, tiny };
    const machine = await rig.start(
      [
        { path: large, format: "qcow2", id: "large" },
        { path: empty, format: "raw", id: "empty" },
        { path: tiny, format: "raw", id: "tiny" },
      ],
      { guest: "none", deadline: 400_000 },
    );
    await machine.qemuIo("tiny", "write -P 0x5a 0 512");
    const peakOf = await recordMemory(rig);

    const full = await timed("full", peakOf, () => rig.backup(WORKERS));
    expect(full.disks.map(({ name, kind, virtualSize }) => [name, kind, virtualSize])).toEqual([
      ["large", "full", TiB],
      ["empty", "full", 0],
      ["tiny", "full", 512],
    ]);
    expect(full.disks[0]?.dataClusters).toBe(CLUSTERS);

    await machine.qemuIoAll("large", [
      "write -P 0x11 0 1M",
      `write -P 0x22 ${TiB - MiB - 512} ${MiB + 512}`,
      `write -P 0x33 ${TiB / 2 - 700 * 512} 2M`,
      `write -z -u ${placeOf(50)} 1M`,
    ]);
    await machine.qemuIo("tiny", "write -P 0xa5 0 512");
    const increment = await timed("increment", peakOf, () => rig.backup(WORKERS));
    expect(increment.disks.map(({ kind }) => kind)).toEqual(["incremental", "incremental", "incremental"]);
    expect(increment.disks[0]?.bytes).toBeLessThan(MiB);
    expect(increment.disks[0]?.dataClusters).toBeGreaterThan((4 * MiB) / 65_536);

    await machine.qemuIoAll("large", [`write -P 0x44 ${placeOf(60)} 1k`, `write -z ${placeOf(70)} 1M`]);
    const compared = await timed("comparison", peakOf, () => rig.backup([...WORKERS, "--compare"]));
    expect(compared.disks.map(({ kind }) => kind)).toEqual(["incremental", "incremental", "incremental"]);
    // The piece began inside of a cluster, and held all that its first and last ones did.
    expect(compared.disks[0]).toMatchObject({ dataClusters: 1, zeroClusters: MiB / 65_536 + 1 });

    for (const [point, title] of [
      [full, "restore of the full"],
      [increment, "restore of the increment"],
      [compared, "restore of the comparison"],
    ] as const) {
      const directory = await timed(title, peakOf, () => rig.restore(point));
      expect(await rig.verify(point, images)).toEqual({
        large: "identical",
        empty: "identical",
        tiny: "identical",
      });
      const { size, blocks } = await stat(`${directory}/large.raw`);
      expect(size).toBe(TiB);
      expect(blocks * 512).toBeLessThan(PIECES * 2 * MiB);
      expect((await stat(`${directory}/empty.raw`)).size).toBe(0);
      expect(await sha256OfFile(`${directory}/tiny.raw`)).toBe(
        await sha256OfFile(rig.reference(point, tiny)),
      );
    }
  }, 400_000);
});
