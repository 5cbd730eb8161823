import { mkdir, readdir } from "node:fs/promises";
import { dirname } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import type { StepName } from "../../src/flow/index.js";
import { filesOfOurs } from "../interop/machine-fixture.js";
import { startTidemark } from "../support/cli.js";
import { compareImages, qemuIo, toRaw } from "../support/image.js";
import { pointOf, Rig, type PointView } from "../support/rig.js";
import { atStep } from "../support/steps.js";
import { isLong } from "./guard-fixture.js";

const MiB = 1024 * 1024;

const STEPS: readonly StepName[] = isLong
  ? [
      ...(["machine locked", "machine opened", "repository locked", "cleaned", "planned"] as const),
      ...(["scratch planned", "scratch made", "server started", "scratch watched"] as const),
      ...(["before the freeze", "frozen", "exported", "connections open", "negotiated"] as const),
      ...(["reading", "all read", "exports deleted", "connections closed", "server stopped"] as const),
      ...(["jobs ended", "nodes deleted", "files deleted", "released", "images finished"] as const),
      ...(["before the manifest", "manifest written", "committed", "bitmaps removed"] as const),
      ...(["monitor left", "machine unlocked", "repository unlocked"] as const),
    ]
  : ["machine opened", "scratch made", "frozen", "reading", "jobs ended", "manifest written", "monitor left"];

describe("SIGKILL of a backup of a machine that is off", () => {
  let rig: Rig;
  let image: string;
  let pattern = 0;

  beforeAll(async () => {
    rig = await Rig.create();
    await mkdir(rig.directory.file("tmp"));
    image = await rig.image("a.qcow2", "qcow2", 8 * MiB);
    await qemuIo(image, "qcow2", ["write -P 1 0 6M"]);
    await rig.tidemark(backupArguments());
  }, 60_000);

  afterAll(async () => {
    await rig[Symbol.asyncDispose]();
  });

  function backupArguments(): string[] {
    return ["backup", "--machine", "vm", "--repo", rig.repository, "--json", "--image", `d=${image}`];
  }

  it.each(STEPS.map((name) => ({ name })))(
    "at $name: nothing is left, the next backup is incremental and right",
    async ({ name }) => {
      pattern += 1;
      await qemuIo(image, "qcow2", [`write -P ${pattern} 1M 3M`, `discard ${pattern % 4}M 64k`]);
      const held = await toRaw(image, "qcow2", rig.directory.file("held.raw"));
      const TMPDIR = rig.directory.file("tmp");
      const env = { TMPDIR, TIDEMARK_RUNTIME_DIR: rig.directory.file("run"), ...atStep(name) };
      await using running = startTidemark(backupArguments(), { env });
      expect(await running.ended).toMatchObject({ signal: "SIGKILL" });
      const newest = await newestPoint();

      const point = await nextBackup();
      expect(point.disks).toMatchObject([{ kind: "incremental", parent: newest }]);
      const bare = { path: `${rig.repository}/vm/${point.id}/d.qcow2`, format: "qcow2" } as const;
      expect(await compareImages(bare, { path: held, format: "raw" })).toBe("identical");
      const restored = { path: `${await rig.restore(point)}/d.raw`, format: "raw" } as const;
      expect(await compareImages(restored, { path: held, format: "raw" })).toBe("identical");
      const files = await filesOfOurs(rig.directory.path);
      expect(files.filter((file) => !file.startsWith("repository/"))).toEqual([]);
      expect(await readdir(rig.directory.file("run/tidemark"))).toEqual([]);
      expect(await readdir(TMPDIR)).toEqual([]);
    },
  );

  async function newestPoint(): Promise<string | undefined> {
    const names = await readdir(`${rig.repository}/vm`, { recursive: true });
    const manifests = names.filter((file) => file.endsWith("/point.json"));
    return manifests
      .map((file) => dirname(file))
      .sort()
      .at(-1);
  }

  /** The daemon of the one that was killed stores its bitmaps and ends by itself; until then the image is in use. */
  async function nextBackup(): Promise<PointView> {
    const deadline = performance.now() + 20_000;
    for (;;) {
      const result = await rig.run(backupArguments());
      if (result.code === 0) return pointOf(result.events());
      expect(result.code).toBe(5);
      if (performance.now() > deadline) throw new Error(`The image stays in use: ${result.stdout}`);
      await sleep(50);
    }
  }
});
