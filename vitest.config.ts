import { defineConfig } from "vitest/config";

/**
 * Two projects: `unit` (beside the sources, no processes, seconds in all) and `real` (contract, interop,
 * faults, property: real QEMU, real files). Both run in `npm test`.
 */
export default defineConfig({
  test: {
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
          maxWorkers: 2,
          pool: "forks",
          // One after the other: unit tests say in seconds what is wrong.
          sequence: { groupOrder: 1 },
        },
      },
    ],
  },
});
