import { mkdir, readFile, rm, stat, writeFile } from "node:fs/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { runTidemark, startTidemark, tidemark, type CliResult } from "../support/cli.js";
import { checkImage, CLEAN, compareImages, createImage, qemuIo, toRaw } from "../support/image.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";

const MiB = 1024 * 1024;

let directory: TemporaryDirectory;
let repository: string;
let ids: string[];

/** Four points of two disks, the second of which changes its size; what each held is kept beside it. */
beforeEach(async () => {
  directory = await temporaryDirectory();
  repository = directory.file("repository");
  const [root, data] = [directory.file("root.qcow2"), directory.file("data.qcow2")];
  await createImage(root, "qcow2", 24 * MiB);
  await createImage(data, "qcow2", 6 * MiB + 512);
  await cli("init");
  ids = [];
  for (const number of [1, 2, 3, 4]) {
    await qemuIo(root, "qcow2", [`write -P ${number} ${number}M 3M`, `write -P 9${number} 20M 100k`]);
    if (number === 3)
      await run("qemu-img", ["resize", "--shrink", "-f", "qcow2", data, String(3 * MiB + 1024)]);
    if (number === 4) await run("qemu-img", ["resize", "-f", "qcow2", data, String(9 * MiB + 512)]);
    await qemuIo(data, "qcow2", [`write -P ${number} ${number * 512}k 200k`]);
    const images = ["--image", `root=${root}`, "--image", `data=${data}`];
    const result = await cli("backup", "--machine", "vm", ...images, "--name", `p${number}`, "--json");
    const { point } = result.events().at(-1) as { point: { id: string } };
    ids.push(point.id);
    await toRaw(root, "qcow2", held(number, "root"));
    await toRaw(data, "qcow2", held(number, "data"));
  }
}, 120_000);

afterEach(async () => {
  await directory[Symbol.asyncDispose]();
});

const held = (number: number, disk: string): string => directory.file(`held-${number}-${disk}.raw`);

function options(): { env: Record<string, string> } {
  return { env: { TIDEMARK_REPO: repository, TIDEMARK_RUNTIME_DIR: directory.path } };
}

async function cli(...args: readonly string[]): Promise<CliResult> {
  return await tidemark(args[0] === "init" ? ["init", "--repo", repository] : args, options());
}

/** The points of the repository by their numbers, each compared with what it held: as restored, and by bare qemu-img. */
async function points(): Promise<Record<number, { kinds: string; verdict: string }>> {
  const list = JSON.parse((await cli("list", "--json")).stdout) as {
    id: string;
    disks: { name: string; kind: string; image: string }[];
  }[];
  const found: Record<number, { kinds: string; verdict: string }> = {};
  for (const { id, disks } of list) {
    const number = ids.indexOf(id) + 1;
    const verdicts = new Set<string>();
    const restored = directory.file("restored");
    await cli("restore", `vm@${id}`, "--to-dir", restored);
    for (const { name, image } of disks) {
      const path = `${repository}/vm/${id}/${image}`;
      const { report, ...clean } = await checkImage(path);
      expect(clean, report).toEqual(CLEAN);
      const reference = { path: held(number, name), format: "raw" } as const;
      verdicts.add(await compareImages({ path, format: "qcow2" }, reference));
      verdicts.add(await compareImages({ path: `${restored}/${name}.raw`, format: "raw" }, reference));
    }
    await rm(restored, { recursive: true });
    found[number] = { kinds: disks.map(({ kind }) => kind).join(), verdict: [...verdicts].join() };
  }
  return found;
}

const INCREMENTAL = { kinds: "incremental,incremental", verdict: "identical" };
const FULL = { kinds: "full,full", verdict: "identical" };

