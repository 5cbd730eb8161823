import { UsageError } from "../errors/index.js";
import { requirePointText, standingPoints, type PointManifest } from "../repository/index.js";
import { requirePoint, onChain, type ChangeChainOptions } from "./session.js";

export interface EditOptions extends Omit<ChangeChainOptions, "dryRun" | "bandwidth" | "observer"> {
  /** Id. */
  readonly point: string;
  /** "" takes the name away; undefined leaves it. */
  readonly name?: string | undefined;
  /** As `name`. */
  readonly description?: string | undefined;
}

/**
 * Gives a point another name or description.
 *
 * @returns its manifest
 * @throws {UsageError} for a name that another point of the machine has
 * @throws {NotFoundError} when there is no such point
 */
export async function editPoint(options: EditOptions): Promise<PointManifest> {
  const { repository, machine, point: id, name, description } = options;
  requirePointText({ name: name === "" ? undefined : name, description });
  return await onChain(options, async (points, context) => {
    requirePoint(points, id, machine);
    const holder = standingPoints(points).find(
      (point) => point.id !== id && name !== undefined && name !== "" && point.name === name,
    );
    if (holder !== undefined) {
      throw new UsageError(`Point ${holder.id} has the name ${JSON.stringify(name)} already`, {
        hint: "Choose another name, or take it away from that point first",
      });
    }
    const text = (given: string | undefined, had: string | null): string | null =>
      given === undefined ? had : given === "" ? null : given;
    const change = (point: PointManifest): PointManifest => ({
      ...point,
      name: text(name, point.name),
      description: text(description, point.description),
    });
    return await repository.changePoint(machine, id, change, context);
  });
}
