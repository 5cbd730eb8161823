import { stat } from "node:fs/promises";
import { messageOf, NotFoundError, TidemarkError, UsageError } from "../errors/index.js";
import { unlessAborted } from "../flow/index.js";
import {
  openRepository,
  parsePointReference,
  selectPoint,
  type PointManifest,
  type Repository,
} from "../repository/index.js";
import { interruptible, LocalStorage } from "../storage/index.js";
import { repositoryOf, type CliContext } from "./context.js";

/** Opens the repository that the options name. */
export async function repositoryAt(
  options: { readonly repo?: string },
  context: CliContext,
): Promise<Repository> {
  const where = directoryOf(repositoryOf(options, context));
  const { signal } = context;
  if ((await unlessAborted(isDirectory(where), signal)) !== true) {
    throw new NotFoundError("TM_REPOSITORY_NOT_FOUND", `There is no repository at ${where}`, {
      hint: "Check the place given with --repo, and that it is mounted; `tidemark init` makes a new repository",
    });
  }
  const storage = await unlessAborted(LocalStorage.open(where), signal);
  return await openRepository(interruptible(storage, context), { signal });
}

/** @throws {UsageError} when something else than a directory is there */
export async function requireNoFile(path: string): Promise<void> {
  if ((await isDirectory(path)) !== false) return;
  throw new UsageError(`${path} is not a directory`, { hint: "Name a directory, or a place for a new one" });
}

/** @returns undefined when nothing is there */
async function isDirectory(path: string): Promise<boolean | undefined> {
  try {
    return (await stat(path)).isDirectory();
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === "ENOENT" || code === "ENOTDIR") return undefined;
    throw new TidemarkError("TM_REPOSITORY_UNREADABLE", `Cannot look at ${path}: ${messageOf(error)}`, {
      cause: error,
    });
  }
}

/** A repository's place as a directory. @throws {UsageError} for what looks like a URL */
export function directoryOf(where: string): string {
  const [, scheme] = /^([a-z][a-z0-9+.-]*):\/\//i.exec(where) ?? [];
  if (scheme === undefined) return where;
  throw new UsageError(
    `A repository cannot be at ${where}: only directories are supported, not ${scheme}://`,
  );
}

/**
 * The machines that a command is about: the one that was named, or all.
 *
 * @throws {NotFoundError} when the repository has no such machine
 */
export async function machinesAt(
  repository: Repository,
  machine: string | undefined,
  { signal }: CliContext,
): Promise<readonly string[]> {
  const machines = await repository.machines({ signal });
  if (machine === undefined) return machines;
  if (machines.includes(machine)) return [machine];
  throw new NotFoundError("TM_MACHINE_NOT_FOUND", `The repository has no machine "${machine}"`, {
    hint: `Its machines: ${machines.join(", ") || "none"}`,
  });
}

/** A reference that names a point: what changes one must not guess which. @throws {UsageError} for a machine alone */
export function requirePoint(reference: string): string {
  if (parsePointReference(reference).selector !== undefined) return reference;
  throw new UsageError(`"${reference}" names a machine, not one of its points`, {
    hint: `Write ${reference}@latest, or ${reference}@ and the id or name of a point`,
  });
}

/**
 * Finds the point that `MACHINE[@POINT]` and `--at` mean.
 *
 * @throws {DamageError} when a point that cannot be read may be the one
 */
export async function pointAt(
  repository: Repository,
  reference: string,
  options: { readonly at?: Date | undefined },
  context: CliContext,
): Promise<{ readonly point: PointManifest; readonly points: readonly PointManifest[] }> {
  const { machine, selector } = parsePointReference(reference);
  const { points, unreadable } = await repository.survey(machine, { signal: context.signal });
  try {
    const point = selectPoint(points, selector, { at: options.at, machine });
    // "latest" and the like could mean a point that cannot be read, if that is newer.
    const newer = unreadable.find(({ id }) => id > point.id);
    const isRelative = selector === undefined || selector.startsWith("latest");
    if (isRelative && newer !== undefined) throw newer.error;
    return { point, points };
  } catch (error) {
    const [suspect] = unreadable;
    throw error instanceof NotFoundError && suspect !== undefined ? suspect.error : error;
  }
}
