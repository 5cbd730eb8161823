import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { GiB, KiB, MiB } from "../../src/bytes/index.js";
import { createImage } from "../support/image.js";
import { fraction } from "../support/seed.js";
import { blockCommit, blockdevSnapshot, blockStream, snapshotSync } from "../support/snapshots.js";
import { qcow2, Story } from "../support/story.js";
import { run } from "../support/tools.js";

const IS_SOAK = process.env["TIDEMARK_SOAK"] === "1";
/** Stories in all. */
const RUNS = Number(process.env["TIDEMARK_CHAIN_RUNS"] ?? (IS_SOAK ? 60 : 2));
/** To see a failure again: the seed that its report names. */
const SEED = Number(process.env["TIDEMARK_CHAIN_SEED"] ?? Date.now() % GiB);
/** Milliseconds that one may take on a slow machine. */
const RUN_DEADLINE = 240_000;

const SECTOR = 512;
const SIZE = 2 * MiB;

/** What an administrator, another program, the guest or a misfortune does; `backup` is ours. */
const KINDS = [
  ...["snapshot-sync", "blockdev-snapshot", "commit", "commit-middle", "stream", "stream-all", "resize"],
  ...["restart", "kill", "revert", "overlay", "img-commit", "img-rebase"],
] as const;

interface Step {
  readonly kind: string;
  /** 0 to 1 each: which of the images it concerns. */
  readonly one: number;
  readonly two: number;
  readonly clusterSize: string;
  readonly writes: readonly Write[];
  readonly thenBackup: boolean;
}

interface Write {
  readonly command: string;
  readonly place: number;
  readonly length: number;
}

const write: fc.Arbitrary<Write> = fc.record({
  command: fc.constantFrom("write -P 7", "write -P 9", "write -z", "write -z -u", "discard"),
  place: fraction,
  length: fc.integer({ min: 1, max: (200 * KiB) / SECTOR }).map((sectors) => sectors * SECTOR),
});

const step: fc.Arbitrary<Step> = fc.record({
  kind: fc.oneof(
    { weight: 1, arbitrary: fc.constantFrom("snapshot-sync", "blockdev-snapshot", "overlay") },
    { weight: 2, arbitrary: fc.constantFrom(...KINDS) },
  ),
  one: fraction,
  two: fraction,
  clusterSize: fc.constantFrom("4k", "64k", "256k"),
  writes: fc.array(write, { maxLength: 3 }),
  thenBackup: fc.boolean(),
});

/** A machine with one disk, and the images that it consists of. */
class Chain {
  readonly story: Story;
  /** From the bottom to the one that the guest writes to. */
  readonly #images: string[];
  #made = 0;
  /** Increments from a bitmap below an overlay, of machines that have ended. */
  #followed = 0;

  constructor(story: Story, base: string) {
    this.story = story;
    this.#images = [base];
  }

  get top(): string {
    return this.#images.at(-1) ?? "";
  }

  /** How many increments were taken from a bitmap below an overlay. */
  get followed(): number {
    return this.#followed + this.#countFollowed();
  }

  async start(): Promise<void> {
    await this.story.start([qcow2(this.top, { nodeName: `root${this.#made}` })], { deadline: RUN_DEADLINE });
  }

  async write({ command, place, length }: Write): Promise<void> {
    const size = await this.#size();
    const usable = Math.min(length, size);
    const offset = Math.floor((place * (size - usable)) / SECTOR) * SECTOR;
    await this.story.write(0, `${command} ${offset} ${usable}`);
  }

