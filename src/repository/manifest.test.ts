import { describe, expect, it } from "vitest";
import { pointId, sampleDisk, sampleManifest } from "../../test/interop/repository-points.js";
import { DamageError, TidemarkError } from "../errors/index.js";
import { NewerFormatError } from "./errors.js";
import { MAX_MANIFEST_BYTES, type DiskManifest, type PointManifest } from "./manifest.js";
import { decodeManifest, encodeManifest } from "./manifest-codec.js";

const PLACE = { machine: "web", point: pointId(1) };
const KEY = `web/${PLACE.point}/point.json`;

function decodeJson(value: unknown): PointManifest {
  return decodeManifest(Buffer.from(JSON.stringify(value)), PLACE);
}

function errorOf(work: () => unknown): unknown {
  try {
    work();
  } catch (error) {
    return error;
  }
  throw new Error("nothing was thrown");
}

describe("encodeManifest() and decodeManifest()", () => {
  it("return what was written", () => {
    const manifest = sampleManifest({ name: "before the upgrade", description: "ünï 🌊" });
    expect(decodeManifest(encodeManifest(manifest), PLACE)).toEqual(manifest);
  });

  it("keep fields that this version does not know, at every level", () => {
    const [disk] = sampleManifest().disks;
    const value = {
      ...sampleManifest(),
      later: { a: [1] },
      machine: { ...sampleManifest().machine, tags: ["x"] },
      disks: [{ ...disk, pending: null, segments: disk!.segments.map((one) => ({ ...one, part: 1 })) }],
    };
    const again = decodeManifest(encodeManifest(decodeJson(value)), PLACE);
    expect(again).toEqual(value);
  });

  it("refuse to write what could not be read back", () => {
    const error = errorOf(() => encodeManifest(sampleManifest({ created: "yesterday" })));
    expect(error).toBeInstanceOf(TidemarkError);
    expect(error).toMatchObject({ code: "TM_MANIFEST_INVALID" });
  });

  it("refuse to write more than is read", () => {
    const configuration = { xml: " ".repeat(MAX_MANIFEST_BYTES) };
    const error = errorOf(() => encodeManifest(sampleManifest({ configuration })));
    expect(error).toMatchObject({ code: "TM_MANIFEST_INVALID" });
  });
});

