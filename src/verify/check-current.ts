import type { IoOptions } from "../bytes/index.js";
import { NotFoundError } from "../errors/index.js";
import type { DiskManifest, PointManifest, Repository } from "../repository/index.js";
import { ObjectReplacedError } from "../storage/index.js";

/** How often an image is checked anew whose point was changed meanwhile. */
const ATTEMPTS = 8;

/** One image, and the point that it belongs to. */
export interface Subject {
  readonly point: PointManifest;
  readonly disk: DiskManifest;
}

/**
 * Checks an image against its point as that is now: another run may write the image anew, or remove the point, while it is
 * read. What is found counts only if the point's manifest stayed as it was meanwhile.
 *
 * @param check says what is wrong
 * @returns what is wrong; nothing, when the point is not there any more
 */
export async function checkCurrent<Problem>(
  repository: Repository,
  subject: Subject,
  check: (subject: Subject) => Promise<readonly Problem[]>,
  options: IoOptions = {},
): Promise<readonly Problem[]> {
  const { machine, id } = subject.point;
  let { point, disk } = subject;
  for (let attempt = 1; ; attempt += 1) {
    const isLast = attempt === ATTEMPTS;
    let found: readonly Problem[] | undefined;
    try {
      found = await check({ point, disk });
      if (found.length === 0) return found;
    } catch (error) {
      const mayHavePassed = error instanceof ObjectReplacedError || error instanceof NotFoundError;
      if (!mayHavePassed || isLast) throw error;
    }
    const now = await repository.point(machine.name, id, options);
    const disks = now?.disks.find(({ token }) => token === subject.disk.token);
    if (now === undefined || disks === undefined) return [];
    if (found !== undefined && (isLast || JSON.stringify(now) === JSON.stringify(point))) return found;
    point = now;
    disk = disks;
  }
}
