import type { Command } from "commander";
import { initRepository } from "../../repository/index.js";
import { LocalStorage } from "../../storage/index.js";
import { repositoryOf, withRepository, type CliContext, type CommonOptions } from "../context.js";
import { report } from "../render/output.js";
import { directoryOf, requireNoFile } from "../repository.js";

export function declare(command: Command, context: CliContext): void {
  withRepository(command)
    .addHelpText("after", "\nEXAMPLES\n  tidemark init --repo /backup\n  TIDEMARK_REPO=/backup tidemark init")
    .action(async (options: CommonOptions & { repo?: string }) => {
      const path = directoryOf(repositoryOf(options, context));
      await requireNoFile(path);
      const storage = await LocalStorage.open(path, { create: true });
      const { id } = await initRepository(storage, { signal: context.signal });
      const document = { repository: { id, path } };
      report(context, options, document, () => `Made repository ${id} in ${path}\n`);
    });
}
