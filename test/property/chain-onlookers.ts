import { expect } from "vitest";
import { NotFoundError, TidemarkError } from "../../src/errors/index.js";
import type { PointChain, Repository } from "../../src/repository/index.js";
import { ServedDisk } from "../../src/serve/served-disk.js";
import { ObjectReplacedError } from "../../src/storage/index.js";
import type { RangeReader } from "../../src/transfer/index.js";
import { randomOf, type Turns } from "../support/turns.js";
import { standing, type Model } from "./chain-model.js";
import { firstDifference } from "./chain-oracle.js";

/** What happened in all stories: what never happened was not tried. */
export interface Counts {
  crashes: number;
  refusals: number;
  /** Suspended runs that found that they had lost their lock. */
  fenced: number;
  /** Reads side by side with a command. */
  reads: number;
  /** ... that found the chain rewritten under them. */
  replaced: number;
  /** ... that failed as their point was removed. */
  lost: number;
  accusations: number;
}

const machine = "web";
/** Few clusters: they are to be read again. */
const CACHE_BYTES = 64 * 1024;

/** Those who read while a command rewrites what they read: every byte that they get is of their point, or they get a clear error. */
export class Onlookers {
  readonly #ranges: RangeReader;
  readonly #repository: Repository;
  readonly #before: Model;
  readonly #after: Model;
  readonly #random: () => number;
  readonly #counts: Counts;
  readonly #turns: Turns;

  /**
   * @param turns that the command and they take
   * @param after what the command leaves: these points can be read at any time
   */
  constructor(
    ranges: RangeReader,
    repository: Repository,
    turns: Turns,
    before: Model,
    after: Model,
    seed: number,
    counts: Counts,
  ) {
    this.#ranges = ranges;
    this.#turns = turns;
    this.#repository = repository;
    this.#before = before;
    this.#after = after;
    this.#random = randomOf(seed + 1);
    this.#counts = counts;
  }

  /** Reads until the command has ended. @throws what it throws */
  async during(command: Promise<unknown>): Promise<void> {
    let isOver = false;
    const ended = command.finally(() => (isOver = true));
    // Seen below; a reader's failure comes first.
    ended.catch(() => undefined);
    const reading = [this.#serve(() => isOver), this.#read(() => isOver), this.#open(() => isOver)];
    try {
      await Promise.all(reading);
    } finally {
      await Promise.allSettled([...reading, ended]);
    }
    await ended;
  }

  /** One who serves a point all the time. */
  async #serve(isOver: () => boolean): Promise<void> {
    const { id, token, content, disk } = this.#choose();
    const isKept = this.#after.get(id)?.isTombstone === false;
    let served: ServedDisk | undefined;
    try {
      const point = (await this.#repository.point(machine, id)) ?? undefined;
      if (point === undefined) throw new NotFoundError("TM_POINT_NOT_FOUND", "it is gone");
      const shared = { repository: this.#repository, ranges: this.#ranges, cacheBytes: CACHE_BYTES };
      served = await ServedDisk.open(point, disk, shared);
      do {
        const { offset, length } = this.#range(content.length);
        const parts: Uint8Array[] = [];
        for await (const piece of served.read(offset, length, {}))
          parts.push(piece.bytes ?? Buffer.alloc(piece.length));
        this.#expect(Buffer.concat(parts), length, content, offset, `served ${id} ${token}`);
        // What needs no storage would leave nobody else a turn.
        await this.#turns.next();
      } while (!isOver());
    } catch (error) {
      if (isKept || !(error instanceof TidemarkError)) throw error;
      this.#counts.lost += 1;
    } finally {
      await served?.close();
    }
  }

  /** One who has opened a chain and knows of no changes. */
  async #read(isOver: () => boolean): Promise<void> {
    const { id, content, disk } = this.#choose();
    const isKept = this.#after.get(id)?.isTombstone === false;
    let chain: PointChain | undefined;
    try {
      chain = await this.#repository.openChain(machine, id, disk);
      do {
        const { offset, length } = this.#range(content.length);
        this.#expect(await chain.chain.read(offset, length), length, content, offset, `open ${id} ${disk}`);
        // What needs no storage would leave nobody else a turn.
        await this.#turns.next();
      } while (!isOver());
    } catch (error) {
      if (error instanceof ObjectReplacedError) {
        this.#counts.replaced += 1;
      } else if (isKept || !(error instanceof TidemarkError)) throw error;
      else this.#counts.lost += 1;
    } finally {
      await chain?.close();
    }
  }

  /** One who looks for points, and opens one after the other. */
  async #open(isOver: () => boolean): Promise<void> {
    do {
      const { points, unreadable } = await this.#repository.survey(machine);
      expect(unreadable).toEqual([]);
      const ids = new Set(points.map(({ id }) => id));
      for (const { id } of standing(this.#after)) expect(ids).toContain(id);
      const { id, content, disk } = this.#choose();
      let chain: PointChain | undefined;
      try {
        chain = await this.#repository.openChain(machine, id, disk);
        const { offset, length } = this.#range(content.length);
        this.#expect(await chain.chain.read(offset, length), length, content, offset, `opened ${id} ${disk}`);
      } catch (error) {
        if (error instanceof ObjectReplacedError) this.#counts.replaced += 1;
        else if (this.#after.get(id)?.isTombstone === false || !(error instanceof TidemarkError)) throw error;
        else this.#counts.lost += 1;
      } finally {
        await chain?.close();
      }
      await this.#turns.next();
    } while (!isOver());
  }

  #choose(): { id: string; token: string; content: Buffer; disk: string } {
    const all = [...this.#before.values()].flatMap(({ id, disks }) =>
      [...disks].map(([token, { content, name }]) => ({ id, token, content, disk: name })),
    );
    return all[Math.floor(this.#random() * all.length)]!;
  }

  #range(size: number): { offset: number; length: number } {
    const offset = Math.floor(this.#random() * size);
    return { offset, length: Math.floor(this.#random() * (size - offset)) };
  }

  #expect(found: Buffer, length: number, content: Buffer, offset: number, what: string): void {
    this.#counts.reads += 1;
    const expected = content.subarray(offset, offset + length);
    if (!found.equals(expected))
      throw new Error(`${what} at ${offset} reads differently, ${firstDifference(found, expected)}`);
  }
}
