/** Random stories of a repository: what is backed up, and what is then done to the chain. */
import fc from "fast-check";
import { DELETE_SCOPES, type DeleteScope } from "../../src/rewrite/index.js";
import { fraction } from "../support/seed.js";

/** A change that a guest makes to a disk; or a cut: the disk is made shorter, and as long again. */
export interface Change {
  readonly kind: "write" | "noise" | "zero" | "discard" | "cut";
  /** 0 to 1: where. */
  readonly place: number;
  /** At the border of a cluster, anywhere, or at the disk's end. */
  readonly at: "cluster" | "anywhere" | "end";
  readonly sectors: number;
  readonly seed: number;
}

/** What becomes of a disk until the next point. */
export interface DiskStep {
  /** The point does without this disk, or holds it for the first time, or again. */
  readonly isAbsent: boolean;
  readonly isFull: boolean;
  readonly isRenamed: boolean;
  /** Sectors of the disk from now on; null: as many as before. */
  readonly size: number | null;
  /** What was added to the disk counts as changed, as it does in a backup by bitmap; else only what differs does. */
  readonly isGrowthDirty: boolean;
  /** A disk that is stored in full begins with data where smaller and larger ones end. */
  readonly isBorderWritten: boolean;
  readonly changes: readonly Change[];
  /** Where clusters are stored that did not change. */
  readonly surplus: readonly number[];
}

export interface BackupStep {
  readonly kind: "backup";
  /** Which point it continues: 0 is the newest. */
  readonly parent: number;
  readonly disks: readonly DiskStep[];
  readonly name: number | null;
  /** Dies at this of its calls that change anything; null: it does not. */
  readonly crash: number | null;
}

/** What goes wrong while a command runs, or who looks on. */
export type Trouble =
  | { readonly kind: "none" | "dry run first" }
  /** It dies. `at` 0 to 1: how far it comes; `isRepeated`: it is given again. */
  | { readonly kind: "crash"; readonly at: number; readonly isRepeated: boolean }
  /** Others read what it works on. */
  | { readonly kind: "readers"; readonly seed: number }
  /** It is suspended right before it asks for its lock or puts an image in its place; another command runs; it goes on. */
  | { readonly kind: "suspended"; readonly at: number; readonly other: Command };

export type Command =
  | {
      readonly kind: "delete";
      readonly point: number;
      readonly scope: DeleteScope;
      readonly isForced: boolean;
    }
  | { readonly kind: "flatten"; readonly point: number }
  /** Of one point or of all; `share` of an image that may be garbage. */
  | { readonly kind: "compact"; readonly point: number | null; readonly share: number }
  | { readonly kind: "prune"; readonly last: number; readonly pattern: string | null }
  | {
      readonly kind: "edit";
      readonly point: number;
      readonly name: number | null;
      readonly description: string;
    };

export interface CommandStep {
  readonly kind: "command";
  readonly command: Command;
  readonly trouble: Trouble;
}

export type Step = BackupStep | CommandStep;

export const DISKS = 3;
const LONGEST_DISK = 600 * 8;

const change: fc.Arbitrary<Change> = fc.record({
  kind: fc.oneof(
    { weight: 12, arbitrary: fc.constantFrom("write", "noise", "noise", "zero", "discard") },
    { weight: 1, arbitrary: fc.constant("cut" as const) },
  ),
  place: fraction,
  at: fc.constantFrom("cluster", "anywhere", "end"),
  sectors: fc.oneof(fc.constantFrom(1, 7, 8, 9, 16), fc.integer({ min: 1, max: 40 })),
  seed: fc.nat(255),
});

const diskStep: fc.Arbitrary<DiskStep> = fc.record({
  isAbsent: fc.oneof({ weight: 5, arbitrary: fc.constant(false) }, fc.constant(true)),
  isFull: fc.oneof({ weight: 12, arbitrary: fc.constant(false) }, fc.constant(true)),
  isRenamed: fc.oneof({ weight: 12, arbitrary: fc.constant(false) }, fc.constant(true)),
  // Mostly as before; else sizes that end inside the same clusters as others, and far away.
  size: fc.oneof(
    { weight: 4, arbitrary: fc.constant(null) },
    { weight: 4, arbitrary: fc.integer({ min: 96, max: 106 }) },
    fc.integer({ min: 0, max: LONGEST_DISK }),
  ),
  isGrowthDirty: fc.boolean(),
  isBorderWritten: fc.boolean(),
  changes: fc.oneof(
    { weight: 2, arbitrary: fc.array(change, { maxLength: 6 }) },
    fc.array(change, { maxLength: 1 }),
  ),
  surplus: fc.array(fraction, { maxLength: 2 }),
});

const backup: fc.Arbitrary<BackupStep> = fc.record({
  kind: fc.constant("backup" as const),
  parent: fc.oneof({ weight: 3, arbitrary: fc.constant(0) }, fc.nat(20)),
  disks: fc.array(diskStep, { minLength: DISKS, maxLength: DISKS }),
  name: fc.option(fc.nat(5)),
  crash: fc.oneof({ weight: 9, arbitrary: fc.constant(null) }, fc.nat(60)),
});

const command: fc.Arbitrary<Command> = fc.oneof(
  {
    weight: 6,
    arbitrary: fc.record({
      kind: fc.constant("delete" as const),
      point: fc.nat(20),
      scope: fc.oneof(
        { weight: 6, arbitrary: fc.constant("point" as const) },
        fc.constantFrom(...DELETE_SCOPES),
      ),
      isForced: fc.oneof({ weight: 4, arbitrary: fc.constant(true) }, fc.constant(false)),
    }),
  },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant("flatten" as const), point: fc.nat(20) }) },
  {
    weight: 1,
    arbitrary: fc.record({
      kind: fc.constant("compact" as const),
      point: fc.option(fc.nat(20)),
      share: fc.constantFrom(0, 0.1, 0.5),
    }),
  },
  {
    weight: 2,
    arbitrary: fc.record({
      kind: fc.constant("prune" as const),
      last: fc.integer({ min: 1, max: 4 }),
      pattern: fc.constantFrom(null, "name-1", "name-*"),
    }),
  },
  {
    weight: 1,
    arbitrary: fc.record({
      kind: fc.constant("edit" as const),
      point: fc.nat(20),
      name: fc.option(fc.nat(5)),
      description: fc.constantFrom("", "before the upgrade"),
    }),
  },
);

const trouble: fc.Arbitrary<Trouble> = fc.oneof(
  { weight: 2, arbitrary: fc.record({ kind: fc.constantFrom("none" as const, "dry run first" as const) }) },
  {
    weight: 3,
    arbitrary: fc.record({ kind: fc.constant("crash" as const), at: fraction, isRepeated: fc.boolean() }),
  },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant("readers" as const), seed: fc.nat() }) },
  {
    weight: 1,
    arbitrary: fc.record({ kind: fc.constant("suspended" as const), at: fraction, other: command }),
  },
);

/** Backups first, so that there is something to work on; then both, mixed. */
export const story: fc.Arbitrary<readonly Step[]> = fc
  .tuple(
    fc.array(backup, { minLength: 2, maxLength: 6 }),
    fc.array(
      fc.oneof(
        {
          weight: 2,
          arbitrary: fc.record({ kind: fc.constant("command" as const), command, trouble }),
        },
        { weight: 1, arbitrary: backup },
      ),
      { minLength: 1, maxLength: 6 },
    ),
  )
  .map(([first, then]) => [...first, ...then]);
