import { describe, expect, it } from "vitest";
import { QmpProtocolError } from "./errors.js";
import { QmpSchema } from "./schema.js";

/** A cut of what QEMU 7.2 answers; type names are opaque numbers there, too. */
const SCHEMA = [
  { name: "BLOCK_EXPORT_DELETED", "meta-type": "event", "arg-type": "9" },
  { name: "transaction", "meta-type": "command", "arg-type": "1", "ret-type": "9" },
  { name: "1", "meta-type": "object", members: [{ name: "actions", type: "[2]" }] },
  { name: "[2]", "meta-type": "array", "element-type": "2" },
  {
    name: "2",
    "meta-type": "object",
    members: [{ name: "type", type: "3" }],
    tag: "type",
    variants: [{ case: "blockdev-backup", type: "9" }],
  },
  { name: "3", "meta-type": "enum", members: [{ name: "blockdev-backup" }], values: ["blockdev-backup"] },
  { name: "block-export-add", "meta-type": "command", "arg-type": "4", "ret-type": "9" },
  {
    name: "4",
    "meta-type": "object",
    members: [{ name: "id", type: "str" }],
    tag: "type",
    variants: [
      { case: "nbd", type: "5" },
      { case: "fuse", type: "9" },
    ],
  },
  { name: "5", "meta-type": "object", members: [{ name: "bitmaps", type: "[6]" }] },
  { name: "[6]", "meta-type": "array", "element-type": "6" },
  { name: "6", "meta-type": "alternate", members: [{ type: "str" }] },
  { name: "str", "meta-type": "builtin", "json-type": "string" },
  { name: "9", "meta-type": "object", members: [] },
];

describe("QmpSchema.has()", () => {
  const schema = QmpSchema.index(SCHEMA);

  it("knows commands and events apart", () => {
    expect(schema.has({ command: "transaction" })).toBe(true);
    expect(schema.has({ command: "BLOCK_EXPORT_DELETED" })).toBe(false);
    expect(schema.has({ event: "BLOCK_EXPORT_DELETED" })).toBe(true);
    expect(schema.has({ command: "none" })).toBe(false);
  });

  it("looks through lists and variants for an argument", () => {
    expect(schema.has({ command: "block-export-add", argument: "bitmaps" })).toBe(true);
    expect(schema.has({ command: "block-export-add", argument: "iothread" })).toBe(false);
    expect(schema.has({ command: "transaction", argument: "actions.type" })).toBe(true);
  });

  it("knows the values of an enumeration, with and without the older list", () => {
    const question = { command: "transaction", argument: "actions.type", value: "blockdev-backup" };
    expect(schema.has(question)).toBe(true);
    expect(schema.has({ ...question, value: "blockdev-add" })).toBe(false);
    const newer = SCHEMA.map(({ values: _values, ...entity }) => entity);
    expect(QmpSchema.index(newer).has(question)).toBe(true);
  });

  it("refuses a schema that refers to a type that is not there", () => {
    const cut = QmpSchema.index(SCHEMA.filter(({ name }) => name !== "5"));
    expect(() => cut.has({ command: "block-export-add", argument: "bitmaps" })).toThrow(QmpProtocolError);
  });
});

describe("QmpSchema.exportsBitmapsByNode", () => {
  it("is told by the element type of bitmaps", () => {
    expect(QmpSchema.index(SCHEMA).exportsBitmapsByNode).toBe(true);
    const older = SCHEMA.map((entity) =>
      entity.name === "[6]" ? { ...entity, "element-type": "str" } : entity,
    );
    expect(QmpSchema.index(older).exportsBitmapsByNode).toBe(false);
  });
});
