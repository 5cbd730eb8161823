import { describe, expect, it } from "vitest";
import { UsageError } from "../errors/index.js";
import { formatQmpAddress, parseQmpAddress } from "./address.js";

describe("parseQmpAddress()", () => {
  it.each([
    ["/run/vm.qmp", { transport: "unix", path: "/run/vm.qmp" }],
    ["vm.qmp", { transport: "unix", path: "vm.qmp" }],
    ["unix:/run/a:1", { transport: "unix", path: "/run/a:1" }],
    ["/run/a:1", { transport: "unix", path: "/run/a:1" }],
    ["localhost:4444", { transport: "tcp", host: "localhost", port: 4444 }],
    ["tcp:10.0.0.1:4444", { transport: "tcp", host: "10.0.0.1", port: 4444 }],
    ["[::1]:4444", { transport: "tcp", host: "::1", port: 4444 }],
  ])("reads %s", (text, address) => {
    expect(parseQmpAddress(text)).toEqual(address);
  });

  it.each(["", "unix:", "tcp:host", "host:0", "host:65536", `/${"x".repeat(107)}`, "a\0b"])(
    "refuses %j",
    (text) => {
      expect(() => parseQmpAddress(text)).toThrow(UsageError);
    },
  );
});

describe("formatQmpAddress()", () => {
  it("gives back what parseQmpAddress() reads", () => {
    for (const text of ["/run/vm.qmp", "localhost:4444", "[::1]:4444"]) {
      expect(formatQmpAddress(parseQmpAddress(text))).toBe(text);
    }
  });
});
