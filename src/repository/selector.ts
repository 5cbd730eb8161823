import { NotFoundError, UsageError } from "../errors/index.js";
import { requireMachineName } from "./layout.js";
import { currentPoint, sortPoints, standingPoints, type PointNode } from "./tree.js";

/** A point as a user writes it: `MACHINE@POINT`, or `MACHINE` alone for its latest. */
export interface PointReference {
  readonly machine: string;
  /** An id, a unique prefix of one, a name, `latest` or `latest~N`; undefined when none was written. */
  readonly selector: string | undefined;
}

/** What selecting needs to know of a point; a PointManifest is one. */
export interface SelectablePoint extends PointNode {
  readonly name: string | null;
  readonly created: string;
  /** It was forgotten: nothing selects it, but the way from a point to its ancestors may lead over it. */
  readonly tombstone?: boolean | undefined;
}

const LATEST = /^latest(?:~(\d{1,9}))?$/;

/** Whether a selector is relative to the newest point. */
export function isLatest(selector: string): boolean {
  return LATEST.test(selector);
}

/** Reads `MACHINE@POINT` or `MACHINE`. @throws {UsageError} when it is neither */
export function parsePointReference(text: string): PointReference {
  const at = text.indexOf("@");
  if (at < 0) return { machine: requireMachineName(text), selector: undefined };
  const selector = text.slice(at + 1);
  if (selector === "") {
    throw new UsageError(`${JSON.stringify(text)} names no point behind the "@"`, {
      hint: "Write MACHINE@POINT, or MACHINE alone for its latest point",
    });
  }
  return { machine: requireMachineName(text.slice(0, at)), selector };
}

/**
 * Finds the point that a user means.
 *
 * @param all points of the machine, those that were forgotten among them
 * @param selector as in PointReference; undefined means the latest
 * @param options `at`: the newest point at or before this time, instead of a selector; `machine`: for messages
 * @throws {UsageError} when more than one point is meant, or both a selector and a time are given
 * @throws {NotFoundError} when none is
 */
export function selectPoint<P extends SelectablePoint>(
  all: readonly P[],
  selector?: string,
  options: { readonly at?: Date | undefined; readonly machine?: string } = {},
): P {
  const points = standingPoints(all);
  const of = options.machine === undefined ? "" : ` of machine "${options.machine}"`;
  if (points.length === 0) {
    throw new NotFoundError("TM_POINT_NOT_FOUND", `Cannot find any point${of}`, {
      hint: "`tidemark list` shows the machines and points of a repository",
    });
  }
  if (options.at !== undefined) {
    if (selector !== undefined)
      throw new UsageError(`Cannot look for both point "${selector}" and a time: give one of them`);
    return pointAt(points, options.at, of);
  }
  const latest = LATEST.exec(selector ?? "latest");
  if (latest !== null) return ancestor(all, Number(latest[1] ?? 0), of);
  return pointNamed(points, selector ?? "", of);
}

function pointAt<P extends SelectablePoint>(points: readonly P[], at: Date, of: string): P {
  const found = currentPoint(points.filter((point) => new Date(point.created) <= at));
  if (found !== undefined) return found;
  const [oldest] = sortPoints(points);
  throw new NotFoundError("TM_POINT_NOT_FOUND", `Cannot find a point${of} at or before ${at.toISOString()}`, {
    hint: oldest === undefined ? undefined : `The oldest one was made at ${oldest.created}`,
  });
}

function ancestor<P extends SelectablePoint>(points: readonly P[], generations: number, of: string): P {
  let found = currentPoint(standingPoints(points));
  let climbed = 0;
  for (let next = found; climbed < generations && next !== undefined;) {
    const parent: string | null = next.parent;
    next = points.find((point) => point.id === parent);
    if (next === undefined || next.tombstone === true) continue;
    found = next;
    climbed += 1;
  }
  if (found !== undefined && climbed === generations) return found;
  throw new NotFoundError(
    "TM_POINT_NOT_FOUND",
    `Cannot find point "latest~${generations}"${of}: the latest one has ${climbed} before it`,
  );
}

function pointNamed<P extends SelectablePoint>(points: readonly P[], selector: string, of: string): P {
  const found = sortPoints(
    points.filter((point) => point.name === selector || point.id.startsWith(selector)),
  );
  const [first, second] = found;
  if (first !== undefined && second === undefined) return first;
  const exact = found.find((point) => point.id === selector);
  if (exact !== undefined) return exact;
  if (first === undefined) {
    throw new NotFoundError("TM_POINT_NOT_FOUND", `Cannot find point "${selector}"${of}`, {
      hint: "`tidemark list` shows the points; an id, the beginning of one, a name, latest or latest~N selects one",
    });
  }
  const shown = found
    .slice(0, 10)
    .map((point) => (point.name === null ? point.id : `${point.id} (${point.name})`));
  const more = found.length > shown.length ? ` and ${found.length - shown.length} more` : "";
  throw new UsageError(`Cannot tell which point${of} "${selector}" means: ${shown.join(", ")}${more}`, {
    hint: "Write more of the id",
  });
}
