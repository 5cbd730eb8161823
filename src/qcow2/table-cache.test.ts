import { describe, expect, it } from "vitest";
import { TableCache } from "./table-cache.js";

describe("TableCache", () => {
  it("drops the table that was used longest ago when it exceeds its limit", () => {
    const cache = new TableCache(2048);
    const [a, b, c] = [Buffer.alloc(1024), Buffer.alloc(1024), Buffer.alloc(1024)];
    cache.set(1, a);
    cache.set(2, b);
    expect(cache.get(1)).toBe(a);
    cache.set(3, c);
    expect([cache.get(1), cache.get(2), cache.get(3)]).toEqual([a, undefined, c]);
  });

  it("keeps one table even if it alone exceeds the limit", () => {
    const cache = new TableCache(10);
    const table = Buffer.alloc(1024);
    cache.set(1, table);
    cache.set(1, table);
    expect(cache.get(1)).toBe(table);
    cache.set(2, table);
    expect([cache.get(1), cache.get(2)]).toEqual([undefined, table]);
  });
});
