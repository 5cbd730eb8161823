import { mkdtemp, mkdir, readdir, rm, utimes, writeFile } from "node:fs/promises";
import { tmpdir, uptime } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import type { Scratch } from "./scratch.js";
import { removeStaleScratch } from "./stale-scratch.js";

let directory: string;
let runs: string;

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), "scratch-"));
  runs = join(directory, "runs");
  await mkdir(runs);
});

afterEach(async () => {
  await rm(directory, { recursive: true });
});

/** A file that was last written some seconds before (or after) this host was started. */
async function plant(name: string, beforeBoot: number): Promise<void> {
  const file = join(directory, name);
  await writeFile(file, "old data");
  const time = new Date(Date.now() - (uptime() + beforeBoot) * 1000);
  await utimes(file, time, time);
}

async function left(): Promise<string[]> {
  const scratch = { file: join(directory, "tm-00000000-0-scr.qcow2") } as Scratch;
  await removeStaleScratch([scratch, scratch], runs);
  return (await readdir(directory)).sort();
}

describe("removeStaleScratch()", () => {
  it("removes scratch files from before this host's start, and nothing else", async () => {
    await plant("tm-aaaaaaaa-0-scr.qcow2", 60);
    await plant("tm-bbbbbbbb-11-scr.qcow2", 86_400);
    const others = ["tm-cccccccc-0-file.qcow2", "tm-cccccccc-0-scr.raw", "tm-x-0-scr.qcow2", "web.qcow2"];
    for (const name of others) await plant(name, 86_400);
    expect(await left()).toEqual(["runs", ...others].sort());
  });

  it("leaves those of this host's runs since then, and of runs that have a state file", async () => {
    await plant("tm-aaaaaaaa-0-scr.qcow2", -60);
    await plant("tm-bbbbbbbb-0-scr.qcow2", 60);
    await writeFile(join(runs, "bbbbbbbb.json"), "");
    expect(await left()).toEqual(["runs", "tm-aaaaaaaa-0-scr.qcow2", "tm-bbbbbbbb-0-scr.qcow2"]);
  });
});
