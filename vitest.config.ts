import { defineConfig } from "vitest/config";
import { BaseSequencer, type TestSpecification } from "vitest/node";

/** Files that take longest, from a minute on. They come first, so that none is left running alone in the end. */
const LONGEST = [
  "faults/kill-matrix",
  "interop/backup-scenarios",
  "interop/backup-discovery",
  "property/rewrite",
  "interop/chain-commands",
  "property/backup-chain",
  "interop/backup-live",
  "interop/cli-errors",
  "faults/guard-itself",
];

class LongestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const rank = ({ moduleId }: TestSpecification): number => {
      const index = LONGEST.findIndex((name) => moduleId.endsWith(`/test/${name}.test.ts`));
      return index === -1 ? LONGEST.length : index;
    };
    return (await super.sort(files)).sort((a, b) => rank(a) - rank(b));
  }
}

/**
 * Two projects: `unit` (beside the sources, no processes, seconds in all) and `real` (contract, interop,
 * faults, property: real QEMU, real files). Both run in `npm test`.
 */
export default defineConfig({
  test: {
    sequence: { sequencer: LongestFirst },
    projects: [
      {
        test: { name: "unit", include: ["src/**/*.test.ts"], testTimeout: 10_000, hookTimeout: 10_000 },
      },
      {
        test: {
          name: "real",
          include: ["test/**/*.test.ts"],
          globalSetup: ["test/support/build.ts"],
          testTimeout: 120_000,
          hookTimeout: 60_000,
          fileParallelism: true,
          // More than the two cores of CI: for a good part of its time each waits for a guest, a deadline, a disk.
          maxWorkers: 3,
          pool: "forks",
          // One after the other: unit tests say in seconds what is wrong.
          sequence: { groupOrder: 1 },
        },
      },
    ],
  },
});