describe("tidemark delete", () => {
  it("moves the oldest full into its child, and one in the middle, sizes that changed included", async () => {
    expect(await points()).toEqual({ 1: FULL, 2: INCREMENTAL, 3: INCREMENTAL, 4: INCREMENTAL });
    const dry = (await cli("delete", "vm@p3", "--dry-run", "--json")).events().at(-1);
    expect(dry).toMatchObject({
      dryRun: true,
      removed: [ids[2]],
      rewritten: [{ id: ids[3] }, { id: ids[3] }],
    });
    expect(Object.keys(await points())).toHaveLength(4);

    await cli("delete", "vm@p3");
    expect(await points()).toEqual({ 1: FULL, 2: INCREMENTAL, 4: INCREMENTAL });
    const done = (await cli("delete", "vm@p1", "--json")).events().at(-1);
    expect(done).toMatchObject({ event: "result", dryRun: false, removed: [ids[0]], kept: [] });
    expect(await points()).toEqual({ 2: FULL, 4: INCREMENTAL });
    await expect(stat(`${repository}/vm/${ids[0]!}`)).rejects.toMatchObject({ code: "ENOENT" });
  });

  it("is followed by increments of what is left", async () => {
    await cli("delete", "vm@p2");
    const [root, data] = [directory.file("root.qcow2"), directory.file("data.qcow2")];
    await qemuIo(root, "qcow2", ["write -P 77 11M 64k"]);
    const result = await cli(
      "backup",
      "--machine",
      "vm",
      "--image",
      `root=${root}`,
      "--image",
      `data=${data}`,
      "--json",
    );
    const { point } = result.events().at(-1) as { point: { id: string; disks: { kind: string }[] } };
    expect(point.disks.map(({ kind }) => kind)).toEqual(["incremental", "incremental"]);
    ids.push(point.id);
    await toRaw(root, "qcow2", held(5, "root"));
    await toRaw(data, "qcow2", held(5, "data"));
    expect(await points()).toEqual({ 1: FULL, 3: INCREMENTAL, 4: INCREMENTAL, 5: INCREMENTAL });
  });

  it("takes the subtree, or all but the point; the current point only with --force", async () => {
    const refused = await runTidemark(["delete", "vm@p3", "--children"], options());
    expect(refused).toMatchObject({
      code: 2,
      stderr: expect.stringContaining("the next backup could not continue it") as string,
    });
    expect(Object.keys(await points())).toHaveLength(4);
    await cli("delete", "vm@p3", "--children-only", "--force");
    expect(await points()).toEqual({ 1: FULL, 2: INCREMENTAL, 3: INCREMENTAL });
    await cli("delete", "vm@p2", "--children", "--force");
    expect(await points()).toEqual({ 1: FULL });
  });

  it("forgets a point with --metadata-only: its images stay for those that need them", async () => {
    await cli("delete", "vm@p2", "--metadata-only");
    expect(await points()).toEqual({ 1: FULL, 3: INCREMENTAL, 4: INCREMENTAL });
    await stat(`${repository}/vm/${ids[1]!}/root.qcow2`);
    expect(await runTidemark(["show", "vm@p2"], options())).toMatchObject({ code: 4 });
    // What is left of it goes with the last point that needs it.
    const deleted = await cli("delete", "vm@p3", "--children", "--force", "--json");
    expect(deleted.events().at(-1)).toMatchObject({ removed: ids.slice(1) });
    expect(await points()).toEqual({ 1: FULL });
    await expect(stat(`${repository}/vm/${ids[1]!}`)).rejects.toMatchObject({ code: "ENOENT" });
  });

  it("and its neighbours refuse what makes no sense, and change nothing", async () => {
    const cases: readonly (readonly [args: readonly string[], code: number, says: string])[] = [
      [["delete", "vm"], 2, "names a machine"],
      [["delete", "vm@nobody"], 4, "nobody"],
      [["delete", "db@latest"], 4, "db"],
      [["delete", "vm@latest"], 2, "--force"],
      [["flatten", "vm@../../etc"], 4, "../../etc"],
      [["prune"], 2, "--keep-last"],
      [["prune", "vm", "--keep-daily", "-1"], 2, "whole number"],
      [["prune", "nobody", "--keep-last", "1"], 4, "nobody"],
      [["edit", "vm@p1"], 2, "Nothing is to be changed"],
      [["edit", "vm@p1", "--name", "p2"], 2, "has the name"],
      [["serve", "vm@p1"], 2, "--socket"],
      [["serve", "vm@p1", "--listen", "nowhere"], 2, "HOST:PORT"],
    ];
    for (const [args, code, says] of cases) {
      const result = await runTidemark(args, options());
      expect(result.code, args.join(" ")).toBe(code);
      expect(result.stderr).toContain(says);
    }
    expect(await points()).toEqual({ 1: FULL, 2: INCREMENTAL, 3: INCREMENTAL, 4: INCREMENTAL });
  });
});

