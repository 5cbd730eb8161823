import type { IoOptions } from "../../bytes/index.js";
import { parseRunObject, type RunObjectKind } from "../../point/index.js";
import type { BlockNode, ExportInfo, JobInfo, QmpClient } from "../../qmp/index.js";

/** What a run has in QEMU at this moment, found by name. */
export interface RunObjects {
  readonly run: string;
  readonly exports: readonly string[];
  readonly jobs: readonly string[];
  /** Scratch nodes before the file nodes they stand on. */
  readonly nodes: readonly string[];
  /** Files of those nodes. */
  readonly files: readonly string[];
  /** Transient bitmaps. */
  readonly bitmaps: readonly { readonly node: string; readonly name: string }[];
}

/** What every run has in QEMU, and what is in there of others that matters to us. */
export interface QemuInventory {
  readonly runs: readonly RunObjects[];
  /** NBD exports of other programs. */
  readonly foreignExports: readonly string[];
}

/** Lists what bears a run's name. Changes nothing. */
export async function takeInventory(qmp: QmpClient, options: IoOptions = {}): Promise<QemuInventory> {
  const [exports, jobs, nodes] = await Promise.all([
    qmp.execute("query-block-exports", undefined, options),
    qmp.execute("query-jobs", undefined, options),
    qmp.execute("query-named-block-nodes", { flat: true }, options),
  ]);
  return sortInventory(exports, jobs, nodes);
}

/** The objects of one run; empty lists when it has none. */
export function objectsOf(inventory: QemuInventory, run: string): RunObjects {
  return (
    inventory.runs.find((objects) => objects.run === run) ?? {
      run,
      exports: [],
      jobs: [],
      nodes: [],
      files: [],
      bitmaps: [],
    }
  );
}

/** Sorts QEMU's lists by run. */
export function sortInventory(
  exports: readonly ExportInfo[],
  jobs: readonly JobInfo[],
  nodes: readonly BlockNode[],
): QemuInventory {
  const bitmaps = nodes.flatMap(({ name: node, bitmaps: carried }) =>
    carried.map(({ name }) => ({ node, name })),
  );
  const names = [...exports, ...jobs].map(({ id }) => id);
  const all = [...names, ...nodes.map(({ name }) => name), ...bitmaps.map(({ name }) => name)];
  const runs = new Set(all.map((name) => parseRunObject(name)?.run).filter((run) => run !== undefined));
  return {
    runs: [...runs].map((run) => {
      const own = (name: string, ...kinds: RunObjectKind[]): boolean => {
        const object = parseRunObject(name);
        return object?.run === run && kinds.includes(object.kind);
      };
      const scratch = nodes.filter(({ name }) => own(name, "scr"));
      const files = nodes.filter(({ name }) => own(name, "file"));
      return {
        run,
        exports: exports.filter(({ id }) => own(id, "exp")).map(({ id }) => id),
        jobs: jobs.filter(({ id }) => own(id, "job", "new")).map(({ id }) => id),
        nodes: [...scratch, ...files].map(({ name }) => name),
        files: files.map(({ file }) => file),
        bitmaps: bitmaps.filter(({ name }) => own(name, "tmp")),
      };
    }),
    foreignExports: exports
      .filter(({ id, type }) => type === "nbd" && parseRunObject(id) === undefined)
      .map(({ id }) => id),
  };
}
