import type { IoOptions } from "../../bytes/index.js";
import { DamageError } from "../../errors/index.js";
import { repositoryTag } from "../../point/index.js";
import type { MachineIdentity } from "../source.js";

/** A point of the repository, as far as checkpoints are judged by it. */
export interface CataloguePoint {
  readonly id: string;
  /** `uuid`: null when the machine had none. */
  readonly machine: { readonly uuid: string | null };
  /** How many checkpoints stay in the machine with it, its own included; absent: 1. */
  readonly keepCheckpoints?: number | undefined;
  readonly disks: readonly {
    readonly name: string;
    readonly token: string;
    readonly virtualSize: number;
    readonly clusterSize: number;
  }[];
}

/**
 * Looks a checkpoint's point up in the repository. `undefined` says that it is definitely not there; whoever
 * cannot tell throws, because bitmaps are removed on this word.
 */
export type Catalogue = (checkpoint: string) => Promise<CataloguePoint | undefined>;

/** Which bitmaps are this repository's, and what it says about them. */
export interface Checkpoints {
  readonly repositoryTag: string;
  readonly catalogue: Catalogue;
  /**
   * Whether another machine of the repository has a checkpoint's point, or may have it: a machine can be backed up under
   * two names. Without it nobody can tell. Throws as the catalogue does.
   */
  readonly isElsewhere?: ((checkpoint: string) => Promise<boolean>) | undefined;
}

/** What the choice of a base depends on. */
export interface BaseContext extends Checkpoints {
  /** Bytes per cluster of the images to be written. */
  readonly clusterSize: number;
  readonly machineUuid: string | null;
  /** See `MachineIdentity.wasAway`. */
  readonly machineWasAway?: boolean | undefined;
  /** The machine's points, oldest first: they tell a disk that lost its checkpoint from a new one. */
  readonly points?: readonly CataloguePoint[] | undefined;
  /** Id of the only checkpoint to start from, whatever newer ones there are; default the newest. */
  readonly since?: string | undefined;
}

/** Where points are looked up: a repository. */
export interface PointSource {
  readonly id: string;
  machines(options?: IoOptions): Promise<readonly string[]>;
  point(machine: string, id: string, options?: IoOptions): Promise<CataloguePoint | undefined>;
}

/** @param machine its name in the repository */
export function checkpointsOf(repository: PointSource, machine: string, io: IoOptions = {}): Checkpoints {
  return {
    repositoryTag: repositoryTag(repository.id),
    catalogue: (id) => repository.point(machine, id, io),
    async isElsewhere(id) {
      for (const other of await repository.machines(io)) {
        if (other === machine) continue;
        if ((await lookUp((wanted) => repository.point(other, wanted, io), id)) !== undefined) return true;
      }
      return false;
    },
  };
}

/** All that the choice of bases depends on, for whoever backs up and for whoever says before what will happen. */
export function baseContextOf(
  checkpoints: Checkpoints,
  identity: Pick<MachineIdentity, "uuid" | "wasAway">,
  { points, clusterSize }: { readonly points: readonly CataloguePoint[]; readonly clusterSize: number },
): BaseContext {
  const { uuid: machineUuid, wasAway: machineWasAway } = identity;
  return { ...checkpoints, clusterSize, machineUuid, machineWasAway, points };
}

/** A catalogue that answers from points that were read already, and asks another one about all others. */
export function catalogueOf(points: Iterable<CataloguePoint>, otherwise: Catalogue): Catalogue {
  const known = new Map([...points].map((point) => [point.id, point]));
  return async (id) => known.get(id) ?? (await otherwise(id));
}

/** Machines without a uuid cannot be told apart by it: their name in the repository has to do. */
export function isOfMachine(point: CataloguePoint, uuid: string | null): boolean {
  return point.machine.uuid === null || uuid === null || point.machine.uuid === uuid;
}

/** A point whose manifest is damaged is neither there nor absent. Any other error is the caller's. */
export async function lookUp(
  catalogue: Catalogue,
  checkpoint: string,
): Promise<CataloguePoint | "unreadable" | undefined> {
  try {
    return await catalogue(checkpoint);
  } catch (error) {
    if (error instanceof DamageError) return "unreadable";
    throw error;
  }
}
