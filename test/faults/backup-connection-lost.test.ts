import { afterAll, afterEach, beforeAll, describe, expect, it } from "vitest";
import { writeNoise } from "../support/image.js";
import { NbdCutter, type CutOptions } from "../support/nbd-cutter.js";
import { pointOf } from "../support/rig.js";
import { GuardedRig } from "./guard-fixture.js";

const MiB = 1024 * 1024;

let guarded: GuardedRig;
let cutter: NbdCutter | undefined;
const hooks: { remove(): void }[] = [];

/** Puts a cutter before the NBD server of the next backup, which is not in the way of its teardown. */
function cutNext(options: CutOptions): void {
  const { proxy } = guarded.rig;
  const take = async ({
    arguments: { addr },
  }: {
    arguments: Record<string, unknown>;
  }): Promise<undefined> => {
    cutter = await NbdCutter.takePlace((addr as { data: { path: string } }).data.path, options);
    return undefined;
  };
  const giveBack = async (): Promise<undefined> => {
    await cutter?.stepAside();
    return undefined;
  };
  hooks.push(
    proxy.onCommand("nbd-server-start", take, "after"),
    proxy.onCommand("block-export-del", giveBack),
  );
}

async function changeDisks(seed: number): Promise<void> {
  const noise = await writeNoise(guarded.rig.directory.file("noise"), 16 * MiB, seed);
  await guarded.rig.machine.qemuIo("vda", `write -s ${noise} 6M 16M`);
  await guarded.rig.machine.qemuIo("vdb", `write -P ${seed} 6M 8M`);
}

async function removeCutter(): Promise<void> {
  for (const hook of hooks.splice(0)) hook.remove();
  await cutter?.[Symbol.asyncDispose]();
  cutter = undefined;
}

describe("a backup whose NBD connections drop", () => {
  beforeAll(async () => {
    guarded = await GuardedRig.create({ iothread: false }, undefined, 24 * MiB);
  }, 60_000);

  afterEach(removeCutter);

  afterAll(async () => {
    await guarded[Symbol.asyncDispose]();
  });

  it("replaces them and reads again, in handshakes, maps and data alike: the point is right", async () => {
    await changeDisks(1);
    // Two maps of two disks; then two workers with two disks each; then what takes their places.
    const limits = [10, 100, 220, 240, 300_000, 300_000, 300_000, 300_000, 50, 250, 400_000];
    cutNext({ limitOf: (number) => limits[number] });
    const running = guarded.start(["--workers", "2"]);
    const result = await running.ended;
    expect(result).toMatchObject({ code: 0, stderr: "" });
    const cuts = [...(cutter?.cuts ?? [])].sort((a, b) => a - b);
    expect(cuts.slice(0, 4)).toEqual([0, 1, 2, 3]);
    // At least both workers' connections to the first disk, and one that had taken another one's place.
    expect(cuts.filter((number) => number >= 4 && number < 8).length).toBeGreaterThanOrEqual(2);
    expect(cuts.filter((number) => number >= 8).length).toBeGreaterThanOrEqual(1);
    const point = pointOf(result.events());
    expect(point.disks.map(({ kind }) => kind)).toEqual(["incremental", "incremental"]);
    await guarded.expectRight(point.id);
    await removeCutter();
    await guarded.expectNothingLeft();
    await guarded.expectNextRight();
  });

  it.each([
    ["in every handshake", 30],
    ["in the data", 200_000],
  ])(
    "again and again, %s: gives up with a clear error, and the next increment is right",
    async (_, limit) => {
      await changeDisks(2);
      cutNext({ limitOf: () => limit });
      const started = performance.now();
      const result = await guarded.start().ended;
      expect(performance.now() - started).toBeLessThan(30_000);
      expect(result.code).toBe(1);
      expect(result.events().at(-1)).toMatchObject({
        event: "error",
        code: "TM_NBD_LOST",
        message: expect.stringMatching(
          /^Cannot go on reading disk "vd[ab]": its connection to QEMU was lost/,
        ) as string,
        hint: expect.any(String) as string,
      });
      // The first connection, and those in its place: bounded, and not by chance.
      expect(cutter?.cuts.length).toBeGreaterThanOrEqual(5);
      await removeCutter();
      await guarded.expectNothingLeft();
      await guarded.expectNextRight();
    },
  );
});

describe("a connection that took another one's place", () => {
  beforeAll(async () => {
    guarded = await GuardedRig.create({ iothread: true }, undefined, 24 * MiB);
  }, 60_000);

  afterEach(removeCutter);

  afterAll(async () => {
    await guarded[Symbol.asyncDispose]();
  });

  it("is held by the guard as well: SIGKILL of the agent does not hurt a machine with iothreads", async () => {
    await changeDisks(3);
    // The cutter keeps the server's end of what it cut. What comes then leads straight to QEMU.
    cutNext({
      limitOf: (number) => (number >= 4 ? 300_000 : undefined),
      keepServerEnd: true,
      onCut: async () => cutter?.stepAside(),
    });
    await using running = guarded.start(["--workers", "1", "--bandwidth", "2MiB/s"]);
    await running.nextEvent(
      ({ event, disk, done }) => event === "progress" && disk === "vda" && Number(done) > 6 * MiB,
    );
    expect(cutter?.cuts.length).toBeGreaterThanOrEqual(1);
    expect(cutter?.connections).toBeLessThanOrEqual(6);
    running.kill("SIGKILL");
    expect(await running.ended).toMatchObject({ signal: "SIGKILL" });
    await guarded.expectNothingLeft();
    await removeCutter();
    await guarded.expectNextRight();
  });
});
