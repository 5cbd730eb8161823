import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { UsageError } from "../errors/index.js";
import { formatNbdUri, parseNbdUri } from "./uri.js";

const tcp = (host: string, port = 10809) => ({ transport: "tcp", host, port });
const unix = (path: string) => ({ transport: "unix", path });

describe("parseNbdUri()", () => {
  it.each([
    // The table of the specification's section "NBD URI export name", and its other examples
    ["nbd://example.com/disk", tcp("example.com"), "disk"],
    ["nbd+unix:///disk?socket=sock", unix("sock"), "disk"],
    ["nbd://example.com/", tcp("example.com"), ""],
    ["nbd://example.com", tcp("example.com"), ""],
    ["nbd://example.com//disk", tcp("example.com"), "/disk"],
    ["nbd://example.com/hello%20world", tcp("example.com"), "hello world"],
    ["nbd://example.com:10810/export", tcp("example.com", 10810), "export"],
    ["nbd+unix:///?socket=%00/abstract", unix("\0/abstract"), ""],
    // RFC 3986
    ["NBD://h/x", tcp("h"), "x"],
    ["nbd://[::1]:99/x", tcp("::1", 99), "x"],
    ["nbd://h:/x", tcp("h"), "x"],
    ["nbd:///x", tcp("localhost"), "x"],
    ["nbd+unix:/x?socket=/s", unix("/s"), "x"],
    ["nbd://h/a/../b/./c", tcp("h"), "a/../b/./c"],
    ["nbd://h/%C3%A9+1", tcp("h"), "é+1"],
    ["nbd+unix:///?socket=/run/a+b%26c=d", unix("/run/a+b&c=d"), ""],
  ])("reads %s", (text, address, exportName) => {
    expect(parseNbdUri(text)).toEqual({ address, exportName, tls: false, parameters: {} });
  });

  it("reads the TLS schemes, the user and the parameters", () => {
    expect(parseNbdUri("nbds://alice@h/x?tls-type=psk&x-trace=1")).toEqual({
      address: tcp("h"),
      exportName: "x",
      tls: true,
      username: "alice",
      parameters: { "tls-type": "psk", "x-trace": "1" },
    });
    expect(parseNbdUri("nbds+unix:///x?socket=s&tls-hostname=h")).toMatchObject({ tls: true });
    expect(parseNbdUri("nbds+unix://alice@/x?socket=s")).toMatchObject({ tls: true, username: "alice" });
  });

  it.each([
    ["", "it is not a URI"],
    ["/run/sock", "it is not a URI"],
    ["http://h/x", "scheme"],
    ["nbd+tcp://h/x", "scheme"],
    ["nbd+unix:///x", "socket is missing"],
    ["nbd+unix:///x?socket=", "socket is missing"],
    ["nbd+unix://host/x?socket=s", "no host"],
    ["nbd+unix://alice@host/x?socket=s", "no host"],
    ["nbd+unix://alice@:99/x?socket=s", "no host"],
    ["nbd://h/x?socket=s", "nbd+unix"],
    ["nbd://h:0/x", "port"],
    ["nbd://h:65536/x", "port"],
    ["nbd://h:8a/x", "host or port"],
    ["nbd://[::1/x", "host or port"],
    ["nbd://h/%zz", "percent"],
    ["nbd://h/%ff", "percent"],
    ["nbd://h/a%00b", "NUL"],
    ["nbd://h/x#f", "fragment"],
    ["nbd://h/a b", "white space"],
    ["nbd:x", "slash"],
    ["nbd://h/x?colour=red", '"colour" is not known'],
    ["nbd+unix:///x?socket=a&socket=b", "twice"],
    ["nbd://h/x?__proto__=1", "not known"],
  ])("refuses %j and says why", (text, why) => {
    expect(() => parseNbdUri(text)).toThrow(UsageError);
    expect(() => parseNbdUri(text)).toThrow(why);
  });
});

describe("formatNbdUri()", () => {
  const text = fc.string({ unit: "grapheme", maxLength: 20 }).filter((name) => !name.includes("\0"));
  const address = fc.oneof(
    fc.record({ transport: fc.constant("unix" as const), path: text.filter((path) => path !== "") }),
    fc.record({
      transport: fc.constant("tcp" as const),
      host: fc.constantFrom("localhost", "example.com", "192.0.2.1", "2001:db8::1"),
      port: fc.integer({ min: 1, max: 65535 }),
    }),
  );

  it("gives what parseNbdUri() reads back as the same", () => {
    fc.assert(
      fc.property(
        address,
        text,
        fc.option(text),
        fc.boolean(),
        text,
        (where, exportName, user, tls, value) => {
          const username = user === null ? {} : { username: user };
          const uri = { address: where, exportName, tls, ...username, parameters: { "x-note": value } };
          expect(parseNbdUri(formatNbdUri(uri))).toEqual(uri);
        },
      ),
    );
  });

  it("leaves out the default port and keeps slashes readable", () => {
    const base = { exportName: "a/b c", tls: false, parameters: {} };
    expect(formatNbdUri({ ...base, address: { transport: "tcp", host: "::1", port: 10809 } })).toBe(
      "nbd://[::1]/a/b%20c",
    );
    expect(formatNbdUri({ ...base, tls: true, address: { transport: "unix", path: "/run/s" } })).toBe(
      "nbds+unix:///a/b%20c?socket=/run/s",
    );
  });
});
