import { spawn, type ChildProcessByStdio } from "node:child_process";
import { once } from "node:events";
import { mkdir, readdir, rename } from "node:fs/promises";
import { connect } from "node:net";
import { dirname } from "node:path";
import { createInterface } from "node:readline";
import type { Readable, Writable } from "node:stream";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import {
  chooseBases,
  ForeignServerError,
  recover,
  RunBusyError,
  type Catalogue,
  type CataloguePoint,
  type FrozenPoint,
} from "../../src/machine/index.js";
import { QmpBusyError } from "../../src/qmp/index.js";
import { parseBitmapName } from "../../src/point/index.js";
import { createImage } from "../support/image.js";
import { startMachine, type TestMachine } from "../support/qemu.js";
import { QmpProxy } from "../support/qmp-proxy.js";
import { temporaryDirectory, type TemporaryDirectory } from "../support/temporary.js";
import {
  CLUSTER,
  dirtyClusters,
  filesOfOurs,
  freezeRequest,
  NOTHING,
  openMachine,
  REPOSITORY,
  residueOf,
} from "../interop/machine-fixture.js";

const MiB = 1024 * 1024;
const noConnections = (): Promise<void> => Promise.resolve();

type Child = ChildProcessByStdio<Writable, Readable, null>;

/** Starts the run that is to be killed. */
function startRun(socket: string, runDirectory: string, points: readonly CataloguePoint[]): Child {
  const script = fileURLToPath(new URL("machine-child.ts", import.meta.url));
  return spawn(process.execPath, ["--import", "tsx", script, socket, runDirectory, JSON.stringify(points)], {
    stdio: ["pipe", "pipe", "inherit"],
  });
}

function startVm(directory: TemporaryDirectory, monitors = 3): Promise<TestMachine> {
  return Promise.all([
    createImage(directory.file("a.qcow2"), "qcow2", 8 * MiB),
    createImage(directory.file("b.raw"), "raw", 8 * MiB),
  ]).then(([a, b]) =>
    startMachine({
      disks: [
        { path: a, format: "qcow2" },
        { path: b, format: "raw" },
      ],
      guest: "none",
      monitors,
    }),
  );
}

/** What the repository would say of a committed point. */
function pointOf(frozen: FrozenPoint): CataloguePoint {
  return {
    id: parseBitmapName(frozen.disks[0]!.bitmap)!.checkpoint,
    machine: { uuid: null },
    disks: frozen.disks.map(({ disk, token, virtualSize }) => ({
      name: disk.name,
      token,
      virtualSize,
      clusterSize: CLUSTER,
    })),
  };
}

function catalogueOf(...points: CataloguePoint[]): Catalogue {
  return (id) => Promise.resolve(points.find((point) => point.id === id));
}

/** A first full backup that was committed. */
async function backUp(socket: string, runDirectory: string): Promise<CataloguePoint> {
  await using machine = await openMachine(socket, runDirectory);
  const frozen = await machine.freeze(freezeRequest(machine.disks));
  await frozen.release(noConnections);
  await frozen.keep();
  return pointOf(frozen);
}

