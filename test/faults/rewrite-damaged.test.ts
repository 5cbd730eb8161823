import { createHash } from "node:crypto";
import { readdir, readFile, rm, writeFile } from "node:fs/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { MiB } from "../../src/bytes/index.js";
import {
  MACHINE,
  noise,
  pointsThatAreRight,
  pointTree,
  rawCopies,
  type PointTree,
} from "../interop/rewrite-fixture.js";
import { runTidemark, type CliResult } from "../support/cli.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";

let directory: TemporaryDirectory;
let root: string;
let tree: PointTree;
let copies: string[];
const idOf = (point: number): string => tree.points[point]!.id;

/** 0 <- 1 <- 2 <- 3, and 1 <- 4. */
beforeEach(async () => {
  directory = await temporaryDirectory();
  root = directory.file("repository");
  tree = await pointTree(root, 4 * MiB, [
    { data: noise(0, 2 * MiB) },
    { data: noise(3, MiB) },
    { data: noise(5, MiB) },
    { data: noise(9, MiB) },
    { data: noise(11, MiB), parent: 1 },
  ]);
  copies = await rawCopies(tree, directory.path);
});

afterEach(async () => {
  await directory[Symbol.asyncDispose]();
});

function cli(...args: readonly string[]): Promise<CliResult> {
  return runTidemark(args, { env: { TIDEMARK_REPO: root, TIDEMARK_RUNTIME_DIR: directory.path } });
}

/** Every image and manifest, with its digest. */
async function contentOf(root: string): Promise<Record<string, string>> {
  const found: Record<string, string> = {};
  for (const name of (await readdir(root, { recursive: true })).sort()) {
    if (!/(qcow2|point\.json)$/.test(name)) continue;
    found[name] = createHash("sha256")
      .update(await readFile(`${root}/${name}`))
      .digest("hex");
  }
  return found;
}

/** Runs the command that a hint gives. */
async function follow(hint: string, ...more: readonly string[]): Promise<CliResult> {
  const [, command = ""] = /tidemark (delete [^;]*);/.exec(hint) ?? [];
  return await cli(...command.split(" "), ...more);
}

describe("delete, flatten and prune that meet an image that is missing", () => {
  it("change nothing, and say what is lost and which command removes it", async () => {
    await rm(tree.path(2));
    const before = (await readdir(root, { recursive: true })).sort();
    const commands = [
      ["delete", `${MACHINE}@${idOf(2)}`],
      ["delete", `${MACHINE}@${idOf(1)}`],
      ["flatten", `${MACHINE}@${idOf(3)}`],
      ["prune", MACHINE, "--keep-last", "2"],
      ["prune", MACHINE, "--keep-last", "2", "--dry-run"],
    ];
    const says = new Set<string>();
    for (const args of commands) {
      const { code, stderr } = await cli(...args);
      expect({ args, code }).toEqual({ args, code: 6 });
      says.add(stderr.split("\n")[1]!.trim());
      expect((await readdir(root, { recursive: true })).sort()).toEqual(before);
    }
    const [hint = "", ...others] = says;
    expect(others).toEqual([]);
    expect(hint).toContain("the 2 points that are lost");
    expect(hint).toContain(`tidemark delete ${MACHINE}@${idOf(2)} --children`);
    expect((await follow(hint)).code).toBe(0);
    expect(await pointsThatAreRight(tree, root, copies)).toEqual([0, 1, 4]);
    expect((await cli("prune", MACHINE, "--keep-last", "1")).code).toBe(0);
    expect(await pointsThatAreRight(tree, root, copies)).toEqual([4]);
  });
});

describe("delete, flatten and prune that meet data that is damaged", () => {
  it("end before they give it new digests, and leave every point and file", async () => {
    // Whichever of them is the base, the other one's frames are copied.
    for (const point of [2, 3]) {
      const bytes = await readFile(tree.path(point));
      bytes[100_000]! ^= 1;
      await writeFile(tree.path(point), bytes);
    }
    const before = await contentOf(root);
    const commands = [
      ["delete", `${MACHINE}@${idOf(2)}`],
      ["flatten", `${MACHINE}@${idOf(3)}`],
      ["prune", MACHINE, "--keep-last", "2"],
    ];
    for (const args of commands) {
      const { code, stderr } = await cli(...args);
      expect({ args, code, stderr }).toMatchObject({
        args,
        code: 6,
        stderr: expect.stringContaining("damaged") as string,
      });
      expect(await contentOf(root)).toEqual(before);
    }
    expect((await cli("delete", `${MACHINE}@${idOf(2)}`, "--children")).code).toBe(0);
    expect(await pointsThatAreRight(tree, root, copies)).toEqual([0, 1, 4]);
  });
});

describe("delete that meets a manifest that is damaged", () => {
  it("says so; once its folder is gone, verify names what is lost, and that can be deleted", async () => {
    await writeFile(`${root}/${MACHINE}/${idOf(2)}/point.json`, "{");
    const refused = await cli("delete", `${MACHINE}@${idOf(1)}`);
    expect(refused.code).toBe(6);
    expect(refused.stderr).toContain(`remove its folder ${MACHINE}/${idOf(2)}`);
    await rm(`${root}/${MACHINE}/${idOf(2)}`, { recursive: true });
    const verified = await cli("verify", MACHINE, "--quick", "--json");
    expect(verified.code).toBe(6);
    const { problems } = verified.events().at(-1) as unknown as { problems: { affects: string[] }[] };
    expect(new Set(problems.flatMap(({ affects }) => affects))).toEqual(new Set([idOf(3)]));
    expect((await cli("delete", `${MACHINE}@${idOf(3)}`, "--children")).code).toBe(0);
    expect((await cli("delete", `${MACHINE}@${idOf(1)}`)).code).toBe(0);
    expect(await pointsThatAreRight(tree, root, copies)).toEqual([0, 4]);
  });
});
