import { cp, readdir } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { openRepository } from "../../src/repository/index.js";
import { flattenPoint } from "../../src/rewrite/index.js";
import { LocalStorage } from "../../src/storage/index.js";
import { verifyMachine } from "../../src/verify/index.js";
import { FaultyStorage } from "../support/faulty-storage.js";
import { temporaryDirectory } from "../support/temporary.js";

const FIXTURE = fileURLToPath(new URL("../../fixtures/format-1/repository", import.meta.url));
const machine = "web";

describe("flattenPoint() in a repository that refuses a new file", () => {
  it.each([
    ["hashes", 1],
    ["image", 2],
  ] as const)("leaves nothing unfinished behind when it is the %s", async (_what, nth) => {
    await using directory = await temporaryDirectory();
    const path = directory.file("repository");
    await cp(FIXTURE, path, { recursive: true });
    const storage = new FaultyStorage(await LocalStorage.open(path));
    const repository = await openRepository(storage);
    const before = (await readdir(path, { recursive: true })).sort();
    const point = (await repository.points(machine)).at(-1)!.id;
    const fault = storage.arm({ operation: "create", nth, how: "error" });
    await expect(flattenPoint({ repository, machine, point })).rejects.toThrow();
    expect(fault.fired).toBe(1);
    expect((await readdir(path, { recursive: true })).sort()).toEqual(before);
    await flattenPoint({ repository, machine, point });
    expect((await verifyMachine({ repository, machine, workers: 1 })).problems).toEqual([]);
  });
});
