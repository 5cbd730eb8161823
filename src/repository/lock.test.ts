import { once } from "node:events";
import { uptime } from "node:os";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { BusyError } from "../errors/index.js";
import { thisHost, thisProcess } from "../process/index.js";
import { MemoryStorage, StorageError } from "../storage/index.js";
import { FencedError, LockedError } from "./errors.js";
import { encodeHolder, readHolder, type Holder } from "./holder.js";
import { LOCK_TIMES } from "./lock-contest.js";
import { MachineLock } from "./lock.js";

const KEY = "web/lock";
const FAST = { heartbeat: 5, stale: 60, watch: 20 };
const OLD = "2026-11-20T06:00:00.000Z";

let storage: MemoryStorage;
const held: MachineLock[] = [];

beforeEach(() => {
  storage = new MemoryStorage();
});
afterEach(async () => {
  for (const lock of held.splice(0)) await lock.release();
});

async function acquire(times = LOCK_TIMES): Promise<MachineLock> {
  const lock = await MachineLock.acquire(storage, KEY, { times });
  held.push(lock);
  return lock;
}

/** Puts the lock of somebody else there. */
async function putHolder(changes: Partial<Holder>, key = KEY): Promise<Holder> {
  const holder: Holder = {
    ...(await thisProcess()),
    ...(await thisHost()),
    token: "ab".repeat(16),
    since: OLD,
    heartbeat: OLD,
    ...changes,
  };
  await storage.put(key, encodeHolder(holder));
  return holder;
}

async function keys(): Promise<string[]> {
  const found: string[] = [];
  for await (const { key } of storage.list("")) found.push(key);
  return found.sort();
}

const ELSEWHERE = { machineId: "f".repeat(32), bootId: "other", host: "other" };

describe("MachineLock.acquire()", () => {
  it.each([
    ["its answer was lost", "put"],
    ["it could not be read back", "get"],
  ] as const)(
    "that fails when %s leaves no lock: this process lives on, and would keep all others out",
    async (_, method) => {
      const working = storage[method].bind(storage) as (...args: never[]) => Promise<never>;
      storage[method] = async (...args: never[]) => {
        // From now on it works.
        storage[method] = working;
        if (method === "put") await working(...args);
        throw new StorageError("TM_STORAGE_IO", "Cannot say");
      };
      await expect(acquire()).rejects.toThrow("Cannot say");
      expect(await keys()).toEqual([]);
      await acquire();
    },
  );
});

