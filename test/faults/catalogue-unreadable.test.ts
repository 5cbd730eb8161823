import { readFile, rename, rm, symlink, writeFile } from "node:fs/promises";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { NOTHING, residueOf } from "../interop/machine-fixture.js";
import { startTidemark, type CliResult } from "../support/cli.js";
import { pointOf, type PointView } from "../support/rig.js";
import { guardsOf } from "../support/guards.js";
import { Catalogued, expectIncrement } from "./catalogue-fixture.js";
import { isFreeze } from "./guard-fixture.js";

let catalogued: Catalogued;
let first: PointView;
/** The manifest of the point whose bitmap the machine carries. */
let manifest: string;
let before: Buffer;

beforeEach(async () => {
  catalogued = await Catalogued.begin();
  first = await catalogued.backup();
  manifest = `${catalogued.rig.repository}/vm/${first.id}/point.json`;
  before = await readFile(manifest);
  await catalogued.write();
});
afterEach(async () => {
  await catalogued[Symbol.asyncDispose]();
});

async function tryBackup(extra: readonly string[] = []): Promise<CliResult> {
  const { rig } = catalogued;
  return await rig.run(rig.backupArguments(extra));
}

/** What a failed backup says. */
function errorOf({ stdout }: CliResult): Record<string, unknown> {
  return JSON.parse(stdout.trim().split("\n").at(-1) ?? "") as Record<string, unknown>;
}

/** The base is what it was, and the next increment from it is right. */
async function expectUnharmed(): Promise<void> {
  expect(await catalogued.checkpoints()).toEqual([first.id]);
  expectIncrement(await catalogued.backup(), first);
  await catalogued.proveAll();
}

describe("backup with a catalogue that cannot be read", () => {
  it("because it cannot be opened: fails, and its bitmaps stay", async () => {
    await rm(manifest);
    // Opening a link fails, whoever tries: that is no absence.
    await symlink("nowhere", manifest);
    expect(errorOf(await tryBackup())).toMatchObject({
      event: "error",
      code: "TM_STORAGE_SYMLINK",
      exitCode: 1,
    });
    await rm(manifest);
    await writeFile(manifest, before);
    await expectUnharmed();
  });

  it("because a newer tidemark wrote it: fails, and its bitmaps stay", async () => {
    const newer = { ...(JSON.parse(before.toString()) as object), format: 99 };
    await writeFile(manifest, JSON.stringify(newer));
    expect(errorOf(await tryBackup())).toMatchObject({ code: "TM_FORMAT_NEWER", exitCode: 1 });
    await writeFile(manifest, before);
    await expectUnharmed();
  });

  it("because the repository is gone, or another one is in its place: fails or begins anew, bitmaps stay", async () => {
    const { repository } = catalogued.rig;
    const away = `${repository}-away`;
    await rename(repository, away);
    expect(errorOf(await tryBackup())).toMatchObject({ exitCode: 4 });
    await catalogued.rig.tidemark(["init", "--repo", repository]);
    const elsewhere = await catalogued.backup();
    expect(elsewhere.disks).toMatchObject([{ kind: "full" }]);
    expect(await catalogued.checkpoints()).toEqual([first.id, elsewhere.id]);
    await catalogued.proveAll([first]);
    await rename(repository, `${repository}-other`);
    await rename(away, repository);
    expectIncrement(await catalogued.backup(), first);
    await catalogued.proveAll([elsewhere]);
  });

  it("because it is damaged: begins a new chain, and says so; its bitmaps stay", async () => {
    await writeFile(manifest, before.subarray(0, before.length / 2));
    const result = await tryBackup();
    expect(result.code).toBe(0);
    const warnings = result.events().filter(({ event }) => event === "warning");
    expect(warnings.map(({ message }) => message)).toEqual([
      expect.stringMatching(`Point ${first.id} is passed over.*point.json`),
    ]);
    const anew = pointOf(result.events());
    catalogued.remember(anew, catalogued.rig.repository, catalogued.image);
    expect(anew.id > first.id).toBe(true);
    expect(anew.disks).toMatchObject([
      { kind: "full", reason: `the manifest of point ${first.id} is damaged` },
    ]);
    expect(await catalogued.checkpoints()).toEqual([first.id, anew.id]);
    const next = await catalogued.backup();
    expectIncrement(next, anew);
    expect(await catalogued.checkpoints()).toEqual([first.id, next.id]);
    await catalogued.proveAll([first]);
    await writeFile(manifest, before);
    await catalogued.proveAll();
  });

  it("does not keep a dead run's jobs in the machine", async () => {
    const { rig } = catalogued;
    await using running = startTidemark(rig.backupArguments(["--bandwidth", "1"]), {
      env: { TIDEMARK_RUNTIME_DIR: rig.directory.file("run") },
    });
    const hook = rig.proxy.onCommand(
      "transaction",
      async (command) => {
        if (!isFreeze(command)) return undefined;
        // Agent and guard at once, as a service manager may do it.
        for (const guard of await guardsOf(rig)) process.kill(guard, "SIGKILL");
        running.kill("SIGKILL");
        await running.ended;
        return undefined;
      },
      "after",
    );
    await running.ended;
    hook.remove();
    const { monitor } = rig.machine;
    expect((await residueOf(monitor)).jobs).toHaveLength(1);

    await rm(manifest);
    await symlink("nowhere", manifest);
    expect(errorOf(await tryBackup())).toMatchObject({ code: "TM_STORAGE_SYMLINK" });
    expect({ ...(await residueOf(monitor)), checkpoints: [] }).toEqual(NOTHING);
    expect(await catalogued.checkpoints()).toContain(first.id);
    await rm(manifest);
    await writeFile(manifest, before);
    expectIncrement(await catalogued.backup(), first);
    await catalogued.proveAll();
  });
});