describe("decodeManifest()", () => {
  it.each([
    ["nothing", ""],
    ["half a manifest", encodeManifest(sampleManifest()).toString().slice(0, 500)],
    ["another kind of JSON", "[1, 2]"],
    ["null", "null"],
    ["bytes that are no UTF-8", Buffer.from([0x22, 0xff, 0x22])],
  ])("refuses %s, naming the file and the point", (_what, content) => {
    const error = errorOf(() => decodeManifest(Buffer.from(content), PLACE));
    expect(error).toBeInstanceOf(DamageError);
    expect(error).toMatchObject({
      code: "TM_MANIFEST_DAMAGED",
      damage: { object: KEY, points: [PLACE.point] },
    });
    expect((error as Error).message).toContain(KEY);
  });

  it("refuses a newer format by its version, whatever else is in it", () => {
    const error = errorOf(() => decodeJson({ format: 2, strange: true }));
    expect(error).toBeInstanceOf(NewerFormatError);
    expect(error).toMatchObject({ code: "TM_FORMAT_NEWER" });
  });

  const hostilePoints: readonly (readonly [string, Record<string, unknown>])[] = [
    ["an older format", { format: 0 }],
    ["an id that is not its folder's", { id: pointId(2) }],
    ["an id that leads elsewhere", { id: "../../etc" }],
    ["a machine that is not its folder's", { machine: { name: "db", uuid: null } }],
    ["a machine that leads elsewhere", { machine: { name: "../db", uuid: null } }],
    ["a machine called like the repository's file", { machine: { name: "tidemark.json", uuid: null } }],
    ["a parent that is no id", { parent: "../x" }],
    ["itself as its parent", { parent: pointId(1) }],
    ["a younger parent", { parent: pointId(9) }],
    ["an unknown state", { state: "on fire" }],
    ["a name with an escape sequence", { name: "\u001b[2J" }],
    ["no disks", { disks: [] }],
    ["a missing field", { consistency: undefined }],
    ["more disks than a machine has", { disks: Array.from({ length: 1025 }, () => sampleDisk(pointId(1))) }],
  ];
  it.each(hostilePoints)("refuses %s", (_what, changes) => {
    expect(errorOf(() => decodeJson({ ...sampleManifest(), ...changes }))).toBeInstanceOf(DamageError);
  });

  const [frames, tables, header] = sampleDisk(pointId(1)).segments as [Segment, Segment, Segment];
  type Segment = DiskManifest["segments"][number];
  const hostileDisks: readonly (readonly [string, Record<string, unknown>])[] = [
    ["an image that leads elsewhere", { image: "../../../etc/shadow.qcow2" }],
    ["an absolute image", { image: "/etc/shadow.qcow2" }],
    ["an image in a folder", { image: "a/b.qcow2" }],
    ["an image called like the manifest", { image: "point.json" }],
    ["a disk that leads elsewhere", { name: "../x" }],
    ["a token that is none", { token: "../../xx" }],
    ["a parent that is no id", { kind: "incremental", reason: null, parent: "../.." }],
    ["a parent that is not older", { kind: "incremental", reason: null, parent: pointId(1) }],
    ["a full image with a parent", { parent: pointId(0) }],
    ["a full image without a reason", { reason: null }],
    ["an incremental image without a parent", { kind: "incremental", reason: null }],
    ["hashes that lead elsewhere", { hashes: { file: "../sda.hashes", bytes: 1, sha256: "0".repeat(64) } }],
    ["hashes called like an image", { hashes: { file: "sda.qcow2", bytes: 1, sha256: "0".repeat(64) } }],
    ["hashes without a digest", { hashes: { file: "sda.hashes", bytes: 1, sha256: "" } }],
    ["a size beyond bounds", { virtualSize: 2 ** 60 }],
    ["a negative size", { virtualSize: -512 }],
    ["a size that is no multiple of a sector", { virtualSize: 1000 }],
    ["a size that is no number", { virtualSize: "1e9" }],
    ["clusters that are no power of two", { clusterSize: 65_000 }],
    ["clusters of 4 MiB", { clusterSize: 1 << 22 }],
    ["more clusters than the disk has", { dataClusters: 15, zeroClusters: 2 }],
    ["another point's bitmap", { bitmap: `tidemark-0a1b2c3d-${pointId(2)}-00c0ffee` }],
    ["another disk's bitmap", { bitmap: `tidemark-0a1b2c3d-${pointId(1)}-00c0ffef` }],
    ["a bitmap that is not ours", { bitmap: "libvirt-1" }],
    ["a length that is not that of its segments", { bytes: 266_537 }],
    ["no segments", { segments: [] }],
    ["segments without a header", { segments: [frames, tables] }],
    ["segments with a header of another length", { segments: [frames, tables, { ...header, length: 512 }] }],
    ["segments with two headers", { segments: [header, frames, tables, header] }],
    ["segments that overlap", { segments: [frames, { ...tables, offset: 66_000 }, header] }],
    ["segments with a gap", { segments: [frames, { ...tables, offset: 66_537 }, header] }],
    ["segments out of order", { segments: [tables, frames, header] }],
    ["a segment of no bytes", { segments: [{ ...frames, length: 0 }, tables, header] }],
    ["a digest that is none", { segments: [{ ...frames, sha256: "0" }, tables, header] }],
    ["a digest that is another's", { segments: [{ ...frames, sha256: tables.sha256 }, tables, header] }],
  ];
  it.each(hostileDisks)("refuses %s", (_what, changes) => {
    const disk = { ...sampleDisk(pointId(1)), ...changes };
    expect(errorOf(() => decodeJson({ ...sampleManifest(), disks: [disk] }))).toBeInstanceOf(DamageError);
  });

  it.each(["name", "token", "image"])("refuses two disks of one %s", (key) => {
    const other = sampleDisk(pointId(1), {
      ...{ name: "sdb", token: "00c0ffef", image: "sdb.qcow2", bitmap: null },
    });
    const first = sampleDisk(pointId(1), { bitmap: null });
    expect(decodeJson({ ...sampleManifest(), disks: [first, other] }).disks).toHaveLength(2);
    const same = { ...other, [key]: first[key as "name"] };
    const error = errorOf(() => decodeJson({ ...sampleManifest(), disks: [first, same] }));
    expect((error as Error).message).toContain(`two disks have the ${key}`);
  });

  it("says where in the manifest the first wrong field is", () => {
    const disk = { ...sampleDisk(pointId(1)), image: "../x.qcow2" };
    const error = errorOf(() => decodeJson({ ...sampleManifest(), disks: [disk] }));
    expect((error as Error).message).toContain("disks.0.image: is no allowed file name of an image");
  });
});
