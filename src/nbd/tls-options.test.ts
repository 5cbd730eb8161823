import { describe, expect, it } from "vitest";
import { UsageError } from "../errors/index.js";
import { tlsOptionsOf } from "./tls-options.js";
import { parseNbdUri } from "./uri.js";

describe("tlsOptionsOf()", () => {
  it.each([
    ["nbd://h/x", undefined],
    ["nbd+unix:///x?socket=s", undefined],
    ["nbds://h/x", { type: "x509", verifyPeer: true }],
    [
      "nbds://h/x?tls-certificates=/pki&tls-hostname=n",
      { type: "x509", certificates: "/pki", hostname: "n", verifyPeer: true },
    ],
    ["nbds+unix:///x?socket=s&tls-type=x509&tls-verify-peer=0", { type: "x509", verifyPeer: false }],
    ["nbds://alice@h/x?tls-psk-file=/k", { type: "psk", pskFile: "/k", username: "alice" }],
    ["nbds+unix://alice@/x?socket=s&tls-psk-file=/k", { type: "psk", pskFile: "/k", username: "alice" }],
    [
      "nbds+unix:///x?socket=s&tls-type=psk&tls-psk-file=/k&tls-username=bob",
      { type: "psk", pskFile: "/k", username: "bob" },
    ],
    ["nbds://h/x?tls-psk-file=/k", { type: "psk", pskFile: "/k" }],
  ])("makes of %s what it says", (uri, options) => {
    expect(tlsOptionsOf(parseNbdUri(uri))).toEqual(options);
  });

  it.each([
    ["nbd://h/x?tls-certificates=/pki", "scheme without TLS"],
    ["nbd+unix:///x?socket=s&tls-psk-file=/k", "scheme without TLS"],
    ["nbds://h/x?tls-type=anon", "proves nothing"],
    ["nbds://h/x?tls-type=ssh", "not known"],
    ["nbds://h/x?tls-type=psk", "tls-psk-file is missing"],
    ["nbds://h/x?tls-psk-file=", "tls-psk-file is missing"],
    ["nbds://h/x?tls-psk-file=/k&tls-certificates=/pki", "either"],
    ["nbds://h/x?tls-psk-file=/k&tls-type=x509", "needs tls-type=psk"],
    ["nbds://h/x?tls-verify-peer=yes", "not 0 or 1"],
  ])("refuses %s and says why", (uri, why) => {
    const parsed = parseNbdUri(uri);
    expect(() => tlsOptionsOf(parsed)).toThrow(UsageError);
    expect(() => tlsOptionsOf(parsed)).toThrow(why);
  });
});
