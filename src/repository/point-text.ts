import { UsageError } from "../errors/index.js";
import { pointManifest } from "./manifest.js";
import { isLatest } from "./selector.js";

/** What a user says of a point. */
export interface PointText {
  readonly name?: string | undefined;
  readonly description?: string | undefined;
}

/**
 * Checks what a user wants to say of a point, before anything is done for it.
 *
 * @throws {UsageError} when a manifest cannot hold it, or the name means something else already
 */
export function requirePointText({ name, description }: PointText): void {
  if (name === "" || (name !== undefined && isLatest(name))) {
    throw new UsageError(`${JSON.stringify(name)} cannot be the name of a point`, {
      hint: "Use a name that tells points apart: latest and latest~N mean points already",
    });
  }
  const { name: names, description: descriptions } = pointManifest.unwrap().shape;
  if (!names.safeParse(name ?? null).success) {
    throw new UsageError("Cannot give the point that name", {
      hint: "Use at most 256 characters, no control characters among them",
    });
  }
  if (descriptions.safeParse(description ?? null).success) return;
  throw new UsageError("Cannot give the point that description", {
    hint: "Use at most 4096 characters on one line, no control characters among them",
  });
}
