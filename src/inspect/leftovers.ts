import type { Leftovers } from "../machine/index.js";

/** One thing that a dead run left. */
export interface LeftoverLine {
  readonly kind: "export" | "job" | "node" | "bitmap" | "file";
  readonly name: string;
  /** Id of the run; null for a checkpoint's bitmap. */
  readonly run: string | null;
  /** Nothing on this host, as far as this run directory goes, says whether that run is dead. */
  readonly mayBeAlive: boolean;
}

/** What dead runs left, one thing a line. */
export function leftoverLines({ runs, bitmaps }: Leftovers): LeftoverLine[] {
  const ofRuns = runs.flatMap(({ run, mayBeAlive, exports, jobs, nodes, bitmaps: own, files }) => {
    const lines = (kind: LeftoverLine["kind"], names: readonly string[]): LeftoverLine[] =>
      names.map((name) => ({ kind, name, run, mayBeAlive }));
    return [
      ...lines("export", exports),
      ...lines("job", jobs),
      ...lines("node", nodes),
      ...lines("bitmap", own),
      ...lines("file", files),
    ];
  });
  return [
    ...ofRuns,
    ...bitmaps.map(({ name }) => ({ kind: "bitmap" as const, name, run: null, mayBeAlive: false })),
  ];
}