describe("tidemark flatten, prune and edit", () => {
  it("make a synthetic full, and then let the points before it go without a copy", async () => {
    await cli("flatten", "vm@p3");
    expect(await points()).toEqual({ 1: FULL, 2: INCREMENTAL, 3: FULL, 4: INCREMENTAL });
    const pruned = (await cli("prune", "vm", "--keep-last", "2", "--json")).events().at(-1);
    expect(pruned).toMatchObject({ removed: ids.slice(0, 2), rewritten: [] });
    expect(await points()).toEqual({ 3: FULL, 4: INCREMENTAL });
  });

  it("keep what any rule keeps, and say why", async () => {
    await cli("edit", "vm@p2", "--name", "before-upgrade", "--description", "the last good one");
    const args = ["prune", "vm", "--keep-name", "before-*", "--keep-daily", "1"];
    const plan = await cli(...args, "--dry-run");
    expect(plan.stdout).toMatch(new RegExp(`${ids[2]!}  remove`));
    expect(plan.stdout).not.toContain("nothing to do");
    expect(plan.stdout).toMatch(new RegExp(`${ids[1]!}  keep +name matches "before-\\*"`));
    expect(plan.stdout).toMatch(new RegExp(`${ids[3]!}  keep +current, daily`));
    await cli(...args);
    expect(await points()).toEqual({ 2: FULL, 4: INCREMENTAL });
    const shown = JSON.parse((await cli("show", "vm@before-upgrade", "--json")).stdout) as object;
    expect(shown).toMatchObject({ id: ids[1], name: "before-upgrade", description: "the last good one" });
    await cli("edit", "vm@before-upgrade", "--name", "");
    expect(JSON.parse((await cli("show", `vm@${ids[1]!}`, "--json")).stdout)).toMatchObject({ name: null });
  });
});

describe("tidemark prune", () => {
  it("goes on with the other machines when one fails, and ends with 3; an empty TZ is UTC", async () => {
    const broken = `${repository}/a/${ids[0]!}`;
    await mkdir(broken, { recursive: true });
    await writeFile(`${broken}/point.json`, "no manifest");
    const environment = { env: { ...options().env, TZ: "" } };
    const pruned = await runTidemark(["prune", "--keep-daily", "1", "--json"], environment);
    expect(pruned).toMatchObject({ code: 3, stderr: expect.stringContaining('machine \\"a\\"') as string });
    expect(pruned.events().at(-1)).toMatchObject({ removed: ids.slice(0, 3) });
    expect(await readFile(`${broken}/point.json`, "utf8")).toBe("no manifest");
    await rm(`${repository}/a`, { recursive: true });
    expect(await points()).toEqual({ 4: FULL });
  });
});

describe("tidemark serve", () => {
  it("offers each disk to nbdcopy, nbdinfo and qemu-img, also while the chain is rewritten", async () => {
    const socket = directory.file("s");
    await using server = startTidemark(["serve", "vm@p4", "--socket", socket, "--json"], options());
    await server.nextEvent(({ event }) => event === "serving");
    const uri = (disk: string): string => `nbd+unix:///${disk}?socket=${socket}`;
    const info = JSON.parse((await run("nbdinfo", ["--json", "--list", uri("")])).stdout) as {
      exports: Record<string, unknown>[];
    };
    expect(info.exports.map((item) => [item["export-name"], item["export-size"], item["contexts"]])).toEqual([
      ["root", 24 * MiB, ["base:allocation", "qemu:dirty-bitmap:changed"]],
      ["data", 9 * MiB + 512, ["base:allocation", "qemu:dirty-bitmap:changed"]],
    ]);
    const map = JSON.parse(
      (await run("nbdinfo", ["--json", "--map=qemu:dirty-bitmap:changed", uri("root")])).stdout,
    ) as { offset: number; length: number; type: number }[];
    const changed = map.filter(({ type }) => type === 1).map(({ offset, length }) => [offset, length]);
    expect(changed).toEqual([
      [4 * MiB, 3 * MiB],
      [20 * MiB, 128 * 1024],
    ]);

    const expectSame = async (): Promise<void> => {
      for (const disk of ["root", "data"]) {
        await run("nbdcopy", [uri(disk), directory.file("copy")]);
        expect((await readFile(directory.file("copy"))).equals(await readFile(held(4, disk)))).toBe(true);
        await rm(directory.file("copy"));
        const compared = await run("qemu-img", [
          "compare",
          "-f",
          "raw",
          "-F",
          "raw",
          uri(disk),
          held(4, disk),
        ]);
        expect(compared.stdout).toContain("identical");
      }
    };
    await expectSame();
    await cli("prune", "vm", "--keep-last", "1");
    await expectSame();

    server.kill("SIGINT");
    expect((await server.ended).code).toBe(130);
    await expect(stat(socket)).rejects.toMatchObject({ code: "ENOENT" });
  });
});

