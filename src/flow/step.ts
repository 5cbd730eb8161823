/** The named places in the sequence of a backup, in the order in which one comes by them. */
export type BackupStep =
  | "machine locked"
  | "machine opened"
  | "repository locked"
  | "cleaned"
  | "planned"
  | "guard spawned"
  | "guard holds"
  | "guard recorded"
  | "guard started"
  | "guard takes over"
  | "scratch planned"
  | "scratch made"
  | "server started"
  | "scratch watched"
  | "before the freeze"
  | "frozen"
  | "exported"
  | "connections open"
  | "connections held"
  | "negotiated"
  | "reading"
  | "all read"
  | "exports deleted"
  | "connections closed"
  | "server stopped"
  | "jobs ended"
  | "nodes deleted"
  | "files deleted"
  | "released"
  | "images finished"
  | "before the manifest"
  | "manifest written"
  | "committed"
  | "bitmaps removed"
  | "monitor left"
  | "machine unlocked"
  | "guard dismissed"
  | "repository unlocked";

/** Those of rewriting a chain. */
export type RewriteStep =
  "rewrite announced" | "image rewritten" | "rewrite finished" | "points rewritten" | "point removed";

export type StepName = BackupStep | RewriteStep;

/**
 * A named place in a sequence. It does nothing: tests put a module in place of this one that kills the process there,
 * to see that whoever comes next goes on rightly.
 */
export const step: (name: StepName) => Promise<void> | undefined = () => undefined;