describe("MachineLock", () => {
  it("is held by one at a time and says by whom and since when", async () => {
    const lock = await acquire();
    await lock.verify();
    await expect(acquire()).rejects.toThrow(LockedError);
    await expect(acquire()).rejects.toThrow(BusyError);
    await expect(acquire()).rejects.toThrow(new RegExp(`process ${process.pid} on host .* since 20`));
    await lock.release();
    expect(await keys()).toEqual([]);
    await (await acquire()).verify();
  });

  it("has one winner of 16 at once", async () => {
    const results = await Promise.allSettled(Array.from({ length: 16 }, () => acquire()));
    expect(results.filter((result) => result.status === "fulfilled")).toHaveLength(1);
    for (const result of results)
      if (result.status === "rejected") expect(result.reason).toBeInstanceOf(LockedError);
  });

  it("is taken over from a process that ended, by one of 16 at once, in 50 rounds", async () => {
    for (let round = 0; round < 50; round += 1) {
      await putHolder({ pid: 2 ** 22 + 1, heartbeat: new Date().toISOString() });
      const results = await Promise.allSettled(Array.from({ length: 16 }, () => acquire()));
      const won = results.flatMap((result) => (result.status === "fulfilled" ? [result.value] : []));
      expect(won).toHaveLength(1);
      await won[0]!.verify();
      expect(await keys()).toEqual([KEY]);
      await won[0]!.release();
    }
  });

  it("is taken over from a process whose number another one has now", async () => {
    await putHolder({ startTime: "1" });
    await (await acquire()).verify();
  });

  it("is taken over from before this host was started anew", async () => {
    const heartbeat = new Date(Date.now() - uptime() * 1000 - 1000).toISOString();
    await putHolder({ bootId: "before", heartbeat });
    await (await acquire()).verify();
  });

  it("is not taken over from a clone of this host, which was started at another time", async () => {
    await putHolder({ bootId: "another", heartbeat: new Date().toISOString() });
    await expect(acquire()).rejects.toThrow(LockedError);
  });

  it("is taken over from a holder of the future only once it was silent for as long as a stale one", async () => {
    await putHolder({ ...ELSEWHERE, heartbeat: "2999-01-01T00:00:00.000Z" });
    const started = performance.now();
    const times = { ...FAST, stale: 200 };
    await (await acquire(times)).verify();
    expect(performance.now() - started).toBeGreaterThanOrEqual(times.stale);
  });

  it("is not taken over from a living holder whose clock is far ahead", async () => {
    const holder = await putHolder({ ...ELSEWHERE, heartbeat: "2999-01-01T00:00:00.000Z" });
    const get = storage.get.bind(storage);
    let looks = 0;
    storage.get = async (...call) => {
      looks += 1;
      // Its heartbeat comes between the second and the third look of the watch.
      if (looks === 3) await putHolder({ ...holder, heartbeat: "2999-01-01T00:00:10.000Z" });
      return get(...call);
    };
    await expect(acquire(FAST)).rejects.toThrow(LockedError);
    expect(looks).toBe(3);
  });

  it("is not taken over from a living process, however old its heartbeat is", async () => {
    await putHolder({});
    await expect(acquire(FAST)).rejects.toThrow(LockedError);
    expect((await readHolder(storage, KEY))?.token).toBe("ab".repeat(16));
  });

  it("is not taken over from elsewhere while heartbeats are fresh", async () => {
    await putHolder({ ...ELSEWHERE, heartbeat: new Date().toISOString() });
    await expect(acquire()).rejects.toMatchObject({
      code: "TM_LOCKED",
      hint: expect.stringContaining(`"${KEY}"`) as string,
    });
  });

  it("is taken over from elsewhere after a heartbeat that is old and stays so", async () => {
    await putHolder(ELSEWHERE);
    await (await acquire(FAST)).verify();
    expect(await keys()).toEqual([KEY]);
  });

  it("is not taken over from elsewhere when only the holder's clock is wrong", async () => {
    await putHolder(ELSEWHERE);
    const get = storage.get.bind(storage);
    storage.get = async (...call) => {
      const found = await get(...call);
      // The holder gives a sign of life right after it was looked at.
      storage.get = get;
      await putHolder({ ...ELSEWHERE, heartbeat: "2026-11-20T06:00:10.000Z" });
      return found;
    };
    await expect(acquire(FAST)).rejects.toThrow(LockedError);
  });

  it("is taken over from a successor that died while it took over", async () => {
    const gone = await putHolder({ pid: 2 ** 22 + 1 });
    await putHolder({ pid: 2 ** 22 + 2, token: "cd".repeat(16) }, `${KEY}.${gone.token}`);
    const results = await Promise.allSettled(Array.from({ length: 8 }, () => acquire()));
    expect(results.filter((result) => result.status === "fulfilled")).toHaveLength(1);
    expect(await keys()).toEqual([KEY]);
  });

  it("is not taken over while a living successor takes it over", async () => {
    const gone = await putHolder({ pid: 2 ** 22 + 1 });
    await putHolder({ token: "cd".repeat(16) }, `${KEY}.${gone.token}`);
    await expect(acquire()).rejects.toThrow(LockedError);
  });

  it("ends waiting with the reason of an abort", async () => {
    await putHolder(ELSEWHERE);
    const controller = new AbortController();
    const times = { ...FAST, watch: 60_000 };
    const attempt = MachineLock.acquire(storage, KEY, { times, signal: controller.signal });
    const reason = new Error("interrupted");
    setImmediate(() => controller.abort(reason));
    await expect(attempt).rejects.toBe(reason);
  });

  it("verify() fails once another one holds it, and release() leaves it to that one", async () => {
    const lock = await acquire();
    await putHolder(ELSEWHERE);
    await expect(lock.verify()).rejects.toThrow(FencedError);
    await expect(lock.verify()).rejects.toMatchObject({ code: "TM_FENCED" });
    await lock.release();
    expect((await readHolder(storage, KEY))?.host).toBe("other");
  });

  it("verify() fails once nobody holds it", async () => {
    const lock = await acquire();
    await storage.delete(KEY);
    await expect(lock.verify()).rejects.toThrow("nobody holds it now");
  });

  it("verify() passes on what keeps it from knowing", async () => {
    const lock = await acquire();
    const failure = new Error("EIO");
    storage.get = () => Promise.reject(failure);
    await expect(lock.verify()).rejects.toBe(failure);
    storage.get = MemoryStorage.prototype.get.bind(storage);
  });

  it("gives signs of life, until it finds that another one holds it", async () => {
    const lock = await acquire(FAST);
    const first = await readHolder(storage, KEY);
    while ((await readHolder(storage, KEY))?.heartbeat === first?.heartbeat) await new Promise(setImmediate);
    expect((await readHolder(storage, KEY))?.token).toBe(lock.token);
    await putHolder(ELSEWHERE);
    if (!lock.lost.aborted) await once(lock.lost, "abort");
    expect(lock.lost.reason).toBeInstanceOf(FencedError);
    expect((await readHolder(storage, KEY))?.host).toBe("other");
    await expect(lock.verify()).rejects.toThrow(FencedError);
  });

  it.each(["", "{", "{}", '{"token": "../../x"}', "\0".repeat(300)])(
    "a lock that holds %j is taken over once it has not changed for long",
    async (content) => {
      await storage.put(KEY, Buffer.from(content));
      const started = performance.now();
      await (await acquire(FAST)).verify();
      expect(performance.now() - started).toBeGreaterThanOrEqual(FAST.stale);
      expect(await keys()).toEqual([KEY]);
    },
  );

  it("a damaged lock has one successor of 16 at once", async () => {
    await storage.put(KEY, Buffer.from("damaged"));
    const results = await Promise.allSettled(Array.from({ length: 16 }, () => acquire(FAST)));
    expect(results.filter((result) => result.status === "fulfilled")).toHaveLength(1);
    expect(await keys()).toEqual([KEY]);
  });

  it("is not taken over from a living holder under whom it was damaged: that one mends it", async () => {
    const lock = await acquire(FAST);
    await storage.put(KEY, Buffer.from("damaged"));
    await expect(lock.verify()).rejects.toMatchObject({ code: "TM_LOCK_UNREADABLE" });
    await expect(acquire({ ...FAST, stale: 1000 })).rejects.toThrow(LockedError);
    await lock.verify();
  });
});
