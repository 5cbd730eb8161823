import { readdir } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { MiB } from "../../src/bytes/index.js";
import { pause } from "../../src/flow/index.js";
import {
  CLUSTER,
  MACHINE,
  noise,
  pointsThatAreRight,
  pointTree,
  rawCopies,
} from "../interop/rewrite-fixture.js";
import { runTidemark, startTidemark, tidemark } from "../support/cli.js";
import { temporaryDirectory } from "../support/temporary.js";
import { run } from "../support/tools.js";

const ROUNDS = process.env["TIDEMARK_SOAK"] === undefined ? 4 : 80;
const RATE = ["--bandwidth", "16MiB/s"];
const LAST = ["prune", MACHINE, "--keep-last", "1"];

describe("a prune that is interrupted at any moment", () => {
  it("ends with 130, has lost nothing, and the next one ends what it began", async () => {
    await using directory = await temporaryDirectory();
    const tree = await pointTree(directory.file("repository"), 24 * MiB, [
      { data: noise(0, 16 * MiB) },
      { data: noise(3, 4 * MiB, 2) },
      // A branch: what both need is copied for each.
      { data: noise(50, 6 * MiB, 3) },
      { data: noise(9, MiB), parent: 1 },
      { data: noise(200, 4 * MiB), parent: 3 },
    ]);
    const copies = await rawCopies(tree, directory.path);
    const interrupted: number[] = [];
    for (let round = 0; round < ROUNDS; round += 1) {
      const root = directory.file(`round-${round}`);
      await run("cp", ["-a", directory.file("repository"), root]);
      const env = { TIDEMARK_REPO: root, TIDEMARK_RUNTIME_DIR: directory.path };
      await using running = startTidemark([...LAST, ...RATE, "--json"], { env });
      // Anywhere from its first byte on: the first round right there, since all else may come too late.
      await running.nextEvent(({ event }) => event === "progress");
      if (round > 0) await pause(Math.random() * 1500);
      running.kill(round % 3 === 0 ? "SIGTERM" : "SIGINT");
      const result = await running.ended;
      expect(result.stderr).toBe("");
      expect(result.events().at(-1)).toMatchObject(
        result.code === 0 ? { event: "result" } : { code: "TM_INTERRUPTED" },
      );
      if (result.code !== 0) {
        expect(result.code).toBe(130);
        interrupted.push(round);
        expect(await pointsThatAreRight(tree, root, copies)).toContain(4);
        const files = (await readdir(root, { recursive: true })).sort();
        const known = /^(tidemark\.json|web|web\/[^/]+(\/(point\.json|vda\.qcow2))?)$/;
        expect(files.filter((file) => !known.test(file))).toEqual([]);
      }
      await tidemark(LAST, { env });
      expect(await pointsThatAreRight(tree, root, copies)).toEqual([4]);
      expect(await runTidemark(["verify"], { env })).toMatchObject({ code: 0 });
      await run("rm", ["-r", root]);
    }
    expect(interrupted).toContain(0);
  }, 900_000);
});

describe("a flatten with --bandwidth", () => {
  it("shows how far it is, and takes the time that it must", async () => {
    await using directory = await temporaryDirectory();
    const tree = await pointTree(directory.file("repository"), 8 * MiB, [
      { data: noise(0, 4 * MiB) },
      { data: noise(3, 2 * MiB) },
    ]);
    const copies = await rawCopies(tree, directory.path);
    const env = { TIDEMARK_REPO: directory.file("repository"), TIDEMARK_RUNTIME_DIR: directory.path };
    await using running = startTidemark(["flatten", `${MACHINE}@latest`, "--bandwidth", "2MiB/s", "--json"], {
      env,
    });
    const first = await running.nextEvent(({ event }) => event === "progress");
    const started = performance.now();
    const result = await running.ended;
    // 4 MiB and more are moved; what is not yet paid for at the end is one piece.
    expect(performance.now() - started).toBeGreaterThan(900);
    expect(result.code).toBe(0);
    const progress = result.events().filter(({ event }) => event === "progress");
    expect(progress.length).toBeGreaterThan(2);
    expect(first).toMatchObject({ disk: MACHINE, done: 0 });
    const done = progress.map((event) => Number(event["done"]));
    expect(done).toEqual([...done].sort((a, b) => a - b));
    const last = progress.at(-1)!;
    expect(last["done"]).toBe(last["total"]);
    expect(last["total"]).toBeGreaterThan(4 * MiB - 3 * CLUSTER);
    expect(await pointsThatAreRight(tree, directory.file("repository"), copies)).toEqual([0, 1]);
  });
});
