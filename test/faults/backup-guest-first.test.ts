import { describe, expect, it, vi } from "vitest";
import { backup } from "../../src/backup/index.js";
import { deferred } from "../../src/flow/index.js";
import { parseQmpAddress } from "../../src/qmp/index.js";
import { initRepository } from "../../src/repository/index.js";
import { MemoryStorage } from "../../src/storage/index.js";
import { NOTHING, residueOf } from "../interop/machine-fixture.js";
import { writeNoise } from "../support/image.js";
import { startMachine } from "../support/qemu.js";
import { temporaryDirectory } from "../support/temporary.js";

const MiB = 1024 * 1024;

/** A storage whose images stop taking bytes, as a network share does whose server went away. */
class StalledStorage extends MemoryStorage {
  /** Resolves when the first write hangs. */
  readonly stalled = deferred<undefined>();
  readonly #recovered = deferred<undefined>();

  /** Lets what hangs go on. */
  recover(): void {
    this.#recovered.resolve(undefined);
  }

  override async create(...args: Parameters<MemoryStorage["create"]>): ReturnType<MemoryStorage["create"]> {
    const sink = await super.create(...args);
    return {
      append: async (bytes) => {
        this.stalled.resolve(undefined);
        await this.#recovered.promise;
        await sink.append(bytes);
      },
      commit: (head) => sink.commit(head),
      abort: () => sink.abort(),
    };
  }
}

describe("backup()", () => {
  it("frees the guest when it is interrupted, although the repository takes no bytes any more", async () => {
    await using directory = await temporaryDirectory();
    const path = await writeNoise(directory.file("disk.raw"), 16 * MiB, 1);
    await using vm = await startMachine({ disks: [{ path, format: "raw" }] });
    const storage = new StalledStorage();
    const interruption = new AbortController();
    const running = backup({
      repository: await initRepository(storage),
      machine: "vm",
      source: { address: parseQmpAddress(vm.qmp), runDirectory: directory.file("run") },
      tidemarkVersion: "0.0.0",
      signal: interruption.signal,
    });
    running.catch(() => undefined);
    await storage.stalled.promise;
    expect((await residueOf(vm.monitor)).jobs).toHaveLength(1);

    const reason = new Error("interrupted");
    interruption.abort(reason);
    await vi.waitFor(
      async () => {
        const { nodes, jobs, exports } = await residueOf(vm.monitor);
        expect({ nodes, jobs, exports }).toEqual({ nodes: [], jobs: [], exports: [] });
      },
      { timeout: 10_000, interval: 100 },
    );

    storage.recover();
    await expect(running).rejects.toBe(reason);
    expect({ ...(await residueOf(vm.monitor)), checkpoints: [] }).toEqual(NOTHING);
  });
});
