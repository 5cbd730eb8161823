import { describe, expect, it } from "vitest";
import { QmpProtocolError } from "./errors.js";
import { MessageFraming } from "./framing.js";

describe("MessageFraming.push()", () => {
  it("yields the same messages however the stream is cut", () => {
    const stream = Buffer.from('{"a": 1}\r\n\r\n{\r\n  "b": "}"\r\n}\r\n{"c": {}}\n');
    for (let size = 1; size <= stream.length; size += 1) {
      const framing = new MessageFraming();
      const messages: unknown[] = [];
      for (let at = 0; at < stream.length; at += size) {
        for (const text of framing.push(stream.subarray(at, at + size))) messages.push(JSON.parse(text));
      }
      expect(messages).toEqual([{ a: 1 }, { b: "}" }, { c: {} }]);
    }
  });

  it("refuses a line that does not end", () => {
    const framing = new MessageFraming(100);
    expect(() => {
      for (;;) expect([...framing.push(Buffer.alloc(30, "x"))]).toEqual([]);
    }).toThrow(QmpProtocolError);
  });

  it("refuses a message of many lines that does not end", () => {
    const framing = new MessageFraming(100);
    expect(() => {
      for (;;) expect([...framing.push(Buffer.from("{\r\n"))]).toEqual([]);
    }).toThrow(QmpProtocolError);
  });
});
