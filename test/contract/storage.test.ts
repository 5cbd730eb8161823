import { createHash, randomBytes } from "node:crypto";
import {
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  readlink,
  rm,
  stat,
  symlink,
  truncate,
  writeFile,
} from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import type { HeadLastSink } from "../../src/bytes/index.js";
import {
  isKey,
  LocalStorage,
  MemoryStorage,
  ObjectNotFoundError,
  ObjectReplacedError,
  ObjectTooLargeError,
  StorageError,
  type Storage,
} from "../../src/storage/index.js";

const MAX = { maxLength: 1 << 20 };

interface Subject {
  readonly storage: Storage;
  /** A second way in to the same objects, as another process has. */
  readonly other: Storage;
}

let directory: string;

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), "tidemark-storage-"));
});
afterEach(async () => {
  await rm(directory, { recursive: true, force: true });
});

const SUBJECTS: readonly (readonly [string, () => Promise<Subject>])[] = [
  [
    "LocalStorage",
    async () => ({ storage: await LocalStorage.open(directory), other: await LocalStorage.open(directory) }),
  ],
  [
    "LocalStorage that keeps no file open",
    async () => ({
      storage: await LocalStorage.open(directory, { openFiles: 0 }),
      other: await LocalStorage.open(directory),
    }),
  ],
  [
    "MemoryStorage",
    () => {
      const storage = new MemoryStorage();
      return Promise.resolve({ storage, other: storage });
    },
  ],
];

async function keysOf(storage: Storage, prefix = ""): Promise<string[]> {
  const keys: string[] = [];
  for await (const entry of storage.list(prefix)) keys.push(entry.key);
  return keys.sort();
}

async function foldersOf(storage: Storage, prefix: string): Promise<string[]> {
  const names: string[] = [];
  for await (const name of storage.listFolders(prefix)) names.push(name);
  return names.sort();
}

async function writeObject(storage: Storage, key: string, bytes: Buffer, headLength = 0): Promise<void> {
  const sink = await storage.create(key, { headLength });
  for (let at = headLength; at < bytes.length; at += 10_000)
    await sink.append(bytes.subarray(at, at + 10_000));
  await sink.commit(bytes.subarray(0, headLength));
}

