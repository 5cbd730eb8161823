import { BusyError, DamageError, TidemarkError, type ErrorDetails } from "../errors/index.js";

/** Written by a newer tidemark than this one: nothing is known about it, nothing is wrong with it. */
export class NewerFormatError extends TidemarkError {
  constructor(object: string, found: number, known: number) {
    super(
      "TM_FORMAT_NEWER",
      `Cannot read "${object}": it has format version ${found}, this tidemark knows versions up to ${known}`,
      { hint: "Use the version of tidemark that wrote it, or a newer one" },
    );
  }
}

/** A manifest, or the repository's own file, that is not what tidemark writes. */
export class ManifestDamageError extends DamageError {
  /** @param object key of the file; `points`: the points that it describes */
  constructor(object: string, points: readonly string[], what: string, details?: ErrorDetails) {
    super("TM_MANIFEST_DAMAGED", `Cannot read manifest "${object}": ${what}`, { object, points }, details);
  }
}

/** A point whose image on the way down to its full one is missing, or does not belong there. */
export class ChainDamageError extends DamageError {
  constructor(object: string, points: readonly string[], what: string, details?: ErrorDetails) {
    super("TM_CHAIN_DAMAGED", `Cannot follow the chain at "${object}": ${what}`, { object, points }, details);
  }
}

/** An image that differs from what its manifest says. */
export class PointImageDamageError extends DamageError {
  constructor(object: string, points: readonly string[], what: string, details?: ErrorDetails) {
    super(
      "TM_POINT_IMAGE_DAMAGED",
      `Cannot trust image "${object}" of ${points.length === 1 ? "point" : "points"} ${points.join(", ")}: ${what}`,
      { object, points },
      details,
    );
  }
}

/** The machine is locked by another run. */
export class LockedError extends BusyError {
  constructor(message: string, details?: ErrorDetails) {
    super("TM_LOCKED", message, details);
  }
}

/** A lock that is not what tidemark writes. */
export class LockUnreadableError extends BusyError {
  constructor(key: string, where: string, what: string, cause: unknown) {
    super("TM_LOCK_UNREADABLE", `Cannot read lock "${key}": ${what}`, {
      cause,
      hint: `A later run takes it over once it has not changed for a minute. If no run uses this machine, remove "${key}" from ${where}`,
    });
  }
}

/** A point cannot be removed: images of others need its. */
export class PointNeededError extends TidemarkError {
  /** @param needing ids of the points whose images need its, or that cannot be read */
  constructor(machine: string, id: string, needing: readonly string[]) {
    const others = needing.join(", ");
    super("TM_POINT_NEEDED", `Cannot remove point ${id} of machine "${machine}": ${others} may need it`);
  }
}

/** This run's lock, or what its work is based on, was taken from it meanwhile: it must not commit. */
export class FencedError extends BusyError {
  constructor(message: string, details?: ErrorDetails) {
    super("TM_FENCED", message, {
      hint: "Was this process suspended for a while? Another run went on without it: start again",
      ...details,
    });
  }
}
