import type { FileHandle } from "node:fs/promises";
import { describe, expect, it } from "vitest";
import { deferred } from "../flow/index.js";
import { OpenFiles } from "./open-files.js";

describe("OpenFiles.use()", () => {
  it("tells its caller alone that a file cannot be opened, also when that is known before room was made", async () => {
    const closed = deferred<undefined>();
    const slow = { close: () => closed.promise } as FileHandle;
    const files = new OpenFiles<{ readonly name: string }>(1, () => Promise.reject(new Error("replaced")));
    await files.adopt({ name: "a" }, slow);
    const unhandled: unknown[] = [];
    const note = (reason: unknown): void => void unhandled.push(reason);
    process.on("unhandledRejection", note);
    try {
      const using = files.use({ name: "b" }, () => Promise.resolve());
      // Node looks for rejections that nobody handles when it has nothing else to do.
      await new Promise((resolve) => setImmediate(resolve));
      closed.resolve(undefined);
      await expect(using).rejects.toThrow("replaced");
    } finally {
      process.off("unhandledRejection", note);
    }
    expect(unhandled).toEqual([]);
    expect(files.size).toBe(0);
  });
});