describe.each(SUBJECTS)("%s", (_name, make) => {
  let storage: Storage;
  let other: Storage;
  beforeEach(async () => {
    ({ storage, other } = await make());
  });

  it("create() makes an object whose bytes are the head and then what was appended", async () => {
    const bytes = randomBytes(300_000);
    await writeObject(storage, "web/p1/sda.qcow2", bytes, 65_536);
    expect((await other.get("web/p1/sda.qcow2", MAX)).equals(bytes)).toBe(true);
  });

  it("create() shows nothing before the commit, nor after an abort", async () => {
    const sink = await storage.create("web/p1/sda.qcow2", { headLength: 4 });
    await sink.append(randomBytes(50_000));
    expect(await keysOf(other)).toEqual([]);
    await expect(other.open("web/p1/sda.qcow2")).rejects.toThrow(ObjectNotFoundError);
    await sink.abort();
    expect(await keysOf(other)).toEqual([]);
    await expect(sink.append(Buffer.from("x"))).rejects.toThrow(StorageError);
    await expect(sink.commit(Buffer.alloc(4))).rejects.toThrow(StorageError);
    expect(await keysOf(other)).toEqual([]);
  });

  it("create() leaves no folder behind when the writer aborts", async () => {
    const sink = await storage.create("vm/point/disk", { headLength: 4 });
    await sink.append(Buffer.from("body"));
    await sink.abort();
    expect(await foldersOf(other, "")).toEqual([]);
  });

  it("create() leaves the object that is there as it was when the writer aborts", async () => {
    await storage.put("a", Buffer.from("old"));
    const sink = await storage.create("a", { headLength: 3 });
    await sink.append(Buffer.from("er"));
    expect((await other.get("a", MAX)).toString()).toBe("old");
    await sink.abort();
    expect((await other.get("a", MAX)).toString()).toBe("old");
  });

  it("create() replaces the object that is there when it commits", async () => {
    await storage.put("a", Buffer.from("old"));
    await writeObject(storage, "a", Buffer.from("newer"), 3);
    expect((await other.get("a", MAX)).toString()).toBe("newer");
  });

  it("commit() refuses a head of another length, and the object stays unseen", async () => {
    const sink = await storage.create("a", { headLength: 4 });
    await expect(sink.commit(Buffer.alloc(3))).rejects.toThrow(RangeError);
    await sink.abort();
    expect(await keysOf(storage)).toEqual([]);
  });

  it("abort() after commit() changes nothing", async () => {
    const sink = await storage.create("a", { headLength: 1 });
    await sink.commit(Buffer.from("x"));
    await sink.abort();
    expect((await storage.get("a", MAX)).toString()).toBe("x");
  });

  it("an aborted signal ends a writer with its reason", async () => {
    const controller = new AbortController();
    const sink = await storage.create("a", { headLength: 0, signal: controller.signal });
    const reason = new Error("interrupted");
    controller.abort(reason);
    await expect(sink.append(Buffer.from("x"))).rejects.toBe(reason);
    await expect(sink.commit(Buffer.alloc(0))).rejects.toBe(reason);
    await sink.abort();
    const { signal } = controller;
    await expect(storage.create("b", { headLength: 0, signal })).rejects.toBe(reason);
    await expect(storage.put("b", Buffer.alloc(1), { signal })).rejects.toBe(reason);
    await expect(storage.get("b", { ...MAX, signal })).rejects.toBe(reason);
    await expect(storage.open("b", { signal })).rejects.toBe(reason);
    await expect(storage.delete("b", { signal })).rejects.toBe(reason);
    expect(await keysOf(storage)).toEqual([]);
  });

  it.each([
    ["all of it", 9_000_000],
    ["a part of it", 5_000_001],
    ["nothing but room for the head", 4096],
  ])("create() with a base begins with a copy of it: %s", async (_what, length) => {
    const base = randomBytes(9_000_000);
    await storage.put("web/base", base);
    const object = await storage.open("web/base");
    const sink = await storage.create("web/new", { headLength: 4096, base: { object, length } });
    const [head, tail] = [randomBytes(4096), randomBytes(70_000)];
    await sink.append(tail);
    await object.close();
    await sink.commit(head);
    const found = await other.get("web/new", { maxLength: 1 << 24 });
    expect(found.equals(Buffer.concat([head, base.subarray(4096, length), tail]))).toBe(true);
    expect((await other.get("web/base", { maxLength: 1 << 24 })).equals(base)).toBe(true);
  });

  it("create() takes the object that was opened as its base, or fails, when another has its name", async () => {
    await storage.put("base", Buffer.alloc(100_000, 1));
    const object = await storage.open("base");
    await other.put("base", Buffer.alloc(100_000, 2));
    const sink = await storage
      .create("new", { headLength: 4, base: { object, length: 100_000 } })
      .catch((error: unknown) => error);
    if (sink instanceof Error) expect(sink).toBeInstanceOf(ObjectReplacedError);
    else {
      await (sink as HeadLastSink).commit(Buffer.alloc(4, 1));
      expect((await other.get("new", MAX)).equals(Buffer.alloc(100_000, 1))).toBe(true);
    }
    await object.close();
  });

  it("create() with a base leaves nothing behind when it is aborted or refused", async () => {
    await storage.put("base", Buffer.alloc(1000, 1));
    const object = await storage.open("base");
    for (const length of [1001, 3, -1, Number.NaN]) {
      await expect(storage.create("new", { headLength: 4, base: { object, length } })).rejects.toThrow(
        RangeError,
      );
    }
    const sink = await storage.create("new", { headLength: 4, base: { object, length: 1000 } });
    await sink.abort();
    await object.close();
    expect(await keysOf(other)).toEqual(["base"]);
    expect(await storage.discardLeftovers("")).toBe(0);
  });

  it("put() with ifAbsent has one winner in 100 rounds of 16", async () => {
    for (let round = 0; round < 100; round += 1) {
      const key = `race/${round}`;
      const racers = Array.from({ length: 16 }, (_, racer) => (racer % 2 === 0 ? storage : other));
      const won = await Promise.all(
        racers.map((racer, index) => racer.put(key, Buffer.from(`racer ${index}`), { ifAbsent: true })),
      );
      expect(won.filter(Boolean)).toHaveLength(1);
      expect((await other.get(key, MAX)).toString()).toBe(`racer ${won.indexOf(true)}`);
    }
  });

  it("put() with ifAbsent leaves the object that is there", async () => {
    expect(await storage.put("a", Buffer.from("first"), { ifAbsent: true })).toBe(true);
    expect(await storage.put("a", Buffer.from("second"), { ifAbsent: true })).toBe(false);
    expect((await storage.get("a", MAX)).toString()).toBe("first");
    expect(await storage.put("a", Buffer.from("third"))).toBe(true);
    expect((await storage.get("a", MAX)).toString()).toBe("third");
  });

  it("put() never shows a part: readers see one writer's bytes whole", async () => {
    const versions = Array.from({ length: 8 }, (_, version) => Buffer.alloc(200_000, version));
    await storage.put("a", versions[0]!);
    let writing = true;
    const writer = (async () => {
      for (let round = 0; round < 40; round += 1) await storage.put("a", versions[round % 8]!);
      writing = false;
    })();
    let reads = 0;
    while (writing) {
      const bytes = await other.get("a", MAX);
      expect(bytes.equals(versions[bytes[0]!]!)).toBe(true);
      reads += 1;
    }
    await writer;
    expect(reads).toBeGreaterThan(0);
  });

  it("objects of no bytes are objects", async () => {
    await storage.put("a/empty", Buffer.alloc(0));
    await writeObject(storage, "a/created", Buffer.alloc(0));
    expect(await keysOf(other)).toEqual(["a/created", "a/empty"]);
    expect(await other.get("a/empty", { maxLength: 0 })).toHaveLength(0);
    const reader = await other.open("a/created");
    expect(reader.length).toBe(0);
    expect(await reader.read(0, 0)).toHaveLength(0);
    await reader.close();
  });

  it("open() reads any range, and refuses what lies past the end", async () => {
    const bytes = randomBytes(100_000);
    await writeObject(storage, "a", bytes, 512);
    const reader = await other.open("a");
    expect(reader.length).toBe(bytes.length);
    for (const [offset, length] of [
      [0, 100_000],
      [99_999, 1],
      [100_000, 0],
      [400, 300],
      [7, 50_001],
    ] as const) {
      expect((await reader.read(offset, length)).equals(bytes.subarray(offset, offset + length))).toBe(true);
    }
    for (const [offset, length] of [
      [99_999, 2],
      [100_001, 0],
      [-1, 1],
      [0, -1],
      [0.5, 1],
      [2 ** 60, 1],
    ] as const) {
      await expect(reader.read(offset, length)).rejects.toMatchObject({ code: "TM_STORAGE_RANGE" });
    }
    await reader.close();
    await reader.close();
    await expect(reader.read(0, 1)).rejects.toMatchObject({ code: "TM_STORAGE_CLOSED" });
  });

  it("a reader opened before a replacement reads the old bytes or fails, and never mixes", async () => {
    const old = Buffer.alloc(100_000, 1);
    await storage.put("a", old);
    const reader = await storage.open("a");
    const half = await reader.read(0, 50_000);
    await other.put("a", Buffer.alloc(100_000, 2));
    const rest = await reader.read(50_000, 50_000).catch((error: unknown) => error);
    if (rest instanceof Buffer) expect(Buffer.concat([half, rest]).equals(old)).toBe(true);
    else expect(rest).toBeInstanceOf(ObjectReplacedError);
    await reader.close();
    expect((await storage.get("a", MAX))[0]).toBe(2);
  });

  it("a reader opened before a deletion reads the old bytes or fails", async () => {
    await storage.put("a", Buffer.alloc(1000, 1));
    const reader = await storage.open("a");
    await other.delete("a");
    const bytes = await reader.read(0, 1000).catch((error: unknown) => error);
    if (bytes instanceof Buffer) expect(bytes.equals(Buffer.alloc(1000, 1))).toBe(true);
    else expect(bytes).toBeInstanceOf(ObjectReplacedError);
    await reader.close();
  });

  it("get() refuses an object longer than allowed", async () => {
    await storage.put("a", Buffer.alloc(1001));
    await expect(storage.get("a", { maxLength: 1000 })).rejects.toThrow(ObjectTooLargeError);
    expect(await storage.get("a", { maxLength: 1001 })).toHaveLength(1001);
  });

  it("what is not there is ObjectNotFoundError, naming the key", async () => {
    await storage.put("a/b", Buffer.from("x"));
    for (const key of ["c", "a", "a/c", "a/b/c", "c/d/e"]) {
      await expect(storage.get(key, MAX)).rejects.toThrow(ObjectNotFoundError);
      await expect(storage.open(key)).rejects.toThrow(`"${key}"`);
      await storage.delete(key);
    }
    expect(await keysOf(storage)).toEqual(["a/b"]);
  });

  it("list() shows every object below a prefix, with size and time", async () => {
    const begin = Date.now() - 2000;
    for (const key of ["a/1", "a/b/2", "a/b/c/3", "ab/4", "5"]) await storage.put(key, Buffer.from(key));
    expect(await keysOf(other)).toEqual(["5", "a/1", "a/b/2", "a/b/c/3", "ab/4"]);
    expect(await keysOf(other, "a/")).toEqual(["a/1", "a/b/2", "a/b/c/3"]);
    expect(await keysOf(other, "a/b/c/")).toEqual(["a/b/c/3"]);
    expect(await keysOf(other, "none/")).toEqual([]);
    for await (const entry of other.list("")) {
      expect(entry.size).toBe(entry.key.length);
      expect(entry.modified.getTime()).toBeGreaterThan(begin);
    }
  });

  it("listFolders() shows the folders right below a prefix", async () => {
    for (const key of ["a/1", "a/b/2", "a/c/d/3", "ab/4", "5"]) await storage.put(key, Buffer.from(key));
    expect(await foldersOf(other, "")).toEqual(["a", "ab"]);
    expect(await foldersOf(other, "a/")).toEqual(["b", "c"]);
    expect(await foldersOf(other, "none/")).toEqual([]);
  });

  it("delete() removes one object and only that", async () => {
    for (const key of ["a/1", "a/2", "b/1"]) await storage.put(key, Buffer.from(key));
    await storage.delete("a/1");
    await storage.delete("b/1");
    await storage.delete("b/1");
    expect(await keysOf(other)).toEqual(["a/2"]);
    await storage.put("b/1", Buffer.from("again"));
    expect(await keysOf(other)).toEqual(["a/2", "b/1"]);
  });

  it("writers and deleters of one folder do not hurt each other", async () => {
    await Promise.all(
      Array.from({ length: 8 }, async (_, worker) => {
        for (let round = 0; round < 30; round += 1) {
          await storage.put(`busy/folder/${worker}`, Buffer.from("x"));
          await other.delete(`busy/folder/${worker}`);
        }
      }),
    );
    expect(await keysOf(storage)).toEqual([]);
  });

  it("keys with odd characters are kept apart and come back as they were", async () => {
    const keys = [
      " ",
      "a b",
      "ü/ß",
      "%2e%2e/x",
      "..a/b..",
      "-rf",
      "a\\b",
      "日本/🌊",
      "a?b#c&d=e",
      `"'`,
      "~",
      "*",
    ];
    for (const key of keys) await storage.put(key, Buffer.from(key));
    expect(await keysOf(other)).toEqual([...keys].sort());
    for (const key of keys) expect((await other.get(key, MAX)).toString()).toBe(key);
  });

  it("hostile keys are refused and nothing is touched", async () => {
    const keys = [
      "",
      "/",
      "/etc/passwd",
      "..",
      "../x",
      "a/../../x",
      "a/..",
      "a/./b",
      "a//b",
      "a/",
      "a\0b",
      "a\nb",
      "\ud800",
      "x".repeat(256),
      "x/".repeat(600) + "x",
      ".tidemark-0123456789abcdef.partial",
    ];
    for (const key of keys) {
      expect(isKey(key)).toBe(false);
      await expect(storage.put(key, Buffer.from("x"))).rejects.toMatchObject({ code: "TM_STORAGE_KEY" });
      await expect(storage.create(key, { headLength: 0 })).rejects.toMatchObject({ code: "TM_STORAGE_KEY" });
      await expect(storage.get(key, MAX)).rejects.toMatchObject({ code: "TM_STORAGE_KEY" });
      await expect(storage.open(key)).rejects.toMatchObject({ code: "TM_STORAGE_KEY" });
      await expect(storage.delete(key)).rejects.toMatchObject({ code: "TM_STORAGE_KEY" });
    }
    for (const prefix of ["a", "../", "/", "a//", "a/../"]) {
      await expect(keysOf(storage, prefix)).rejects.toMatchObject({ code: "TM_STORAGE_KEY" });
      await expect(foldersOf(storage, prefix)).rejects.toMatchObject({ code: "TM_STORAGE_KEY" });
      await expect(storage.discardLeftovers(prefix)).rejects.toMatchObject({ code: "TM_STORAGE_KEY" });
    }
    expect(await keysOf(storage)).toEqual([]);
  });

  it("a writer that never commits leaves at most a leftover, which discardLeftovers() removes", async () => {
    await storage.put("a/kept", Buffer.from("x"));
    const sinks = [];
    for (const key of ["a/p1/x", "a/p2/x", "b/x"]) {
      const sink = await storage.create(key, { headLength: 8 });
      await sink.append(randomBytes(100));
      sinks.push(sink);
    }
    expect(await keysOf(other)).toEqual(["a/kept"]);
    await other.discardLeftovers("a/", { before: new Date(0) });
    await other.discardLeftovers("a/");
    expect(await other.discardLeftovers("a/")).toBe(0);
    expect(await keysOf(other)).toEqual(["a/kept"]);
    expect(await foldersOf(other, "a/")).toEqual([]);
    for (const sink of sinks) await sink.abort();
    expect(await keysOf(other)).toEqual(["a/kept"]);
  });
});