describe("tidemark verify", () => {
  interface Report {
    points: number;
    ok: boolean;
    problems: { point: string; disk: string | null; problem: string; affects: string[] }[];
  }

  async function verify(...args: readonly string[]): Promise<{ code: number | null; report: Report }> {
    const result = await runTidemark(["verify", "--json", ...args], options());
    return { code: result.code, report: result.events().at(-1) as unknown as Report };
  }

  /** Changes one byte of a file in the repository for as long as `work` takes. */
  async function withFlipped(path: string, at: number, work: () => Promise<void>): Promise<void> {
    const bytes = await readFile(path);
    const broken = Buffer.from(bytes);
    broken[at]! ^= 1;
    await writeFile(path, broken);
    await work();
    await writeFile(path, bytes);
  }

  it("finds every kind of damage, and the points that it costs; --quick all but that of data", async () => {
    const clean = { code: 0, report: { points: 4, ok: true, problems: [] } };
    expect(await verify()).toMatchObject(clean);
    expect(await verify("vm@p2")).toMatchObject({ code: 0, report: { points: 2, ok: true } });
    const image = `${repository}/vm/${ids[1]!}/root.qcow2`;
    const { size } = await stat(image);
    const lost = [{ point: ids[1], disk: "root", affects: ids.slice(1) }];
    // Its first frame lies behind the header cluster, its tables at its end.
    await withFlipped(image, 65_536 + 30, async () => {
      // Later points may have replaced what the frame holds.
      const read = [{ ...lost[0], affects: expect.arrayContaining([ids[1]]) as string[] }];
      expect(await verify()).toMatchObject({ code: 6, report: { ok: false, problems: read } });
      expect(await verify("--quick")).toMatchObject(clean);
      expect(await verify("--percent", "0")).toMatchObject(clean);
      expect((await verify("vm@p1")).code).toBe(0);
      expect((await verify("vm@p4")).code).toBe(6);
    });
    for (const at of [20, size - 65_536 + 3, size - 2 * 65_536 + 3]) {
      await withFlipped(image, at, async () => {
        expect(await verify("--quick")).toMatchObject({ code: 6, report: { problems: lost } });
      });
    }
    await withFlipped(`${repository}/vm/${ids[2]!}/data.hashes`, 110, async () => {
      const { code, report } = await verify("--quick");
      expect({ code, problems: report.problems }).toMatchObject({
        code: 6,
        problems: [{ point: ids[2], disk: "data", affects: [] }],
      });
    });
    await withFlipped(`${repository}/vm/${ids[2]!}/point.json`, 0, async () => {
      const { code, report } = await verify("--quick");
      expect(code).toBe(6);
      expect(report.problems[0]).toMatchObject({ point: ids[2], disk: null, affects: ids.slice(2) });
    });
    await rm(`${repository}/vm/${ids[0]!}/data.qcow2`);
    const { report } = await verify("--quick");
    expect(report.problems).toMatchObject([{ point: ids[0], disk: "data", affects: ids }]);
    const said = await runTidemark(["verify", "--quick"], options());
    expect(said).toMatchObject({ code: 6, stdout: expect.stringContaining("it is missing") as string });
    expect(said.stderr).toContain("Damage was found");
  });

  it("agrees that a chain is right after points were deleted, made full and pruned", async () => {
    await cli("delete", "vm@p2");
    expect(await verify()).toMatchObject({ code: 0, report: { points: 3, ok: true } });
    await cli("flatten", "vm@p3");
    expect(await verify()).toMatchObject({ code: 0, report: { points: 3, ok: true } });
    await cli("prune", "vm", "--keep-last", "1");
    expect(await verify()).toMatchObject({ code: 0, report: { points: 1, ok: true } });
    expect(await runTidemark(["verify", "nobody"], options())).toMatchObject({ code: 4 });
    expect(await runTidemark(["verify", "--quick", "--percent", "5"], options())).toMatchObject({ code: 2 });
  });
});
