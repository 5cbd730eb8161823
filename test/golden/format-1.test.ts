import { cp } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { tidemark } from "../support/cli.js";
import { checkImage, CLEAN, sha256OfFile, toRaw } from "../support/image.js";
import { pointOf } from "../support/rig.js";
import { temporaryDirectory } from "../support/temporary.js";

const FIXTURE = fileURLToPath(new URL("../../fixtures/format-1/repository", import.meta.url));

/** What the machine's own images held at each point, as qemu-img read them then. See the fixture's README. */
const HELD: Readonly<Record<string, Readonly<Record<string, string>>>> = {
  "20261120T134722130Z-dd002b": {
    root: "be6801b6201bc5918dc90e204f837a01eb6c73be7ca98e914bff4554e4de45d0",
    data: "e2c64acb3474618c41c841409a5eb6c6c3ea0539c807db0a6bf722b67b15fc55",
  },
  "20261120T134723751Z-023682": {
    root: "c302391e069bc3053adaf5c71f9bd6fba478dc39732bdae315bd72a2a0410876",
    data: "c73b652b720b655e790638c4168c90603e2904eca9bcb6df6b95cdd18a9f52ab",
  },
  "20261120T134725610Z-ff9c31": {
    root: "917345c6d94225834244dfc3ebeee470dad04196d27f39c7c250fd12641ac82e",
    data: "1b7c65f4bb3b5e2471316210122866995b842f725159679b3a894ceb6eb834d6",
  },
};

describe("a repository of format 1, as the first version wrote it", () => {
  it("is listed, verified, restored, gone on from and thinned out", async () => {
    await using directory = await temporaryDirectory();
    const repository = directory.file("repository");
    await cp(FIXTURE, repository, { recursive: true });
    const env = { TIDEMARK_REPO: repository, TIDEMARK_RUNTIME_DIR: directory.path };
    const cli = async (...args: string[]): ReturnType<typeof tidemark> => await tidemark(args, { env });

    const list = (await cli("list", "--json")).json() as { id: string; name: string | null }[];
    expect(list.map(({ id }) => id)).toEqual(Object.keys(HELD));
    expect(list.map(({ name }) => name)).toEqual(["first", null, "third"]);
    await cli("verify");

    const expectHeld = async (id: string): Promise<void> => {
      const restored = directory.file(`${id}-${Math.random()}`);
      await cli("restore", `web@${id}`, "--to-dir", restored);
      for (const [disk, sha256] of Object.entries(HELD[id]!)) {
        const image = `${repository}/web/${id}/${disk}.qcow2`;
        const { report, ...found } = await checkImage(image);
        expect(found, report).toEqual(CLEAN);
        expect(await sha256OfFile(`${restored}/${disk}.raw`)).toBe(sha256);
        expect(await sha256OfFile(await toRaw(image, "qcow2", directory.file("raw")))).toBe(sha256);
      }
    };
    for (const id of Object.keys(HELD)) await expectHeld(id);

    // Its hashes are compared with: nothing differs.
    const images = directory.file("images");
    await cli("restore", "web@third", "--to-dir", images);
    const names = ["root", "data"].flatMap((disk) => ["--image", `${disk}=${images}/${disk}.raw`]);
    const next = pointOf((await cli("backup", "--machine", "web", ...names, "--json")).events());
    expect(next.disks).toMatchObject([
      { kind: "incremental", parent: list[2]!.id, dataClusters: 0, zeroClusters: 0 },
      { kind: "incremental", parent: list[2]!.id, dataClusters: 0, zeroClusters: 0 },
    ]);
    await cli("delete", `web@${list[1]!.id}`);
    await cli("delete", "web@first");
    await expectHeld(list[2]!.id);
    await cli("verify");
  });
});