describe("LocalStorage on its file system", () => {
  it("open() wants the directory to exist, unless told to make it", async () => {
    const missing = join(directory, "x/y");
    await expect(LocalStorage.open(missing)).rejects.toMatchObject({ code: "TM_STORAGE_NOT_FOUND" });
    const storage = await LocalStorage.open(missing, { create: true });
    await storage.put("a", Buffer.from("x"));
    expect((await readFile(join(missing, "a"))).toString()).toBe("x");
    await writeFile(join(directory, "file"), "");
    await expect(LocalStorage.open(join(directory, "file"))).rejects.toThrow("not a directory");
  });

  it("symbolic links lead nowhere, neither as a folder nor as an object", async () => {
    const outside = await mkdtemp(join(tmpdir(), "tidemark-outside-"));
    try {
      await writeFile(join(outside, "secret"), "secret");
      await mkdir(join(directory, "root"));
      await symlink(outside, join(directory, "root/folder"));
      await symlink(join(outside, "secret"), join(directory, "root/object"));
      const storage = await LocalStorage.open(join(directory, "root"));
      for (const key of ["folder/secret", "object"]) {
        await expect(storage.get(key, MAX)).rejects.toMatchObject({ code: "TM_STORAGE_SYMLINK" });
        await expect(storage.open(key)).rejects.toMatchObject({ code: "TM_STORAGE_SYMLINK" });
      }
      await expect(storage.put("folder/new", Buffer.from("x"))).rejects.toMatchObject({
        code: "TM_STORAGE_SYMLINK",
      });
      await expect(storage.put("folder/deep/new", Buffer.from("x"))).rejects.toMatchObject({
        code: "TM_STORAGE_SYMLINK",
      });
      await expect(storage.delete("folder/secret")).rejects.toMatchObject({ code: "TM_STORAGE_SYMLINK" });
      expect(await keysOf(storage)).toEqual([]);
      expect(await foldersOf(storage, "")).toEqual([]);
      await storage.put("object", Buffer.from("ours"));
      expect(await readdir(outside)).toEqual(["secret"]);
      expect((await readFile(join(outside, "secret"))).toString()).toBe("secret");
      expect((await storage.get("object", MAX)).toString()).toBe("ours");
    } finally {
      await rm(outside, { recursive: true });
    }
  });

  it("the root may be reached through a symbolic link", async () => {
    await mkdir(join(directory, "real"));
    await symlink(join(directory, "real"), join(directory, "link"));
    const storage = await LocalStorage.open(join(directory, "link"));
    await storage.put("a/b", Buffer.from("x"));
    expect(storage.directory).toBe(join(directory, "real"));
    expect((await readFile(join(directory, "real/a/b"))).toString()).toBe("x");
  });

  it("a root that went away is no proof that an object is absent", async () => {
    const root = join(directory, "root");
    const storage = await LocalStorage.open(root, { create: true });
    await rm(root, { recursive: true });
    const gone = { code: "TM_STORAGE_GONE" };
    await expect(storage.get("a", MAX)).rejects.toMatchObject(gone);
    await expect(storage.open("a")).rejects.toMatchObject(gone);
    await expect(storage.put("a", Buffer.from("x"))).rejects.toMatchObject(gone);
    await expect(storage.delete("a")).rejects.toMatchObject(gone);
    await expect(keysOf(storage)).rejects.toMatchObject(gone);
    await expect(foldersOf(storage, "")).rejects.toMatchObject(gone);
  });

  it("a reader whose file was closed to make room notices that another took its name", async () => {
    const storage = await LocalStorage.open(directory, { openFiles: 1 });
    await storage.put("a", Buffer.from("old"));
    await storage.put("b", Buffer.from("bbb"));
    const a = await storage.open("a");
    const b = await storage.open("b");
    expect((await b.read(0, 3)).toString()).toBe("bbb");
    await storage.put("a", Buffer.from("new"));
    await expect(a.read(0, 3)).rejects.toThrow(ObjectReplacedError);
    await a.close();
    await b.close();
  });

  it("readers of 300 objects keep no more files open than allowed", async () => {
    const storage = await LocalStorage.open(directory, { openFiles: 8 });
    for (let index = 0; index < 300; index += 1) {
      await writeFile(join(directory, `${index}`), `object ${index}`);
    }
    const readers = await Promise.all(Array.from({ length: 300 }, (_, index) => storage.open(`${index}`)));
    expect(await filesOpenBelow(directory)).toBeLessThanOrEqual(8);
    for (const [index, reader] of readers.entries()) {
      expect((await reader.read(0, reader.length)).toString()).toBe(`object ${index}`);
      const open = await filesOpenBelow(directory);
      expect(open).toBeLessThanOrEqual(8);
    }
    await Promise.all(readers.map((reader) => reader.close()));
    expect(await filesOpenBelow(directory)).toBe(0);
  });

  it("a file cut short under its reader is an error, not fewer bytes", async () => {
    const storage = await LocalStorage.open(directory);
    await storage.put("a", Buffer.alloc(1000));
    const reader = await storage.open("a");
    await truncate(join(directory, "a"), 500);
    await expect(reader.read(0, 1000)).rejects.toThrow(ObjectReplacedError);
    await reader.close();
  });

  it("a writer's file stands beside its target, hidden from listings, and is not readable by strangers", async () => {
    const storage = await LocalStorage.open(directory);
    const sink = await storage.create("web/p1/sda.qcow2", { headLength: 0 });
    const [name] = await readdir(join(directory, "web/p1"));
    expect(name).toMatch(/^\.tidemark-[0-9a-f]{16}\.partial$/);
    const bytes = randomBytes(1000);
    await sink.append(bytes);
    await sink.commit(Buffer.alloc(0));
    expect(await readdir(join(directory, "web/p1"))).toEqual(["sda.qcow2"]);
    expect((await stat(join(directory, "web/p1/sda.qcow2"))).mode & 0o007).toBe(0);
    expect((await stat(join(directory, "web/p1"))).mode & 0o007).toBe(0);
    const stored = await readFile(join(directory, "web/p1/sda.qcow2"));
    expect(createHash("sha256").update(stored).digest("hex")).toBe(
      createHash("sha256").update(bytes).digest("hex"),
    );
  });

  it("a name that is no directory where one is needed is refused by name", async () => {
    const storage = await LocalStorage.open(directory);
    await writeFile(join(directory, "file"), "x");
    await expect(storage.put("file/a", Buffer.from("x"))).rejects.toThrow(`"${join(directory, "file/a")}"`);
    expect((await readFile(join(directory, "file"))).toString()).toBe("x");
  });
});

async function filesOpenBelow(root: string): Promise<number> {
  const links = await Promise.all(
    (await readdir("/proc/self/fd")).map((fd) => readlink(`/proc/self/fd/${fd}`).catch(() => "")),
  );
  return links.filter((link) => link.startsWith(`${root}/`)).length;
}
