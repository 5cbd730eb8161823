import { stat } from "node:fs/promises";
import { NotFoundError, UsageError } from "../errors/index.js";
import {
  openRepository,
  parsePointReference,
  selectPoint,
  type PointManifest,
  type Repository,
} from "../repository/index.js";
import { LocalStorage } from "../storage/index.js";
import { repositoryOf, type CliContext } from "./context.js";

/** Opens the repository that the options name. */
export async function repositoryAt(
  options: { readonly repo?: string },
  context: CliContext,
): Promise<Repository> {
  const where = directoryOf(repositoryOf(options, context));
  if (!(await isDirectory(where))) {
    throw new NotFoundError("TM_REPOSITORY_NOT_FOUND", `There is no repository at ${where}`, {
      hint: `Make one with tidemark init --repo ${where}`,
    });
  }
  return await openRepository(await LocalStorage.open(where), { signal: context.signal });
}

async function isDirectory(path: string): Promise<boolean> {
  try {
    return (await stat(path)).isDirectory();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return false;
    throw error;
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
