import { readdir, readFile, writeFile } from "node:fs/promises";
import { uptime } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { filesOfOurs, NOTHING, residueOf } from "../interop/machine-fixture.js";
import { startTidemark, type CliResult, type RunningTidemark } from "../support/cli.js";
import { waitForGuards } from "../support/guards.js";
import { QmpProxy } from "../support/qmp-proxy.js";
import { pointOf, type PointView } from "../support/rig.js";
import { atStep } from "../support/steps.js";
import { Catalogued, expectIncrement } from "./catalogue-fixture.js";

/** A backup that is suspended at a step of its commit, and another way to its machine. */
class Suspended implements AsyncDisposable {
  readonly catalogued: Catalogued;
  readonly running: RunningTidemark;
  /** A proxy in front of the machine's second monitor. */
  readonly other: QmpProxy;
  readonly first: PointView;

  private constructor(catalogued: Catalogued, running: RunningTidemark, other: QmpProxy, first: PointView) {
    this.catalogued = catalogued;
    this.running = running;
    this.other = other;
    this.first = first;
  }

  static async at(step: "images finished" | "before the manifest" | "manifest written"): Promise<Suspended> {
    const catalogued = await Catalogued.begin();
    const { rig } = catalogued;
    const first = await catalogued.backup();
    const second = rig.machine.qmpSockets[1] ?? "";
    const other = await QmpProxy.start(second, { directory: rig.directory.file("other-references") });
    await catalogued.write();
    const running = startTidemark(rig.backupArguments(), {
      env: {
        TIDEMARK_RUNTIME_DIR: rig.directory.file("run"),
        ...atStep(step, { action: "stop" }),
      },
    });
    await waitUntilStopped(running.pid);
    return new Suspended(catalogued, running, other, first);
  }

