import { readFile, writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, it } from "vitest";
import { withDeadline } from "../../src/flow/index.js";
import type { CliResult, RunningTidemark } from "../support/cli.js";
import { guardsOf, waitForGuards } from "../support/guards.js";
import { run } from "../support/tools.js";
import { atStep, atSteps } from "../support/steps.js";
import { GuardedRig, isFreeze, isLong } from "./guard-fixture.js";

/** Minutes are QEMU's to be silent, not ours to run. */
const LONG = 400_000;

describe("a guard, when the agent cannot take the frozen point down", () => {
  it("keeps the connections of exports that QEMU does not delete, and goes on until it does", async () => {
    await using guarded = await GuardedRig.create({ iothread: true });
    const { proxy } = guarded.rig;
    const refusal = proxy.onCommand("block-export-del", () => ({ error: "not now" }));
    await using running = guarded.start();
    const result = await running.ended;
    expect(result.code).toBe(1);
    expect(result.events().at(-1)).toMatchObject({ event: "error", code: "TM_TEARDOWN" });
    // The guard tries, too.
    const { fired } = refusal;
    await expect.poll(() => refusal.fired, { timeout: 15_000 }).toBeGreaterThan(fired);
    refusal.remove();
    await guarded.expectNothingLeft();
    await guarded.expectNextRight();
    await guarded.expectNothingLeft();
  });

  it("and the agent died before it had written down its guard: the next backup waits for it", async () => {
    await using guarded = await GuardedRig.create({ iothread: true });
    const { rig } = guarded;
    // The state file names the first guard then, which goes; the second one stops in the middle of its work.
    const env = atSteps([
      { name: "guard holds", nth: 2 },
      { name: "guard takes over", role: "guard", action: "stop" },
    ]);
    await using running = guarded.start([], env);
    expect(await running.ended).toMatchObject({ signal: "SIGKILL" });
    const guard = await stoppedGuard(guarded);
    try {
      const next = await rig.run(rig.backupArguments());
      expect(next.code).toBe(5);
      expect(next.events().at(-1)).toMatchObject({
        code: "TM_RUN_BUSY",
        message: expect.stringContaining(`process ${guard}, takes down what it left`) as unknown,
      });
    } finally {
      process.kill(guard, "SIGCONT");
    }
    await guarded.expectNothingLeft();
    await guarded.expectNextRight();
  });

  if (!isLong) return;

  it.each([{ iothread: true }, { iothread: false }])(
    "waits for a QEMU that is silent for minutes, iothread: $iothread",
    { timeout: LONG },
    async (kind) => {
      await using guarded = await GuardedRig.create(kind);
      const { pid } = guarded.rig.machine;
      await using running = guarded.start([], atStep("all read", { action: "stop-pid", pid }));
      const result = await endOf(running);
      expect(result.code).toBe(1);
      expect(result.events().at(-1)).toMatchObject({ event: "error", code: "TM_DEADLINE" });
      await waitForGuards(guarded.rig, 1);
      process.kill(pid, "SIGCONT");
      await guarded.expectNothingLeft();
      await guarded.expectNextRight();
      await guarded.expectNothingLeft();
    },
  );

  it("ends a freeze that QEMU carries out after the agent has given it up", { timeout: LONG }, async () => {
    await using guarded = await GuardedRig.create({ iothread: true });
    let goOn = (): void => undefined;
    const held = new Promise<undefined>((resolve) => (goOn = () => resolve(undefined)));
    const freeze = guarded.rig.proxy.onCommand("transaction", (command) =>
      isFreeze(command) ? held : undefined,
    );
    await using running = guarded.start();
    const result = await endOf(running);
    expect(freeze.fired).toBe(1);
    expect(result.code).toBe(1);
    freeze.remove();
    goOn();
    await guarded.expectNothingLeft();
    await guarded.expectNextRight();
    await guarded.expectNothingLeft();
  });

  it(
    "leaves an agent alone that has released the point, however full the disk becomes",
    { timeout: LONG },
    async () => {
      await using guarded = await GuardedRig.create({ iothread: true });
      const scratch = guarded.rig.directory.file("scratch");
      await run("mkdir", [scratch]);
      await run("mount", ["-t", "tmpfs", "-o", "size=32M", "none", scratch]);
      try {
        const env = atStep("images finished", { action: "stop" });
        await using running = guarded.start(["--scratch", scratch], env);
        await expect.poll(() => isStopped(running.pid), { timeout: 30_000 }).toBe(true);
        await writeFile(`${scratch}/filler`, Buffer.alloc(31 * 1024 * 1024));
        // Longer than the guard's patience with one that tears down.
        await sleep(25_000);
        running.kill("SIGCONT");
        expect(await running.ended).toMatchObject({ code: 0 });
      } finally {
        await run("umount", [scratch]);
      }
      await guarded.expectNothingLeft();
      await guarded.expectNextRight();
    },
  );
});

async function endOf(running: RunningTidemark): Promise<CliResult> {
  return await withDeadline(running.ended, LONG, "Wait for the agent's end");
}

/** The guard that stopped itself; the one that it relieves has gone, or soon will. */
async function stoppedGuard(guarded: GuardedRig): Promise<number> {
  let found: number | undefined;
  await expect
    .poll(
      async () => {
        for (const pid of await guardsOf(guarded.rig)) if (await isStopped(pid)) found = pid;
        return found;
      },
      { timeout: 15_000 },
    )
    .toBeDefined();
  return found!;
}

async function isStopped(pid: number): Promise<boolean> {
  const stat = await readFile(`/proc/${pid}/stat`, "utf8").catch(() => "");
  return stat.slice(stat.lastIndexOf(")") + 2).startsWith("T");
}
