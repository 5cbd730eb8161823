import fc from "fast-check";

/** From 0 to just under 1, evenly: `fc.double` takes each exponent as often as any other, and most of what it makes is next to 0. */
export const fraction: fc.Arbitrary<number> = fc.nat(2 ** 20 - 1).map((part) => part / 2 ** 20);

/**
 * How a property is run: how often, and from which seed. A failure names the seed in a form that, given as
 * `TIDEMARK_SEED=…`, repeats it; `TIDEMARK_RUNS=…` says how often.
 *
 * @param runs as long as nothing else is said; `soak`: in a soak run
 */
export function propertyRuns(runs: number, soak: number): PropertyRuns {
  const [seed, path] = (process.env["TIDEMARK_SEED"] ?? "").split(",");
  const wanted = process.env["TIDEMARK_RUNS"];
  const usual = process.env["TIDEMARK_SOAK"] === undefined ? runs : soak;
  return {
    numRuns: wanted === undefined ? usual : Number(wanted),
    seed: seed === undefined || seed === "" ? Date.now() % 2 ** 31 : Number(seed),
    ...(path === undefined ? {} : { path }),
    isRepeated: path !== undefined,
  };
}

export interface PropertyRuns {
  readonly numRuns: number;
  readonly seed: number;
  /** Which of the seed's runs, in fast-check's notation. */
  readonly path?: string;
  /** One run is repeated: whatever is counted over all of them says nothing. */
  readonly isRepeated: boolean;
}
