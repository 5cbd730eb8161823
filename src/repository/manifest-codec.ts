import { isDeepStrictEqual } from "node:util";
import { messageOf, TidemarkError } from "../errors/index.js";
import { ManifestDamageError, NewerFormatError } from "./errors.js";
import { manifestKey } from "./layout.js";
import { manifestProblem } from "./manifest-rules.js";
import { MANIFEST_FORMAT, MAX_MANIFEST_BYTES, pointManifest, type PointManifest } from "./manifest.js";

/** Where a manifest was found, which it must agree with. */
export interface ManifestPlace {
  readonly machine: string;
  readonly point: string;
}

/**
 * Reads a manifest.
 *
 * @throws {NewerFormatError} when its format is newer
 * @throws {ManifestDamageError} when it is no manifest, contradicts itself, or belongs elsewhere
 */
export function decodeManifest(bytes: Buffer, place: ManifestPlace): PointManifest {
  const key = manifestKey(place.machine, place.point);
  const damage = (what: string, cause?: unknown): ManifestDamageError =>
    new ManifestDamageError(key, [place.point], what, { cause });
  const value = parseJson(bytes, damage);
  requireKnownFormat(value, key, MANIFEST_FORMAT);
  const parsed = pointManifest.safeParse(value);
  if (!parsed.success) throw damage(firstIssue(parsed.error), parsed.error);
  const contradiction = manifestProblem(parsed.data);
  if (contradiction !== undefined) throw damage(contradiction);
  const { id, machine } = parsed.data;
  if (id !== place.point) throw damage(`it is the manifest of point ${id}`);
  if (machine.name !== place.machine) throw damage(`it is the manifest of machine "${machine.name}"`);
  return parsed.data;
}

/**
 * Writes a manifest as the bytes of its file, after having read them back.
 *
 * @throws {TidemarkError} TM_MANIFEST_INVALID when it could not be read back: a mistake of the caller
 */
export function encodeManifest(manifest: PointManifest): Buffer {
  const bytes = Buffer.from(`${JSON.stringify(manifest, null, 1)}\n`, "utf8");
  const invalid = (what: string, cause?: unknown): TidemarkError =>
    new TidemarkError("TM_MANIFEST_INVALID", `Cannot write the manifest of point ${manifest.id}: ${what}`, {
      cause,
    });
  if (bytes.length > MAX_MANIFEST_BYTES) throw invalid(`it would be longer than ${MAX_MANIFEST_BYTES} bytes`);
  let read: PointManifest;
  try {
    read = decodeManifest(bytes, { machine: manifest.machine.name, point: manifest.id });
  } catch (error) {
    throw invalid(messageOf(error), error);
  }
  if (isDeepStrictEqual(read, JSON.parse(bytes.toString("utf8")))) return bytes;
  throw invalid("it reads back differently");
}

/** Parses JSON text. @param damage makes the error for text that is none */
export function parseJson(bytes: Buffer, damage: (what: string, cause: unknown) => Error): unknown {
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw damage(`it is not JSON text (${messageOf(error)})`, error);
  }
}

/** @throws {NewerFormatError} when `value` says that its format is newer than `known` */
export function requireKnownFormat(value: unknown, object: string, known: number): void {
  if (typeof value !== "object" || value === null || !("format" in value)) return;
  const { format } = value;
  if (typeof format === "number" && format > known) throw new NewerFormatError(object, format, known);
}

/** The first thing that is wrong, with its place: `disks.0.image: is no allowed file name of an image`. */
export function firstIssue(error: {
  readonly issues: readonly { readonly path: readonly PropertyKey[]; readonly message: string }[];
}): string {
  const [issue] = error.issues;
  if (issue === undefined) return "it is not valid";
  return issue.path.length === 0 ? issue.message : `${issue.path.map(String).join(".")}: ${issue.message}`;
}