describe("recover()", () => {
  const steps = [
    { command: "nbd-server-start", occurrence: 1, when: "before" },
    { command: "nbd-server-start", occurrence: 1, when: "after" },
    { command: "blockdev-create", occurrence: 1, when: "after" },
    { command: "blockdev-create", occurrence: 2, when: "after" },
    { command: "blockdev-add", occurrence: 1, when: "after" },
    { command: "blockdev-add", occurrence: 4, when: "after" },
    { command: "transaction", occurrence: 1, when: "before" },
    { command: "transaction", occurrence: 1, when: "after" },
    { command: "block-export-add", occurrence: 1, when: "after" },
    { command: "block-export-add", occurrence: 2, when: "after" },
    { command: "block-export-del", occurrence: 1, when: "after" },
    { command: "job-cancel", occurrence: 1, when: "after" },
    { command: "job-dismiss", occurrence: 5, when: "after" },
    { command: "blockdev-del", occurrence: 1, when: "after" },
    { command: "nbd-server-stop", occurrence: 1, when: "before" },
    { command: "nbd-server-stop", occurrence: 1, when: "after" },
    { command: "transaction", occurrence: 2, when: "before" },
  ] as const;

  it.each(steps)(
    "cleans up after a run killed $when $command ($occurrence), and the base is still true",
    async ({ command, occurrence, when }) => {
      await using directory = await temporaryDirectory();
      await using vm = await startVm(directory);
      const runDirectory = directory.file("run");
      const point = await backUp(vm.qmp, runDirectory);
      await vm.qemuIo(0, "write -P 1 1M 64k");
      await vm.qemuIo(1, "write -P 1 2M 64k");

      await using proxy = await QmpProxy.start(vm.qmp);
      const child = startRun(proxy.socket, runDirectory, [point]);
      const ended = once(child, "close");
      createInterface({ input: child.stdout }).on("line", (line) => {
        if (line === "frozen") child.stdin.write("end\n");
      });
      const hook = proxy.onCommand(
        command,
        async (passing) => {
          if (passing.occurrence !== occurrence) return undefined;
          child.kill("SIGKILL");
          await ended;
          return "disconnect";
        },
        when,
      );
      expect(await ended).toEqual([null, "SIGKILL"]);
      expect(hook.fired).toBe(occurrence);
      hook.remove();

      await using machine = await openMachine(vm.qmp, runDirectory);
      const checkpoints = { repositoryTag: REPOSITORY, catalogue: catalogueOf(point) };
      const listed = await recover(machine, { dryRun: true, checkpoints });
      expect(listed.runs).toHaveLength(1);
      await vm.qemuIo(0, "write -P 2 3M 64k");
      expect(await recover(machine, { checkpoints })).toEqual(listed);
      expect(await recover(machine, { checkpoints })).toEqual({ runs: [], bitmaps: [] });

      const residue = await residueOf(vm.monitor);
      expect({ ...residue, checkpoints: [] }).toEqual(NOTHING);
      expect(residue.checkpoints.filter((name) => name.includes(point.id))).toHaveLength(2);
      expect(await filesOfOurs(directory.path, vm.directory)).toEqual([`run/${machine.runId ?? ""}.json`]);

      // The next increment holds everything since the committed point, what the dead run froze included.
      const bases = await chooseBases(machine.disks, {
        ...checkpoints,
        clusterSize: CLUSTER,
        machineUuid: null,
      });
      const choices = [...bases.values()];
      expect(choices).toMatchObject([{ kind: "incremental" }, { kind: "incremental" }]);
      const request = freezeRequest(machine.disks, {
        bases: new Map(
          [...bases].flatMap(([disk, choice]) =>
            choice.kind === "incremental" ? [[disk.name, choice]] : [],
          ),
        ),
      });
      const frozen = await machine.freeze(request);
      expect([...(await dirtyClusters(frozen.disks[0]!))]).toEqual([16, 48]);
      expect([...(await dirtyClusters(frozen.disks[1]!))]).toEqual([32]);
      await frozen.release(noConnections);
      await frozen.keep();
      const committed = catalogueOf(point, pointOf(frozen));
      await machine.refresh();
      await recover(machine, { checkpoints: { ...checkpoints, catalogue: committed } });
      expect((await residueOf(vm.monitor)).checkpoints).toEqual(
        frozen.disks.map(({ bitmap }) => bitmap).sort(),
      );
    },
  );

  it("touches nothing of a run that lives, through a second monitor", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startVm(directory);
    const runDirectory = directory.file("run");
    await using first = await openMachine(vm.qmpSockets[0]!, runDirectory);
    const frozen = await first.freeze(freezeRequest(first.disks));
    await using second = await openMachine(vm.qmpSockets[1]!, runDirectory);
    await expect(recover(second)).rejects.toThrow(RunBusyError);
    await expect(second.freeze(freezeRequest(second.disks))).rejects.toThrow(/export|run/);
    await frozen.assertIntact();
    await frozen.release(noConnections);
    expect(await recover(second)).toEqual({ runs: [], bitmaps: [] });
  });

  it("refuses to judge a run that has no state file, unless told to", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startVm(directory);
    const child = startRun(vm.qmpSockets[0]!, directory.file("elsewhere"), []);
    const ended = once(child, "close");
    await once(child.stdout, "data");
    await using machine = await openMachine(vm.qmpSockets[1]!, directory.file("run"));
    await expect(recover(machine)).rejects.toThrow(/does not say whether it lives/);
    expect((await residueOf(vm.monitor)).jobs).toHaveLength(2);
    child.kill("SIGKILL");
    await ended;
    await recover(machine, { unknownRuns: "clean" });
    expect({ ...(await residueOf(vm.monitor)), checkpoints: [] }).toEqual(NOTHING);
  });

  it("cleans files up after QEMU and the run have both died", async () => {
    await using directory = await temporaryDirectory();
    const runDirectory = directory.file("run");
    let old: string;
    {
      await using vm = await startVm(directory);
      old = vm.qmp;
      const child = startRun(vm.qmp, runDirectory, []);
      const ended = once(child, "close");
      await once(child.stdout, "data");
      child.kill("SIGKILL");
      await ended;
      await vm.kill();
      expect((await readdir(directory.path)).filter((name) => name.startsWith("tm-"))).toHaveLength(2);
    }
    await using vm = await startVm(directory);
    // The machine comes back at the address that it had.
    await using proxy = await QmpProxy.start(vm.qmp);
    await mkdir(dirname(old), { recursive: true });
    await rename(proxy.socket, old);
    await using machine = await openMachine(old, runDirectory);
    await recover(machine);
    expect((await readdir(directory.path)).filter((name) => name.startsWith("tm-"))).toEqual([]);
    expect(await readdir(runDirectory)).toEqual([`${machine.runId ?? ""}.json`]);
  });

  it("leaves another program's NBD server alone, with and without exports", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startVm(directory);
    const path = directory.file("theirs.sock");
    await vm.monitor.execute("nbd-server-start", { addr: { type: "unix", data: { path } } });
    await using machine = await openMachine(vm.qmp, directory.file("run"));
    await recover(machine);
    await expect(machine.freeze(freezeRequest(machine.disks))).rejects.toThrow(ForeignServerError);
    expect(await residueOf(vm.monitor)).toEqual(NOTHING);
    await vm.monitor.execute("block-export-add", {
      ...{ type: "nbd", id: "theirs", "node-name": "node0", name: "theirs" },
    });
    await expect(recover(machine)).rejects.toThrow(ForeignServerError);
    await expect(machine.freeze(freezeRequest(machine.disks))).rejects.toThrow(ForeignServerError);
    expect(await filesOfOurs(dirname(vm.qmp))).toEqual([]);
    expect((await residueOf(vm.monitor)).exports).toEqual(["theirs"]);
  });
});

