import { UsageError } from "../errors/index.js";
import { isName, isPointId, requireName } from "../point/index.js";

/*
 * <root>/tidemark.json                     the repository itself
 * <root>/<machine>/<point>/<disk>.qcow2    images; backing name "../<parent point>/<parent's image file>"
 * <root>/<machine>/<point>/<disk>.hashes   hashes of their clusters
 * <root>/<machine>/<point>/point.json      the manifest; a point exists when its manifest does
 * <root>/<machine>/lock                    held by the run that changes the machine's points
 */

/** Key of the repository's own file. */
export const REPOSITORY_KEY = "tidemark.json";

const MANIFEST_FILE = "point.json";
const IMAGE_SUFFIX = ".qcow2";
const HASHES_SUFFIX = ".hashes";

/** Whether a folder of this name is a machine's. */
export function isMachineName(text: string): boolean {
  return isName(text) && text !== REPOSITORY_KEY;
}

/** Returns `name` if it may name a machine of a repository. @throws {UsageError} when it may not */
export function requireMachineName(name: string): string {
  requireName("machine", name);
  if (isMachineName(name)) return name;
  throw new UsageError(`"${name}" cannot be the name of a machine: the repository uses it itself`);
}

/** Returns `id` if it is a point's. @throws {UsageError} when it is not */
export function requirePointId(id: string): string {
  if (isPointId(id)) return id;
  throw new UsageError(`${JSON.stringify(id)} is not the id of a point`);
}

/** Whether `file` may be the name of an image within its point's folder. */
export function isImageFile(file: string): boolean {
  return file.endsWith(IMAGE_SUFFIX) && isName(file.slice(0, -IMAGE_SUFFIX.length));
}

/** Name of a disk's image within its point's folder. */
export function imageFileOf(disk: string): string {
  return requireName("disk", disk) + IMAGE_SUFFIX;
}

/** Whether `file` may be the name of a file of hashes within its point's folder. */
export function isHashesFile(file: string): boolean {
  return file.endsWith(HASHES_SUFFIX) && isName(file.slice(0, -HASHES_SUFFIX.length));
}

/** Whether a key is that of a file of hashes. */
export function isHashesKey(key: string): boolean {
  return isHashesFile(key.slice(key.lastIndexOf("/") + 1));
}

/** Name of the hashes of a disk's image within its point's folder. */
export function hashesFileOf(disk: string): string {
  return requireName("disk", disk) + HASHES_SUFFIX;
}

/** Prefix of everything of a machine. */
export function machinePrefix(machine: string): string {
  return `${requireMachineName(machine)}/`;
}

/** Prefix of everything of a point. */
export function pointPrefix(machine: string, point: string): string {
  return `${machinePrefix(machine)}${requirePointId(point)}/`;
}

/** Key of a point's manifest. */
export function manifestKey(machine: string, point: string): string {
  return pointPrefix(machine, point) + MANIFEST_FILE;
}

/** Key of an image. */
export function imageKey(machine: string, point: string, file: string): string {
  return pointPrefix(machine, point) + requireImageFile(file);
}

/** Key of a file of hashes. */
export function hashesKey(machine: string, point: string, file: string): string {
  if (!isHashesFile(file)) throw new UsageError(`${JSON.stringify(file)} cannot be the name of hashes`);
  return pointPrefix(machine, point) + file;
}

/** Key of a machine's lock. */
export function lockKey(machine: string): string {
  return `${machinePrefix(machine)}lock`;
}

/** The backing name in an image whose parent is `file` of `point`: relative, so that a repository can move. @throws {UsageError} */
export function backingName(point: string, file: string): string {
  return `../${requirePointId(point)}/${requireImageFile(file)}`;
}

/** The point that a backing name leads to; undefined for a name that is not one of ours. */
export function backingPoint(name: string): string | undefined {
  const [up, point, file, ...rest] = name.split("/");
  if (up !== ".." || point === undefined || file === undefined || rest.length > 0) return undefined;
  return isPointId(point) && isImageFile(file) ? point : undefined;
}

function requireImageFile(file: string): string {
  if (isImageFile(file)) return file;
  throw new UsageError(`${JSON.stringify(file)} cannot be the name of an image`);
}
