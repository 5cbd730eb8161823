/**
 * A run of its own, as a process for tests to suspend and kill: `repository-run.ts <directory> lock|write`.
 * It prints one line for each thing that happened, and goes on to its end once its standard input ends.
 */
import { once } from "node:events";
import { BusyError } from "../../src/errors/index.js";
import { openRepository } from "../../src/repository/index.js";
import { LocalStorage } from "../../src/storage/index.js";
import { pointId, writeImages } from "../interop/repository-points.js";

const [directory = "", task = ""] = process.argv.slice(2);
const say = (line: string): void => void process.stdout.write(`${line}\n`);

async function holdLock(): Promise<void> {
  const repository = await openRepository(await LocalStorage.open(directory));
  say("ready");
  await once(process.stdin, "data");
  try {
    const lock = await repository.lockMachine("web");
    await lock.verify();
    say("held");
    await once(process.stdin, "end");
    await lock.release();
    say("released");
  } catch (error) {
    if (!(error instanceof BusyError)) throw error;
    say(`refused ${error.code}`);
    process.stdin.destroy();
  }
}

/** Writes one image whole and another in part, as a backup that is killed before its point is committed. */
async function writeHalf(): Promise<void> {
  const repository = await openRepository(await LocalStorage.open(directory));
  await repository.lockMachine("web");
  const disk = {
    name: "sda",
    token: "00c0ffee",
    virtualSize: 1 << 20,
    data: new Map([[0, Buffer.from("x")]]),
  };
  await writeImages(repository, { machine: "web", id: pointId(7), disks: [disk] });
  const image = { machine: "web", point: pointId(7), disk: "sdb", token: "00c0ffef" };
  const writer = await repository.createImage({ ...image, virtualSize: 1 << 20, clusterSize: 65_536 });
  writer.zero(0, 1);
  say("written");
  await once(process.stdin, "end");
}

await (task === "lock" ? holdLock() : writeHalf());
