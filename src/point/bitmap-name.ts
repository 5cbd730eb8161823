import { randomBytes } from "node:crypto";
import { isPointId } from "./id.js";

/** What the name of a checkpoint's bitmap says. */
export interface BitmapIdentity {
  /** First 8 hex digits of the repository's id: every repository keeps its own checkpoints. */
  readonly repository: string;
  /** Id of the checkpoint, and of the point that was made from it. */
  readonly checkpoint: string;
  /** The disk's token: says which chain the disk belongs to, whatever its bus, name or order is now. */
  readonly token: string;
}

const BITMAP_NAME = /^tidemark-([0-9a-f]{8})-(\d{8}T\d{9}Z-[0-9a-f]{6})-([0-9a-f]{8})$/;

/** The name of the bitmap that records a disk's writes since a checkpoint. */
export function formatBitmapName(identity: BitmapIdentity): string {
  return `tidemark-${identity.repository}-${identity.checkpoint}-${identity.token}`;
}

/** Reads a bitmap's name; undefined for a name that is not one of ours, which must never be touched. */
export function parseBitmapName(name: string): BitmapIdentity | undefined {
  const [, repository, checkpoint, token] = BITMAP_NAME.exec(name) ?? [];
  if (repository === undefined || checkpoint === undefined || token === undefined) return undefined;
  return isPointId(checkpoint) ? { repository, checkpoint, token } : undefined;
}

/** A new disk token: 8 random hex digits, made at the disk's first backup and kept in the manifests. */
export function newDiskToken(): string {
  return randomBytes(4).toString("hex");
}

/** The part of a repository's id that bitmap names carry: its first 8 hex digits. */
export function repositoryTag(repositoryId: string): string {
  return repositoryId.replaceAll("-", "").slice(0, 8);
}
