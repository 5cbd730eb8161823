// A backup by a program of its own that has chosen to go without a guard, to be killed.
import { backup } from "../../src/backup/index.js";
import { parseQmpAddress } from "../../src/qmp/index.js";
import { openRepository } from "../../src/repository/index.js";
import { LocalStorage } from "../../src/storage/index.js";

const [repository = "", socket = "", runDirectory = ""] = process.argv.slice(2);
await backup({
  repository: await openRepository(await LocalStorage.open(repository)),
  machine: "vm",
  source: {
    ...{ kind: "live", address: parseQmpAddress(socket), runDirectory },
    ...{ guard: false, allowUnguarded: true },
  },
  full: true,
  bandwidth: 500_000,
  tidemarkVersion: "test",
  observer: { progress: ({ done }) => process.stdout.write(done > 0 ? "copying\n" : "") },
});
