import { describe, expect, it } from "vitest";
import { failure, saysAbsent, StorageError } from "./failure.js";

function systemError(code: string): Error {
  return Object.assign(new Error(`${code}: it failed, write`), { code, errno: -1, syscall: "write" });
}

describe("failure()", () => {
  it.each([
    ["ENOSPC", "TM_STORAGE_FULL", "no space is left"],
    ["EDQUOT", "TM_STORAGE_FULL", "quota"],
    ["EROFS", "TM_STORAGE_READ_ONLY", "read-only"],
    ["EACCES", "TM_STORAGE_DENIED", "denied"],
    ["ELOOP", "TM_STORAGE_SYMLINK", "symbolic link"],
  ])("names the path and says what to do about %s", (code, ours, reason) => {
    const cause = systemError(code);
    const error = failure('Cannot write "/backup/web/lock"', cause);
    expect(error).toBeInstanceOf(StorageError);
    expect(error).toMatchObject({ code: ours, cause });
    expect(error.message).toMatch(/^Cannot write "\/backup\/web\/lock": /);
    expect(error.message).toContain(reason);
    expect("hint" in error && error.hint).toMatch(/^[A-Z].{20,}[^.]$/);
  });

  it("keeps the system's own words where it knows no better ones", () => {
    const error = failure('Cannot read "/backup/x"', systemError("EIO"));
    expect(error).toMatchObject({
      code: "TM_STORAGE_IO",
      message: 'Cannot read "/backup/x": EIO: it failed, write',
    });
  });

  it("returns what is no system error as it is", () => {
    for (const error of [new Error("interrupted"), new StorageError("TM_STORAGE_IO", "x")]) {
      expect(failure("Cannot read", error)).toBe(error);
    }
  });
});

describe("saysAbsent()", () => {
  it("is true only of what proves absence", () => {
    expect(["ENOENT", "ENOTDIR"].map((code) => saysAbsent(systemError(code)))).toEqual([true, true]);
    for (const code of ["EIO", "EACCES", "ESTALE", "ENOTCONN", "EMFILE"])
      expect(saysAbsent(systemError(code))).toBe(false);
    expect(saysAbsent(Object.assign(new Error("x"), { code: "ENOENT" }))).toBe(false);
  });
});
