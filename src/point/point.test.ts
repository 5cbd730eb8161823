import { describe, expect, it } from "vitest";
import { UsageError } from "../errors/index.js";
import {
  formatBitmapName,
  formatRunObject,
  isName,
  isPointId,
  newPointId,
  parseBitmapName,
  parseRunObject,
  pointTime,
  requireName,
} from "./index.js";

describe("point id", () => {
  it("newPointId() carries the time to the millisecond and sorts as text", () => {
    const early = newPointId(new Date("2026-11-20T06:50:09.123Z"));
    const late = newPointId(new Date("2026-11-20T06:50:09.124Z"));
    expect(early).toMatch(/^20261120T065009123Z-[0-9a-f]{6}$/);
    expect(isPointId(early)).toBe(true);
    expect(early < late).toBe(true);
    expect(pointTime(early).toISOString()).toBe("2026-11-20T06:50:09.123Z");
  });

  it("newPointId() goes past the newest id when the clock was set back", () => {
    const newest = "20301231T235959999Z-ffffff";
    const id = newPointId(new Date("2026-01-01T00:00:00Z"), newest);
    expect(id > newest).toBe(true);
    expect(pointTime(id).toISOString()).toBe("2031-01-01T00:00:00.000Z");
  });

  it.each([
    "",
    "latest",
    "20261120T065009123Z-4f2a9",
    "20261120T065009123Z-4F2A91",
    "x20261120T065009123Z-4f2a91",
  ])("isPointId() refuses %j", (text) => {
    expect(isPointId(text)).toBe(false);
    expect(() => pointTime(text)).toThrow(RangeError);
  });
});

describe("names", () => {
  it.each(["a", "web-1", "db.example", "0", "A_b", "x".repeat(64)])("isName() takes %j", (text) => {
    expect(isName(text)).toBe(true);
  });

  it.each(["", ".", "..", "../../etc", "a/b", "-x", ".hidden", "x".repeat(65), "a b", "ä", "a\n", "a\0"])(
    "requireName() refuses %j",
    (text) => {
      expect(() => requireName("machine", text)).toThrow(UsageError);
    },
  );
});

describe("names in QEMU", () => {
  it("parseBitmapName() reads what formatBitmapName() writes", () => {
    const identity = { repository: "0a1b2c3d", checkpoint: "20261120T065009123Z-4f2a91", token: "deadbeef" };
    expect(formatBitmapName(identity)).toBe("tidemark-0a1b2c3d-20261120T065009123Z-4f2a91-deadbeef");
    expect(parseBitmapName(formatBitmapName(identity))).toEqual(identity);
  });

  it.each([
    "backup-0",
    "tidemark",
    "tidemark-0a1b2c3d-20261120T065009123Z-4f2a91-deadbeef-x",
    "tidemark.c-other-1",
  ])("parseBitmapName() leaves %j to its owner", (name) => {
    expect(parseBitmapName(name)).toBeUndefined();
  });

  it("run objects fit in QEMU's 31 characters and read back", () => {
    const object = { run: "01234567", disk: 9999, kind: "file" } as const;
    expect(formatRunObject(object).length).toBeLessThanOrEqual(31);
    expect(parseRunObject(formatRunObject(object))).toEqual(object);
    expect(parseRunObject("tm-0123456-1-scr")).toBeUndefined();
    expect(parseRunObject("libvirt-1-format")).toBeUndefined();
  });
});
