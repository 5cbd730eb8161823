import { describe, expect, it } from "vitest";
import { Movement } from "./movement.js";

type Event = readonly [done: number, total: number];

function observed(): { readonly movement: Movement; readonly events: Event[] } {
  const events: Event[] = [];
  const observer = {
    progress: ({ done, total }: { done: number; total: number }) => events.push([done, total]),
  };
  return { movement: new Movement({ observer }), events };
}

describe("Movement", () => {
  it("counts image after image, and what an estimate was wrong by at the end of each", async () => {
    const { movement, events } = observed();
    movement.begin(300);
    movement.beginImage(100);
    await movement.pass(60);
    await movement.pass(60);
    movement.endImage();
    movement.beginImage(200);
    await movement.pass(50);
    movement.endImage();
    expect(events).toEqual([
      [0, 300],
      [60, 300],
      [100, 300],
      [150, 300],
      [300, 300],
    ]);
  });

  it("takes what did not have to be moved from the total, not from the rate", async () => {
    const { movement, events } = observed();
    movement.begin(1100);
    movement.beginImage(1100);
    movement.spare(1000);
    await movement.pass(40);
    movement.endImage();
    expect(events).toEqual([
      [0, 1100],
      [0, 100],
      [40, 100],
      [100, 100],
    ]);
  });

  it("ends the wait for its rate when it is aborted", async () => {
    const abort = new AbortController();
    const movement = new Movement({ bandwidth: 1, signal: abort.signal });
    await movement.pass(1000);
    const waiting = movement.pass(1);
    const reason = new Error("enough");
    abort.abort(reason);
    await expect(waiting).rejects.toBe(reason);
  });
});