  /** Runs a backup as from another host: with a run directory of its own, and through the second monitor. */
  async backUpFromElsewhere(): Promise<CliResult> {
    const { rig } = this.catalogued;
    return await rig.run(
      ["backup", "--machine", "vm", "--repo", rig.repository, "--json", ...this.#monitor()],
      {
        env: { TIDEMARK_RUNTIME_DIR: rig.directory.file("elsewhere") },
      },
    );
  }

  startFromElsewhere(): RunningTidemark {
    const { rig } = this.catalogued;
    return startTidemark(
      ["backup", "--machine", "vm", "--repo", rig.repository, "--json", ...this.#monitor()],
      { env: { TIDEMARK_RUNTIME_DIR: rig.directory.file("elsewhere") } },
    );
  }

  /** Remembers a point that came from elsewhere. */
  remember(point: PointView): void {
    const reference = this.other.referenceOf(this.catalogued.image, this.other.freezeOf(point.id));
    this.catalogued.rememberReference(point, reference);
  }

  /** Changes what the lock says of its holder, so that it can be judged from here as a holder elsewhere would be. */
  async disguise(changes: Readonly<Record<string, string>>): Promise<void> {
    const lock = `${this.catalogued.rig.repository}/vm/lock`;
    const holder = JSON.parse(await readFile(lock, "utf8")) as Record<string, unknown>;
    await writeFile(lock, JSON.stringify({ ...holder, ...changes }));
  }

  /** Lets the backup go on, to its end. */
  async wake(): Promise<CliResult> {
    this.running.kill("SIGCONT");
    return await this.running.ended;
  }

  /** Nothing of any run is left: in QEMU, in files, or as a process. */
  async expectNothingLeft(): Promise<void> {
    const { rig } = this.catalogued;
    await waitForGuards(rig, 0);
    expect({ ...(await residueOf(rig.machine.monitor)), checkpoints: [] }).toEqual(NOTHING);
    const files = await filesOfOurs(rig.directory.path, rig.machine.directory);
    expect(files.filter((name) => !/^(repository|other-references)\//.test(name))).toEqual([]);
    expect((await readdir(`${rig.repository}/vm`)).filter((name) => name.startsWith("lock"))).toEqual([]);
  }

  /** Ids of the points that are committed, oldest first. */
  async points(): Promise<string[]> {
    const { rig } = this.catalogued;
    const list = await rig.tidemark(["list", "vm", "--repo", rig.repository, "--json"]);
    return (list.json() as PointView[]).map(({ id }) => id);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.running[Symbol.asyncDispose]();
    await this.other[Symbol.asyncDispose]();
    await this.catalogued[Symbol.asyncDispose]();
  }

  #monitor(): string[] {
    return ["--qmp", this.other.socket];
  }
}

/** The kernel tells only a parent in C about a child that is stopped. */
async function waitUntilStopped(pid: number): Promise<void> {
  const deadline = performance.now() + 30_000;
  for (;;) {
    const stat = await readFile(`/proc/${pid}/stat`, "utf8");
    if (stat.slice(stat.lastIndexOf(")") + 2).startsWith("T")) return;
    if (performance.now() > deadline) throw new Error(`Process ${pid} was not stopped`);
    await sleep(5);
  }
}

/** A holder of before this host's last start. */
function beforeBoot(): Record<string, string> {
  const heartbeat = new Date(Date.now() - uptime() * 1000 - 60_000).toISOString();
  return { bootId: "00000000-0000-4000-8000-000000000000", heartbeat };
}

const OLD = { machineId: "f".repeat(32), host: "elsewhere", heartbeat: "2020-01-01T00:00:00.000Z" };

function expectFenced({ code, stdout }: CliResult): void {
  const last = JSON.parse(stdout.trim().split("\n").at(-1) ?? "") as unknown;
  expect(last).toMatchObject({ event: "error", code: "TM_FENCED", exitCode: 5 });
  expect(code).toBe(5);
}

describe("a backup that was suspended and lost its lock", () => {
  it.each([
    { step: "images finished", how: "a heartbeat that is old and stays so", disguise: OLD },
    { step: "before the manifest", how: "another boot", disguise: beforeBoot() },
  ] as const)(
    "at step $step, by $how: commits nothing, whatever the other run committed meanwhile",
    async ({ step, disguise }) => {
      await using suspended = await Suspended.at(step);
      const { catalogued, first } = suspended;
      // While it is known to live, nobody takes it away.
      expect(await suspended.backUpFromElsewhere()).toMatchObject({ code: 5 });

      await suspended.disguise(disguise);
      await catalogued.write();
      const taken = pointOf((await suspended.backUpFromElsewhere()).events());
      suspended.remember(taken);
      expectIncrement(taken, first);
      expectFenced(await suspended.wake());

      await suspended.expectNothingLeft();
      expect(await suspended.points()).toEqual([first.id, taken.id]);
      const next = await catalogued.backup();
      expectIncrement(next, taken);
      expect(await catalogued.checkpoints()).toEqual([next.id]);
      await catalogued.proveAll();
    },
  );

  it("when its point is there, and the other run has gone on from it: leaves the point, and says so by its end", async () => {
    await using suspended = await Suspended.at("manifest written");
    const { catalogued, first } = suspended;
    await suspended.disguise(beforeBoot());
    await catalogued.write();
    const taken = pointOf((await suspended.backUpFromElsewhere()).events());
    suspended.remember(taken);
    const [own] = (await suspended.points()).filter((id) => id !== first.id && id !== taken.id);
    expect(taken.disks).toMatchObject([{ kind: "incremental", reason: null, parent: own }]);
    expectFenced(await suspended.wake());

    await suspended.expectNothingLeft();
    expect(await suspended.points()).toEqual([first.id, own, taken.id]);
    const next = await catalogued.backup();
    expectIncrement(next, taken);
    await catalogued.proveAll();
  });

  it("when its point is there, and the other run is about to go on from it: one of the two ends it, no point is wrong", async () => {
    await using suspended = await Suspended.at("manifest written");
    const { catalogued, first } = suspended;
    await suspended.disguise(beforeBoot());
    await catalogued.write();
    const other = suspended.startFromElsewhere();
    const hook = suspended.other.onCommand(
      "job-cancel",
      async () => {
        expectFenced(await suspended.wake());
        return undefined;
      },
      "after",
    );
    const ended = await other.ended;
    expect(hook.fired).toBe(1);
    expect(ended.code).not.toBe(0);
    await suspended.expectNothingLeft();
    expect(await suspended.points()).toEqual([first.id]);

    const next = await catalogued.backup();
    expect(await suspended.points()).toEqual([first.id, next.id]);
    const last = await catalogued.backup();
    expectIncrement(last, next);
    await catalogued.proveAll();
  });
});
