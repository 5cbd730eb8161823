import { describe, expect, it } from "vitest";
import { interruptible } from "./interruptible.js";
import { MemoryStorage } from "./memory.js";

const reason = new Error("interrupted");
const never = <T>(): Promise<T> => new Promise(() => undefined);

/** A storage whose `get` never answers. */
function silent(): MemoryStorage {
  const storage = new MemoryStorage();
  storage.get = never;
  return storage;
}

const GET = { maxLength: 10 };

describe("interruptible()", () => {
  it("waits for an answer until it is interrupted, then a moment longer, and then asks nothing more", async () => {
    const interruption = new AbortController();
    const storage = interruptible(silent(), { signal: interruption.signal, patience: 30 });
    const getting = storage.get("a", GET).catch((error: unknown) => error);
    interruption.abort(reason);
    // What answers meanwhile is done: tidying up is asked for now.
    expect(await storage.put("b", Buffer.from("x"))).toBe(true);
    expect(await getting).toBe(reason);
    await expect(storage.put("c", Buffer.from("x"))).rejects.toBe(reason);
    await expect(storage.list("")[Symbol.asyncIterator]().next()).rejects.toBe(reason);
  });

  it("does not count the time in which nothing is asked, nor that before an answer", async () => {
    const storage = interruptible(new MemoryStorage(), { signal: AbortSignal.abort(reason), patience: 30 });
    for (let round = 0; round < 3; round += 1) {
      await new Promise((resolve) => setTimeout(resolve, 40));
      expect(await storage.put("b", Buffer.from("x"))).toBe(true);
    }
  });

  it("leaves within a second when told to hurry", async () => {
    const [interruption, hurry] = [new AbortController(), new AbortController()];
    const options = { signal: interruption.signal, hurry: hurry.signal, patience: 3_600_000 };
    const getting = interruptible(silent(), options).get("a", GET);
    interruption.abort(reason);
    hurry.abort();
    await expect(getting).rejects.toBe(reason);
  });

  it("ends a writer that comes too late, and its abort() never waits", async () => {
    const interruption = new AbortController();
    const hurry = AbortSignal.abort();
    const memory = new MemoryStorage();
    const sinks: string[] = [];
    let begin: () => void = () => undefined;
    memory.create = async () => {
      await new Promise<void>((resolve) => (begin = resolve));
      return { append: never, commit: never, abort: () => Promise.resolve(void sinks.push("aborted")) };
    };
    const creating = interruptible(memory, { signal: interruption.signal, hurry }).create("a", {
      headLength: 1,
    });
    interruption.abort(reason);
    await expect(creating).rejects.toBe(reason);
    begin();
    await new Promise(setImmediate);
    expect(sinks).toEqual(["aborted"]);
  });

  it("passes on what the storage throws, and lists what it lists", async () => {
    const { signal } = new AbortController();
    const memory = new MemoryStorage();
    const storage = interruptible(memory, { signal });
    await expect(storage.get("a", GET)).rejects.toMatchObject({ code: "TM_OBJECT_NOT_FOUND" });
    const sink = await storage.create("folder/object", { headLength: 1 });
    await sink.append(Buffer.from("bc"));
    await sink.commit(Buffer.from("a"));
    const keys: string[] = [];
    for await (const { key } of storage.list("")) keys.push(key);
    expect(keys).toEqual(["folder/object"]);
    const reader = await storage.open("folder/object");
    expect(String(await reader.read(0, reader.length))).toBe("abc");
    await reader.close();
  });

  it("hands the storage its own reader of what an object begins with, which it may share without reading it", async () => {
    const { signal } = new AbortController();
    const memory = new MemoryStorage();
    await memory.put("old", Buffer.from("abc"));
    const begun: unknown[] = [];
    const opened: unknown[] = [];
    const watched = new MemoryStorage();
    watched.open = async (...args) => {
      const reader = await memory.open(...args);
      opened.push(reader);
      return reader;
    };
    watched.create = async (key, options) => {
      begun.push(options.base?.object);
      return await memory.create(key, options);
    };
    const storage = interruptible(watched, { signal });
    const object = await storage.open("old");
    const sink = await storage.create("new", { headLength: 1, base: { object, length: 3 } });
    await sink.commit(Buffer.from("x"));
    expect(begun).toHaveLength(1);
    expect(begun[0]).toBe(opened[0]);
    expect(String(await memory.get("new", GET))).toBe("xbc");
  });
});