describe("openLiveMachine()", () => {
  it("says that the machine is taken while another run has it, and not after", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startVm(directory);
    const runDirectory = directory.file("run");
    const child = startRun(vm.qmp, runDirectory, []);
    const ended = once(child, "close");
    await once(child.stdout, "data");
    await expect(openMachine(vm.qmp, runDirectory)).rejects.toThrow(
      new RegExp(`process ${child.pid ?? 0} works on it`),
    );
    child.kill("SIGKILL");
    await ended;
    await using machine = await openMachine(vm.qmp, runDirectory);
    await recover(machine);
    expect({ ...(await residueOf(vm.monitor)), checkpoints: [] }).toEqual(NOTHING);
  });

  it("gives the machine to one of many that come at once, or to none, never to two", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startVm(directory);
    let holders = 0;
    let most = 0;
    const results = await Promise.allSettled(
      Array.from({ length: 8 }, async () => {
        await using machine = await openMachine(vm.qmp, directory.file("run"));
        holders += 1;
        most = Math.max(most, holders);
        await machine.refresh();
        holders -= 1;
      }),
    );
    expect(most).toBeLessThanOrEqual(1);
    for (const result of results) {
      if (result.status === "rejected") expect(result.reason).toBeInstanceOf(RunBusyError);
    }
    await using after = await openMachine(vm.qmp, directory.file("run"));
    expect(after.disks).toHaveLength(2);
  });

  it("says within five seconds that another program holds the monitor, and leaves no lock", async () => {
    await using directory = await temporaryDirectory();
    await using vm = await startVm(directory);
    const other = connect(vm.qmp);
    await once(other, "data");
    const started = performance.now();
    await expect(openMachine(vm.qmp, directory.file("run"))).rejects.toThrow(QmpBusyError);
    expect(performance.now() - started).toBeLessThan(6000);
    expect(await readdir(directory.file("run"))).toEqual([]);
    other.destroy();
  });
});
