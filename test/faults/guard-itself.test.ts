import { readdir } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { guardsOf, socketsOf, waitForGuards } from "../support/guards.js";
import { NOTHING, residueOf } from "../interop/machine-fixture.js";
import { startTidemark } from "../support/cli.js";
import { pointOf, Rig } from "../support/rig.js";
import { GuardedRig, isLong } from "./guard-fixture.js";

const MiB = 1024 * 1024;

/** Machines without iothreads forgive more: they are for the long version. */
const MACHINES = isLong ? [{ iothread: true }, { iothread: false }] : [{ iothread: true }];

describe.each(MACHINES)("a guard, iothread: $iothread", (kind) => {
  let guarded: GuardedRig;

  beforeAll(async () => {
    guarded = await GuardedRig.create(kind);
  }, 60_000);

  afterAll(async () => {
    await guarded[Symbol.asyncDispose]();
  });

  it("that is killed gets a successor, which protects as well, and the backup ends well", async () => {
    await using running = await guarded.startCopying();
    const [first] = await waitForGuards(guarded.rig, 1);
    const sockets = await socketsOf(first!);
    process.kill(first!, "SIGKILL");
    const second = await successorOf(first!);
    // All but the way to the guard that the first one relieved.
    expect(await socketsOf(second)).toBe(sockets - 1);
    const result = await running.ended;
    expect(result.code).toBe(0);
    await guarded.expectRight(pointOf(result.events()).id);
    await guarded.expectNothingLeft();
  });

  it("whose agent is killed after it took another one's place ends the run", async () => {
    await using running = await guarded.startCopying();
    const [first] = await waitForGuards(guarded.rig, 1);
    process.kill(first!, "SIGKILL");
    await successorOf(first!);
    running.kill("SIGKILL");
    await running.ended;
    await guarded.expectNothingLeft();
    await guarded.expectNextRight();
  });

  it("that dies again and again ends the backup with a clear error, the machine unhurt", async () => {
    await using running = await guarded.startCopying();
    let isOver = false;
    const ended = running.ended.finally(() => (isOver = true));
    const killed = new Set<number>();
    while (!isOver) {
      const living = (await guardsOf(guarded.rig)).filter((pid) => !killed.has(pid));
      for (const pid of living) {
        process.kill(pid, "SIGKILL");
        killed.add(pid);
      }
      await sleep(20);
    }
    const result = await ended;
    expect(result.code).toBe(1);
    expect(result.events().at(-1)).toMatchObject({ event: "error", code: "TM_GUARD" });
    await guarded.expectNothingLeft();
    await guarded.expectNextRight();
  });

  it("is not ended by what ends a session", async () => {
    await using running = await guarded.startCopying();
    const [guard] = await waitForGuards(guarded.rig, 1);
    for (const signal of ["SIGTERM", "SIGINT", "SIGHUP"]) process.kill(guard!, signal);
    running.kill("SIGKILL");
    await running.ended;
    await guarded.expectNothingLeft();
    await guarded.expectNextRight();
  });

  async function successorOf(pid: number): Promise<number> {
    const deadline = performance.now() + 15_000;
    for (;;) {
      const [guard] = (await guardsOf(guarded.rig)).filter((other) => other !== pid);
      if (guard !== undefined) return guard;
      if (performance.now() > deadline) throw new Error(`Guard ${pid} has no successor`);
      await sleep(5);
    }
  }
});

/** A guest that overwrites some 5 MiB a second, and needs 8 s for its round. */
const STEADY = { trailBlocks: 300, stepsPerTick: 2 };

describe.each(MACHINES)("a full scratch, iothread: $iothread", (kind) => {
  it("makes the guard end an agent that is stopped, before the guest's writes fail", async () => {
    await using guarded = await GuardedRig.create(kind, STEADY, 24 * MiB);
    // Zeroes take no room in a scratch file: there must be data to overwrite.
    for (const disk of ["vda", "vdb"]) await guarded.rig.machine.qemuIo(disk, "write -P 7 2M 17M");
    await using running = await guarded.startCopying(["--scratch-limit", "20MiB"]);
    const stopped = performance.now();
    running.kill("SIGSTOP");
    expect(await running.ended).toMatchObject({ signal: "SIGKILL" });
    // The guard gives the agent two more.
    expect(performance.now() - stopped).toBeGreaterThan(2000);
    expect(performance.now() - stopped).toBeLessThan(20_000);
    const { events } = guarded.rig.machine.monitor;
    expect(events.filter(({ event }) => event === "BLOCK_IO_ERROR")).toEqual([]);
    await guarded.expectNothingLeft();
    await guarded.expectNextRight();
  });
});

describe("a guard whose machine dies with the agent", () => {
  it.each(["the monitor's socket refuses", "something else answers there"])("goes, %s", async (how) => {
    const isAlone = how.endsWith("refuses");
    await using guarded = await GuardedRig.create({ iothread: true });
    const { rig } = guarded;
    // The proxy outlives the machine, and hangs up on whoever connects.
    const direct = isAlone ? ["--qmp", rig.machine.qmp] : [];
    await using running = await guarded.startCopying(direct);
    running.kill("SIGSTOP");
    await rig.machine.kill();
    running.kill("SIGKILL");
    await running.ended;
    await waitForGuards(rig, 0);
    const names = await readdir(rig.directory.path, { recursive: true });
    const left = names.filter((name) => /^tm-|^run\/.*\.json/.test(name));
    if (isAlone) expect(left).toEqual([]);
    // Nobody could say that the machine is gone: its state file says what is left, for the next run.
    else expect(left.filter((name) => name.endsWith(".json"))).toHaveLength(1);
  });
});

describe("a guard of many disks", () => {
  it("holds 12 disks with 4 workers each: more than 60 connections", async () => {
    await using rig = await Rig.create();
    const images = await Promise.all(
      Array.from({ length: 12 }, (_disk, index) => rig.image(`d${index}.qcow2`, "qcow2", 2 * MiB)),
    );
    await rig.start(
      images.map((path, index) => ({ path, format: "qcow2", id: `disk${index}`, iothread: index % 2 === 0 })),
      { guest: "none" },
    );
    for (const disk of images.keys()) await rig.machine.qemuIo(disk, "write -P 5 0 1M");
    const env = { TIDEMARK_RUNTIME_DIR: rig.directory.file("run") };
    const args = rig.backupArguments(["--workers", "4", "--bandwidth", "1MiB/s"]);
    await using running = startTidemark(args, { env });
    await running.nextEvent(({ event, done }) => event === "progress" && Number(done) > 0);
    const [guard] = await waitForGuards(rig, 1);
    expect(await socketsOf(guard!)).toBeGreaterThan(60);
    running.kill("SIGKILL");
    await running.ended;
    await waitForGuards(rig, 0);
    expect({ ...(await residueOf(rig.machine.monitor)), checkpoints: [] }).toEqual(NOTHING);
    await rig.backup(["--workers", "4"]);
  });
});
