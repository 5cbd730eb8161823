import { availableParallelism } from "node:os";
import PQueue from "p-queue";
import { MiB, type IoOptions } from "../bytes/index.js";
import { Budget, RateLimit } from "../flow/index.js";
import { dependentsOf, pointChain, type DiskManifest, type Repository } from "../repository/index.js";
import { SegmentChecker } from "../transfer/index.js";
import { checkCurrent, type Subject } from "./check-current.js";
import { checkImage } from "./check-image.js";
import { pointsThatRead } from "./exposure.js";
import { dependentsOfPoint, type Problem } from "./problem.js";

/** Bytes that are read and not yet checked. */
const IN_FLIGHT = 128 * MiB;
const DEFAULT_WORKERS = 4;

/** Told how far it has come. */
export interface VerifyObserver {
  /** @param done bytes, of `total` */
  progress?(event: { readonly done: number; readonly total: number }): void;
  problem?(problem: Problem): void;
}

export interface VerifyOptions extends IoOptions {
  readonly repository: Repository;
  /** The machine's name in the repository. */
  readonly machine: string;
  /** Id of a point: it and all that it needs. Default: all points. */
  readonly point?: string | undefined;
  /** Part of the data that is read, 0 to 1, chosen at random; default all. All else is checked in full. */
  readonly share?: number | undefined;
  readonly workers?: number | undefined;
  /** Threads that several verifications share; default: some of its own. */
  readonly checker?: SegmentChecker | undefined;
  /** Bytes a second. */
  readonly bandwidth?: number | undefined;
  readonly observer?: VerifyObserver | undefined;
}

/** What was found. */
export interface VerifyReport {
  /** How many points were looked at. */
  readonly points: number;
  readonly problems: readonly Problem[];
}

/**
 * Verifies what a repository holds of a machine: manifests, how images are linked, lengths, headers, tables, and every
 * frame's checksum. Each image is read once, however many points share it.
 *
 * @throws what keeps it from finding out: that is no damage
 */
export async function verifyMachine(options: VerifyOptions): Promise<VerifyReport> {
  const { repository, machine, share = 1, observer = {}, signal } = options;
  const { points, unreadable } = await repository.survey(machine, { signal });
  const problems: Problem[] = [];
  const report = (problem: Problem): void => {
    problems.push(problem);
    observer.problem?.(problem);
  };
  const wanted = options.point === undefined ? points : pointChain(points, options.point);
  for (const { id, error } of unreadable) {
    const affects = dependentsOfPoint(points, id);
    if (options.point !== undefined && !affects.includes(options.point)) continue;
    report({ point: id, disk: null, problem: error.message, affects });
  }

  const chooseSegments = ({ segments }: DiskManifest): ReadonlySet<number> =>
    new Set(
      [...segments.keys()].filter((index) => segments[index]?.kind !== "data" || Math.random() < share),
    );
  const subjects = wanted.flatMap((point) => point.disks.map((disk): Subject => ({ point, disk })));
  const choices = new Map(subjects.map((subject) => [subject, chooseSegments(subject.disk)]));
  let total = 0;
  for (const [{ disk }, chosen] of choices)
    for (const index of chosen) total += disk.segments[index]?.length ?? 0;
  let done = 0;
  const onProgress = (bytes: number): void =>
    observer.progress?.({ done: (done = Math.min(done + bytes, total)), total });
  onProgress(0);

  const workers = options.workers ?? Math.min(availableParallelism(), DEFAULT_WORKERS);
  const checker = options.checker ?? SegmentChecker.start(workers);
  const rate = new RateLimit(options.bandwidth ?? Infinity);
  const shared = {
    ...{ repository, checker, signal, onProgress },
    inFlight: new Budget(IN_FLIGHT),
    pass: (bytes: number) => rate.pass(bytes, { signal }),
  };
  const check = async (subject: Subject): Promise<void> => {
    const { point, disk } = subject;
    const chosen = choices.get(subject) ?? chooseSegments(disk);
    const choose = (now: DiskManifest): ReadonlySet<number> =>
      now.sha256 === disk.sha256 ? chosen : chooseSegments(now);
    const checkNow = (now: Subject): ReturnType<typeof checkImage> =>
      checkImage({ ...shared, ...now, choose });
    const found = await checkCurrent(repository, subject, checkNow, { signal });
    for (const { what, costs } of found) {
      const affects =
        costs === "image"
          ? dependentsOf(points, point.id, disk.token).map(({ id }) => id)
          : costs === "nothing"
            ? []
            : await pointsThatRead(repository, points, subject, costs, { signal });
      report({ point: point.id, disk: disk.name, problem: what, affects });
    }
  };
  try {
    const queue = new PQueue({ concurrency: workers });
    await queue.addAll(subjects.map((subject) => () => check(subject)));
  } finally {
    if (options.checker === undefined) await checker.stop();
  }
  problems.sort((a, b) => (a.point < b.point ? -1 : a.point > b.point ? 1 : 0));
  return { points: wanted.length + unreadable.length, problems };
}
