import { expect } from "vitest";
import { readdir, rm } from "node:fs/promises";
import { dirname } from "node:path";
import { compareImages } from "../support/image.js";
import { startTidemark, type RunningTidemark } from "../support/cli.js";
import { waitForGuards } from "../support/guards.js";
import type { CounterOptions } from "../support/guest.js";
import type { ProxiedCommand } from "../support/qmp-proxy.js";
import { Rig } from "../support/rig.js";
import { filesOfOurs, NOTHING, residueOf } from "../interop/machine-fixture.js";

const MiB = 1024 * 1024;

/** The long version goes through everything, on both kinds of machine. */
export const isLong = process.env["TIDEMARK_SOAK"] !== undefined;

/** A guest that writes all over its first 4 MiB, on both disks in turn, some 300 times a second. */
const BUSY: CounterOptions = { trailOffset: MiB, trailStride: 64 * 1024, trailBlocks: 48, stepsPerTick: 16 };

/** A machine with a qcow2 and a raw disk whose guest never stops writing, and a first backup of it. */
export class GuardedRig implements AsyncDisposable {
  readonly rig: Rig;
  readonly images: Readonly<Record<string, string>>;
  readonly #boot: () => Promise<unknown>;

  private constructor(rig: Rig, images: Readonly<Record<string, string>>, boot: () => Promise<unknown>) {
    this.rig = rig;
    this.images = images;
    this.#boot = boot;
  }

  /** @param size of each disk, in bytes */
  static async create(
    options: { readonly iothread: boolean },
    guest: CounterOptions = BUSY,
    size = 6 * MiB,
  ): Promise<GuardedRig> {
    const rig = await Rig.create();
    try {
      const vda = await rig.image("a.qcow2", "qcow2", size);
      const vdb = await rig.image("b.raw", "raw", size - MiB);
      const disks = [
        { path: vda, format: "qcow2", id: "vda", ...options },
        { path: vdb, format: "raw", id: "vdb", ...options },
      ] as const;
      const boot = (): Promise<unknown> => rig.start(disks, { guest, deadline: 3_600_000 });
      await boot();
      await rig.backup();
      return new GuardedRig(rig, { vda, vdb }, boot);
    } catch (error) {
      await rig[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Starts the machine again; it has ended. */
  async boot(): Promise<void> {
    await this.#boot();
    await this.rig.machine.waitForGuestWriting();
  }

  /** Starts a backup. However long it takes, it is the test that ends it. */
  start(extra: readonly string[] = [], env: Readonly<Record<string, string>> = {}): RunningTidemark {
    const runtime = { TIDEMARK_RUNTIME_DIR: this.rig.directory.file("run") };
    return startTidemark(this.rig.backupArguments(extra), { env: { ...runtime, ...env }, deadline: 600_000 });
  }

  /** Starts a backup that takes long, and waits until it copies. */
  async startCopying(
    extra: readonly string[] = [],
    env: Readonly<Record<string, string>> = {},
  ): Promise<RunningTidemark> {
    await this.rig.machine.waitForGuestWriting(200);
    const running = this.start(["--bandwidth", "1MiB/s", ...extra], env);
    await running.nextEvent(({ event, done }) => event === "progress" && Number(done) > 0);
    return running;
  }

  /**
   * The machine runs and its guest writes, and soon nothing of a run is left: in QEMU, in files, or as a process.
   *
   * @param options.mayLeaveRecord a run that died before its guard was there leaves its state file
   */
  async expectNothingLeft(options: { readonly mayLeaveRecord?: boolean } = {}): Promise<void> {
    const { rig } = this;
    await waitForGuards(rig, 0);
    await rig.machine.waitForGuestWriting();
    expect({ ...(await residueOf(rig.machine.monitor)), checkpoints: [] }).toEqual(NOTHING);
    const files = await filesOfOurs(rig.directory.path, rig.machine.directory, dirname(rig.proxy.socket));
    const isRecord = (name: string): boolean => /^run\/tidemark\/[0-9a-f]{8}\.json$/.test(name);
    expect(
      files
        .filter((name) => !name.startsWith("repository/"))
        .filter((name) => options.mayLeaveRecord !== true || !isRecord(name)),
    ).toEqual([]);
  }

  /** The next plain backup goes on from the last one that was stored, and holds what the machine held. */
  async expectNextRight(options: { readonly restore?: boolean } = {}): Promise<void> {
    await this.rig.machine.waitForGuestWriting(60);
    const newest = await this.newestPoint();
    const point = await this.rig.backup();
    expect(point.parent).toBe(newest);
    expect(point.disks.map(({ kind }) => kind)).toEqual(["incremental", "incremental"]);
    await this.expectRight(point.id, options);
    await this.expectTidyRepository();
  }

  /** The repository holds points and nothing else: no lock, no claim to one, no unfinished image. */
  async expectTidyRepository(): Promise<void> {
    const home = `${this.rig.repository}/vm`;
    // Beside the points there may be an attempt at the lock, which stays for an hour: it may be another run's.
    const entries = await readdir(home, { withFileTypes: true });
    const names = entries
      .filter((entry) => entry.isDirectory() || !/^\.tidemark-\w+\.partial$/.test(entry.name))
      .map(({ name }) => name);
    const files = await Promise.all(names.map((name) => readdir(`${home}/${name}`)));
    expect(names.filter((_name, index) => files[index]?.includes("point.json") !== true)).toEqual([]);
  }

  /**
   * A point holds what the machine held at its freeze: as bare qemu-img reads the repository and, unless told
   * otherwise, as restored by us.
   */
  async expectRight(point: string, { restore = true }: { readonly restore?: boolean } = {}): Promise<void> {
    const { rig, images } = this;
    const restored = rig.directory.file(`restored-${point}`);
    const args = ["restore", `vm@${point}`, "--repo", rig.repository, "--to-dir", restored, "--quiet"];
    if (restore) await rig.tidemark(args);
    const freeze = rig.proxy.freezeOf(point);
    for (const [disk, image] of Object.entries(images)) {
      const reference = { path: rig.proxy.referenceOf(image, freeze), format: "raw" } as const;
      const ours = { path: `${restored}/${disk}.raw`, format: "raw" } as const;
      const bare = { path: `${rig.repository}/vm/${point}/${disk}.qcow2`, format: "qcow2" } as const;
      if (restore) expect(await compareImages(ours, reference)).toBe("identical");
      expect(await compareImages(bare, reference)).toBe("identical");
    }
    await rm(restored, { recursive: true, force: true });
  }

  /** The newest point that was committed: one whose manifest is there. */
  async newestPoint(): Promise<string | undefined> {
    const names = await readdir(`${this.rig.repository}/vm`, { recursive: true });
    return names
      .filter((name) => name.endsWith("/point.json"))
      .map((name) => dirname(name))
      .sort()
      .at(-1);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.rig[Symbol.asyncDispose]();
  }
}

/** Whether a command is the transaction that freezes. */
export function isFreeze(command: ProxiedCommand): boolean {
  return command.name === "transaction" && typesOf(command).includes("blockdev-backup");
}

/** Whether a command is one that removes bitmaps. */
export function isRemoval(command: ProxiedCommand): boolean {
  return command.name === "transaction" && typesOf(command).every((type) => type.endsWith("-remove"));
}

function typesOf({ arguments: { actions } }: ProxiedCommand): string[] {
  return (actions as { type: string }[]).map(({ type }) => type);
}
