import { describe, expect, it } from "vitest";
import { GuardedRig } from "./guard-fixture.js";

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
});
