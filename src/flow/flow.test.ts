import { describe, expect, it } from "vitest";
import { Budget, DeadlineError, deferred, RateLimit, unlessAborted, withDeadline } from "./index.js";

describe("Budget", () => {
  it("take() lets no more in flight than the limit, first come, first served", async () => {
    const budget = new Budget(10);
    const admitted: string[] = [];
    const take = async (name: string, amount: number): Promise<void> => {
      await budget.take(amount);
      admitted.push(name);
    };
    const all = [take("a", 6), take("b", 6), take("c", 1)];
    await Promise.resolve();
    await all[0];
    expect(admitted).toEqual(["a"]);
    budget.give(6);
    await Promise.all(all);
    expect(admitted).toEqual(["a", "b", "c"]);
    expect(budget.peak).toBe(7);
  });

  it("take() admits alone what is larger than the limit", async () => {
    const budget = new Budget(10);
    await budget.take(50);
    expect(budget.used).toBe(50);
    const next = budget.take(1);
    budget.give(50);
    await next;
    expect(budget.used).toBe(1);
  });

  it("take() rejects with the reason on abort and lets those behind it pass", async () => {
    const budget = new Budget(10);
    await budget.take(8);
    const controller = new AbortController();
    const large = budget.take(9, { signal: controller.signal });
    const small = budget.take(2);
    const reason = new Error("enough");
    controller.abort(reason);
    await expect(large).rejects.toBe(reason);
    await small;
    expect(budget.used).toBe(10);
  });
});

describe("withDeadline()", () => {
  it("passes the value on when it comes in time", async () => {
    await expect(withDeadline(Promise.resolve(7), 1000, "Wait")).resolves.toBe(7);
  });

  it("names the action when time is over", async () => {
    const error = withDeadline(deferred<undefined>().promise, 10, "Connect to x");
    await expect(error).rejects.toThrow(DeadlineError);
    await expect(error).rejects.toThrow("Connect to x: no answer within 0.01 s");
  });

  it("rethrows the reason of an abort", async () => {
    const controller = new AbortController();
    const waiting = withDeadline(deferred<undefined>().promise, 10_000, "Wait", {
      signal: controller.signal,
    });
    controller.abort(new Error("stop"));
    await expect(waiting).rejects.toThrow("stop");
  });
});

describe("RateLimit", () => {
  it("pass() holds a flow to its rate", async () => {
    const rate = new RateLimit(1_000_000, 0);
    const start = performance.now();
    for (let count = 0; count < 5; count += 1) await rate.pass(50_000);
    await rate.pass(0);
    const seconds = (performance.now() - start) / 1000;
    expect(seconds).toBeGreaterThan(0.24);
    expect(seconds).toBeLessThan(2);
  });

  it("pass() never waits without a limit", async () => {
    const rate = new RateLimit(Infinity);
    await rate.pass(1e15);
    await rate.pass(1e15);
  });
});

describe("unlessAborted()", () => {
  it("ends with the promise, or with the signal's reason if that comes first", async () => {
    const controller = new AbortController();
    expect(await unlessAborted(Promise.resolve(7), controller.signal)).toBe(7);
    const waiting = unlessAborted(new Promise(() => undefined), controller.signal);
    const reason = new Error("enough");
    controller.abort(reason);
    await expect(waiting).rejects.toBe(reason);
    await expect(unlessAborted(new Promise(() => undefined), controller.signal)).rejects.toBe(reason);
  });
});
