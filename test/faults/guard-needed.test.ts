import { spawn } from "node:child_process";
import { once } from "node:events";
import { chmod, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { backup } from "../../src/backup/index.js";
import { withDeadline } from "../../src/flow/index.js";
import { parseQmpAddress } from "../../src/qmp/index.js";
import { openRepository } from "../../src/repository/index.js";
import { LocalStorage } from "../../src/storage/index.js";
import { guardsOf } from "../support/guards.js";
import { GuardedRig } from "./guard-fixture.js";

describe("without a guard", () => {
  it("SIGKILL of a backup aborts a machine whose disks are in iothreads (QEMU 7.2)", async () => {
    await using guarded = await GuardedRig.create({ iothread: true });
    const { rig } = guarded;
    const script = fileURLToPath(new URL("guard-unguarded-child.ts", import.meta.url));
    const args = [rig.repository, rig.machine.qmp, rig.directory.file("run/tidemark")];
    const child = spawn(process.execPath, ["--import", "tsx", script, ...args], {
      stdio: ["ignore", "pipe", "inherit"],
    });
    const [line] = (await once(child.stdout, "data")) as [Buffer];
    expect(line.toString()).toContain("copying");
    expect(await guardsOf(rig)).toEqual([]);
    child.kill("SIGKILL");
    await once(child, "exit");
    const exit = await withDeadline(rig.machine.exited, 15_000, "Wait for the machine's end");
    expect({ ...exit, stderr: rig.machine.stderr }).toMatchObject({
      signal: "SIGABRT",
      stderr: expect.stringContaining("nbd_blockdev_client_closed") as unknown,
    });
  });
});

describe("a guard that cannot be started", () => {
  it("ends the backup before anything is made; with allowUnguarded it goes on, and says so", async () => {
    await using guarded = await GuardedRig.create({ iothread: true });
    const { rig } = guarded;
    const options = {
      repository: await openRepository(await LocalStorage.open(rig.repository)),
      machine: "vm",
      tidemarkVersion: "test",
    };
    const source = {
      kind: "live",
      address: parseQmpAddress(rig.proxy.socket),
      runDirectory: rig.directory.file("run/tidemark"),
    } as const;
    const node = process.execPath;
    // A program that ends at once, and none at all.
    const useless = rig.directory.file("useless");
    await writeFile(useless, "#!/bin/sh\necho out of order >&2\nexit 7\n");
    await chmod(useless, 0o755);
    const warnings: string[] = [];
    let point: { readonly id: string };
    try {
      for (const [program, says] of [
        [useless, "it ended (code 7): out of order"],
        ["/nonexistent/node", "ENOENT"],
      ] as const) {
        process.execPath = program;
        const refused = backup({ ...options, source });
        await expect(refused).rejects.toMatchObject({
          code: "TM_GUARD",
          message: expect.stringContaining(says) as unknown,
          hint: expect.stringContaining("--allow-unguarded") as unknown,
        });
        await guarded.expectNothingLeft();
      }
      point = await backup({
        ...options,
        source: { ...source, allowUnguarded: true },
        observer: { warning: (message) => warnings.push(message) },
      });
    } finally {
      process.execPath = node;
    }
    expect(warnings[0]).toContain("Nothing protects the machine");
    await guarded.expectRight(point.id);
    await guarded.expectNothingLeft();
    await guarded.expectNextRight();
  });
});
