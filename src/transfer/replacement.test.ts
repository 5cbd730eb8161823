import { describe, expect, it } from "vitest";
import { ConnectionError, TidemarkError } from "../errors/index.js";
import { MOST_REPLACEMENTS, Replacement } from "./replacement.js";

const lost = (): ConnectionError => new ConnectionError("TM_NBD_EOF", "server closed it");

/** A place whose connection answers as long as it is not among those that break. */
function place(breaking: readonly number[], signal = new AbortController().signal) {
  const steps: string[] = [];
  let current = 0;
  const log = (step: string) => (): Promise<void> => {
    steps.push(step);
    if (step === "greet") current += 1;
    return Promise.resolve();
  };
  const target = { what: 'disk "vda"', open: log("open"), greet: log("greet") };
  const replacement = new Replacement(target, { protect: log("protect"), signal });
  const request = async (): Promise<number> => {
    const asked = current;
    await Promise.resolve();
    if (breaking.includes(asked)) throw lost();
    return asked;
  };
  return { replacement, request, steps };
}

describe("Replacement", () => {
  it("run() replaces a connection once, however many requests it took along, and has it held before a word is said", async () => {
    const { replacement, request, steps } = place([0]);
    const answers = await Promise.all([1, 2, 3].map(() => replacement.run(request)));
    expect(answers).toEqual([1, 1, 1]);
    expect(steps).toEqual(["open", "protect", "greet"]);
  });

  it("run() gives up when a connection was lost too often in all", async () => {
    const { replacement, request, steps } = place([0, 1, 2, 3, 4, 5, 6]);
    await expect(replacement.run(request)).rejects.toMatchObject({ code: "TM_NBD_LOST" });
    expect(steps.filter((step) => step === "greet")).toHaveLength(MOST_REPLACEMENTS);
    await expect(replacement.run(request)).rejects.toMatchObject({ code: "TM_NBD_LOST" });
    expect(steps.filter((step) => step === "greet")).toHaveLength(MOST_REPLACEMENTS);
  });

  it.each(["TM_NBD_REQUEST", "TM_NBD_TIMEOUT", "TM_NBD_CLOSED", "TM_NBD_UNKNOWN_HANDLE"])(
    "run() replaces nothing because of %s",
    async (code) => {
      const { replacement, steps } = place([]);
      const error = new TidemarkError(code, "no");
      await expect(replacement.run(() => Promise.reject(error))).rejects.toBe(error);
      expect(steps).toEqual([]);
    },
  );

  it("run() replaces nothing after the abort: the exports are about to go", async () => {
    const { replacement, request, steps } = place([0], AbortSignal.abort());
    await expect(replacement.run(request)).rejects.toMatchObject({ code: "TM_NBD_EOF" });
    expect(steps).toEqual([]);
  });
});
