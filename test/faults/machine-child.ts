// A run of its own process, to be killed: freezes increments of all disks, says so, and goes on when told.
import { createInterface } from "node:readline";
import { chooseBases, openLiveMachine, type CataloguePoint } from "../../src/machine/index.js";
import { newDiskToken, newPointId } from "../../src/point/index.js";
import { parseQmpAddress } from "../../src/qmp/index.js";
import { CLUSTER, REPOSITORY } from "../interop/machine-fixture.js";

const [socket = "", runDirectory = "", points = "[]"] = process.argv.slice(2);
const catalogue = JSON.parse(points) as CataloguePoint[];
const machine = await openLiveMachine({ address: parseQmpAddress(socket), runDirectory, guard: false });
const bases = await chooseBases(machine.disks, {
  repositoryTag: REPOSITORY,
  clusterSize: CLUSTER,
  catalogue: (id) => Promise.resolve(catalogue.find((point) => point.id === id)),
  machineUuid: null,
});
const frozen = await machine.freeze({
  checkpoint: newPointId(new Date(), catalogue.at(-1)?.id),
  repositoryTag: REPOSITORY,
  maxConnections: 4,
  disks: [...bases].map(([disk, choice]) => ({
    disk,
    token: choice.token ?? newDiskToken(),
    base: choice.kind === "incremental" ? choice.base : undefined,
    clusterSize: CLUSTER,
  })),
});
process.stdout.write("frozen\n");
for await (const line of createInterface({ input: process.stdin })) {
  if (line !== "end") continue;
  await frozen.release(() => Promise.resolve());
  await frozen.keep();
  await machine.close();
  process.stdout.write("ended\n");
  break;
}
process.stdin.destroy();