  /** Does a step, if the chain is long enough for it. */
  async do({ kind, one, two, clusterSize }: Step): Promise<void> {
    const { machine } = this.story.rig;
    const count = this.#images.length;
    const pick = (below: number): number => Math.floor(one * below);
    switch (kind) {
      case "snapshot-sync": {
        const node = await this.#node(count - 1);
        const { file, name } = this.#next();
        await snapshotSync(machine, node, file, name);
        this.#images.push(file);
        return;
      }
      case "blockdev-snapshot": {
        const node = await this.#node(count - 1);
        const { file, name } = this.#next();
        const backing = { path: this.top, format: "qcow2" } as const;
        await blockdevSnapshot(machine, node, backing, file, name, await this.#size());
        this.#images.push(file);
        return;
      }
      case "commit": {
        if (count < 2) return;
        const base = pick(count - 1);
        await blockCommit(machine, {
          device: await this.#node(count - 1),
          "base-node": await this.#node(base),
        });
        await this.#drop(base + 1, count - 1 - base);
        return;
      }
      case "commit-middle": {
        if (count < 3) return;
        const base = pick(count - 2);
        const top = base + 1 + Math.floor(two * (count - 2 - base));
        await blockCommit(machine, {
          device: await this.#node(count - 1),
          "top-node": await this.#node(top),
          "base-node": await this.#node(base),
        });
        await this.#drop(base + 1, top - base);
        return;
      }
      case "stream": {
        if (count < 3) return;
        const base = pick(count - 2);
        const device = base + 2 + Math.floor(two * (count - 2 - base));
        await blockStream(machine, {
          device: await this.#node(device),
          "base-node": await this.#node(base),
        });
        await this.#drop(base + 1, device - base - 1);
        return;
      }
      case "stream-all": {
        if (count < 4) return;
        await blockStream(machine, { device: await this.#node(count - 1) });
        await this.#drop(0, count - 1);
        return;
      }
      case "resize": {
        const size = Math.ceil((SIZE / 2 + one * SIZE) / SECTOR) * SECTOR;
        await machine.monitor.execute("block_resize", { "node-name": await this.#node(count - 1), size });
        return;
      }
      default:
        await this.#whileOff(kind, pick, clusterSize);
    }
  }

  /** Takes images out of the chain that a job merged. Nodes that were made by name remain, and are in the way. */
  async #drop(first: number, count: number): Promise<void> {
    for (const file of this.#images.splice(first, count).reverse()) {
      const node = (await this.#nodes()).find((item) => item.drv === "qcow2" && item.file === file);
      if (node === undefined || node["node-name"].startsWith("#")) continue;
      const { monitor } = this.story.rig.machine;
      await monitor.execute("blockdev-del", { "node-name": node["node-name"] });
    }
  }

  async #whileOff(kind: string, pick: (below: number) => number, clusterSize: string): Promise<void> {
    const { machine } = this.story.rig;
    const count = this.#images.length;
    const size = await this.#size();
    this.#followed += this.#countFollowed();
    await (kind === "kill" ? machine.kill() : machine.quit());
    if (kind === "revert") this.#images.splice(1 + pick(count));
    if (kind === "overlay") {
      const backing = { path: this.top, format: "qcow2" } as const;
      const { file } = this.#next();
      await createImage(file, "qcow2", size, { backing, create: { cluster_size: clusterSize } });
      this.#images.push(file);
    }
    if (kind === "img-commit" && count > 1) await run("qemu-img", ["commit", "-q", "-f", "qcow2", this.top]);
    if (kind === "img-rebase" && count > 2) {
      const base = pick(count - 2);
      const backing = ["-F", "qcow2", "-b", this.#images[base] ?? ""];
      await run("qemu-img", ["rebase", "-q", "-f", "qcow2", ...backing, this.top]);
      this.#images.splice(base + 1, count - 2 - base);
    }
    this.#made += 1;
    await this.start();
  }

  #next(): { file: string; name: string } {
    this.#made += 1;
    return { file: this.story.rig.directory.file(`over${this.#made}.qcow2`), name: `over${this.#made}` };
  }

  async #nodes(): Promise<
    { "node-name": string; drv: string; file: string; image: { "virtual-size": number } }[]
  > {
    return await this.story.rig.machine.monitor.execute("query-named-block-nodes");
  }

  async #node(index: number): Promise<string> {
    const file = this.#images[index];
    const node = (await this.#nodes()).find((item) => item.drv === "qcow2" && item.file === file);
    if (node === undefined) throw new Error(`No node has ${file ?? "image"} ${index}`);
    return node["node-name"];
  }

  async #size(): Promise<number> {
    const top = await this.#node(this.#images.length - 1);
    const node = (await this.#nodes()).find((item) => item["node-name"] === top);
    return node?.image["virtual-size"] ?? 0;
  }

  /** A bitmap is merged by its node and name when the node is another than the disk's own. */
  #countFollowed(): number {
    return this.story.rig.proxy.commands.filter(
      ({ name, arguments: given }) =>
        name === "transaction" && JSON.stringify(given).includes(`"bitmaps":[{`),
    ).length;
  }
}

let followed = 0;

async function tell(steps: readonly Step[]): Promise<void> {
  await using story = await Story.begin();
  const base = await story.rig.image("base.qcow2", "qcow2", SIZE);
  const chain = new Chain(story, base);
  await chain.start();
  await story.write(0, `write -P 1 0 ${SIZE}`);
  await story.backup({ vd0: base });
  for (const one of steps) {
    for (const item of one.writes) await chain.write(item);
    await chain.do(one).catch((error: unknown) => {
      throw new Error(`${one.kind}: ${String(error)}`, { cause: error });
    });
    if (one.thenBackup) await story.backup({ vd0: chain.top });
  }
  await story.backup({ vd0: chain.top });
  followed += chain.followed;
  await story.proveAll();
}

describe("backup and restore", () => {
  it(
    "agree with the machine whatever happens to its snapshots between two points",
    async () => {
      const steps = fc.array(step, { minLength: 4, maxLength: 10, size: "max" });
      await fc.assert(fc.asyncProperty(steps, tell), { numRuns: RUNS, seed: SEED, endOnFailure: true });
      if (RUNS > 1) expect(followed).toBeGreaterThan(0);
    },
    RUNS * RUN_DEADLINE,
  );
});
