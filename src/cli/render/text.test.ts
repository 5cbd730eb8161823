import { describe, expect, it } from "vitest";
import { cutText, padText, textWidth } from "./text.js";

describe("textWidth()", () => {
  it.each([
    ["", 0],
    ["before-upgrade", 14],
    ["vor Änderung", 12],
    ["u\u0308ber", 4],
    ["日本語", 6],
    ["완료", 4],
    ["a\u200bb", 2],
    ["👍🏽 ok", 5],
  ])("counts the columns of %j: %i", (text, width) => {
    expect(textWidth(text)).toBe(width);
  });
});

describe("cutText()", () => {
  it.each([
    ["fits", 4, "fits"],
    ["does not", 5, "does…"],
    ["日本語", 5, "日本…"],
    ["日本語", 4, "日…"],
    ["a b c", 3, "a…"],
    ["long", 0, ""],
  ])("cuts %j to %i columns: %j", (text, width, cut) => {
    expect(cutText(text, width)).toBe(cut);
    expect(textWidth(cutText(text, width))).toBeLessThanOrEqual(width);
  });

  it("ends with another mark where that is wanted", () => {
    expect(cutText("does not", 5, "...")).toBe("do...");
  });
});

describe("padText()", () => {
  it("fills up to a width, on either side", () => {
    expect([padText("語", 4), padText("語", 4, "right"), padText("long", 2)]).toEqual([
      "語  ",
      "  語",
      "long",
    ]);
  });
});
