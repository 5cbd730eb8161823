import { cp, rm, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { textWidth } from "../../src/cli/render/text.js";
import { runTidemark, tidemark } from "../support/cli.js";
import { imageMap } from "../support/image.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";

const FIXTURE = fileURLToPath(new URL("../../fixtures/format-1/repository", import.meta.url));

interface Shown {
  readonly id: string;
  readonly chain: readonly string[];
  readonly children: readonly string[];
  readonly restore: {
    readonly bytes: number;
    readonly disks: readonly {
      readonly name: string;
      readonly bytes: number | null;
      readonly images: readonly { readonly point: string; readonly bytes: number; readonly stored: number }[];
      readonly problem: string | null;
    }[];
  };
}

let directory: TemporaryDirectory;
let repository: string;
let ids: string[];

/** Three points of two disks, the last two with a name that nobody wants to read to its end. */
beforeAll(async () => {
  directory = await temporaryDirectory();
  repository = directory.file("repository");
  await cp(FIXTURE, repository, { recursive: true });
  ids = ((await tidemark(["list", "--repo", repository, "--json"])).json() as { id: string }[]).map(
    ({ id }) => id,
  );
  await tidemark(["edit", `web@${ids[1]!}`, "--name", `long ${"n".repeat(200)}`, "--repo", repository]);
});

afterAll(async () => {
  await directory[Symbol.asyncDispose]();
});

async function show(point: string, where = repository): Promise<Shown> {
  return (await tidemark(["show", `web@${point}`, "--repo", where, "--json"])).json() as Shown;
}

describe("tidemark list", () => {
  it("fits a terminal of 80 columns; nothing is cut for a pipe, nor with --verbose", async () => {
    const list = ["list", "--repo", repository];
    for (const locale of ["C.UTF-8", "C"]) {
      const env = { COLUMNS: "80", LC_ALL: locale, TZ: "Asia/Kolkata" };
      const { stdout } = await tidemark(list, { env });
      for (const line of stdout.split("\n")) expect(textWidth(line)).toBeLessThanOrEqual(80);
      for (const id of ids) expect(stdout).toContain(id);
      expect(stdout).toMatch(locale === "C" ? /long n+\.\.\.\n/ : /long n+…\n/);
      expect(stdout).toMatch(/CREATED \(\+0530\)/);
      expect(stdout).toMatch(new RegExp(`\\* ${ids[2]!} +2026-11-20 19:17 `));
      const verbose = await tidemark([...list, "--verbose"], { env });
      expect(verbose.stdout).toContain("n".repeat(200));
      expect(verbose.stdout).toContain(`data: incremental of ${ids[1]!}, `);
    }
    expect((await tidemark(list)).stdout).toContain("n".repeat(200));
  });
});

describe("tidemark show", () => {
  it("says which images a restore reads: those that qemu-img map finds data in", async () => {
    for (const [index, id] of ids.entries()) {
      const { chain, children, restore } = await show(id);
      expect(chain).toEqual(ids.slice(0, index + 1).reverse());
      expect(children).toEqual(ids.slice(index + 1, index + 2));
      for (const { name, images, bytes, problem } of restore.disks) {
        expect(problem).toBeNull();
        expect(images.map(({ point }) => point)).toEqual(chain);
        const map = await imageMap(`${repository}/web/${id}/${name}.qcow2`, "qcow2");
        const depths = new Set(map.flatMap(({ depth, data }) => (data ? [depth] : [])));
        const read = images.flatMap((image, depth) => (image.bytes > 0 ? [depth] : []));
        expect({ id, name, read }).toEqual({ id, name, read: [...depths].sort() });
        expect(bytes).toBe(images.reduce((sum, image) => sum + image.bytes, 0));
        for (const image of images) expect(image.bytes).toBeLessThan(image.stored);
      }
      expect(restore.bytes).toBe(restore.disks.reduce((sum, disk) => sum + disk.bytes!, 0));
    }
  });

  it("shows a point that cannot be restored, and why; list marks it", async () => {
    const broken = directory.file("broken");
    await cp(repository, broken, { recursive: true });
    await rm(`${broken}/web/${ids[0]!}/root.qcow2`);
    const { restore } = await show(ids[2]!, broken);
    const lost = {
      name: "root",
      bytes: null,
      images: [],
      problem: expect.stringContaining("it is missing") as string,
    };
    expect(restore.disks).toMatchObject([lost, { name: "data", problem: null }]);
    expect((await tidemark(["show", "web", "--repo", broken])).stdout).toMatch(
      /root cannot be restored: .*it is missing/,
    );

    await writeFile(`${broken}/web/${ids[0]!}/point.json`, "{");
    const list = await runTidemark(["list", "--repo", broken]);
    expect(list.code).toBe(6);
    expect(list.stdout).toMatch(new RegExp(`! ${ids[0]!} +unreadable\n! ${ids[1]!} .*\n! ${ids[2]!} `));
    expect(list.stdout).toContain("its manifest cannot be read; 2 points need it");
  });
});
