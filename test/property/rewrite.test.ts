import { mkdir, rm } from "node:fs/promises";
import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { RangeReader, SegmentChecker } from "../../src/transfer/index.js";
import { fraction, propertyRuns } from "../support/seed.js";
import { temporaryDirectory } from "../support/temporary.js";
import type { Counts } from "./chain-onlookers.js";
import { story } from "./chain-story.js";
import { ChainWorld } from "./chain-world.js";

const { numRuns, seed, path, isRepeated } = propertyRuns(300, 6000);
/** Milliseconds for all stories, and for one of them, on a slow machine. */
const LEAST_DEADLINE = 900_000;
const STORY_DEADLINE = 3000;

describe("delete, flatten, prune, compact and edit", () => {
  it(
    "keep every point that is kept as it reads, in random trees, whenever they die and whoever reads",
    async () => {
      await using directory = await temporaryDirectory();
      const threads = { checker: SegmentChecker.start(1), ranges: RangeReader.start(1) };
      const counts: Counts = {
        crashes: 0,
        refusals: 0,
        fenced: 0,
        reads: 0,
        replaced: 0,
        lost: 0,
        accusations: 0,
      };
      let number = 0;
      const property = fc.asyncProperty(story, fraction, async (steps, place) => {
        number += 1;
        const root = directory.file(String(number));
        await mkdir(root);
        const world = await ChainWorld.create(root, threads, counts);
        for (const step of steps) await world.apply(step);
        await world.expectOthersAgree();
        await world.expectAccused(place);
        await rm(root, { recursive: true });
      });
      try {
        const result = await fc.check(property, { numRuns, seed, ...(path === undefined ? {} : { path }) });
        const again = `TIDEMARK_SEED=${result.seed},${result.counterexamplePath ?? ""}`;
        if (result.failed)
          throw new Error(`${again}\n${fc.defaultReportMessage(result)}`, { cause: result.errorInstance });
      } finally {
        await Promise.all([threads.checker.stop(), threads.ranges.stop()]);
      }
      // What never happened was not tried.
      if (!isRepeated)
        for (const [what, count] of Object.entries(counts)) expect(count, what).toBeGreaterThan(numRuns / 50);
    },
    Math.max(LEAST_DEADLINE, numRuns * STORY_DEADLINE),
  );
});
