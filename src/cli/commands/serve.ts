import { resolve } from "node:path";
import { InvalidArgumentError, Option, type Command } from "commander";
import { messageOf, UsageError } from "../../errors/index.js";
import { formatNbdUri, type NbdAddress } from "../../nbd/index.js";
import { servePoint, type PointServer } from "../../serve/index.js";
import { timeArgument } from "../arguments.js";
import { withRepository, type CliContext, type CommonOptions } from "../context.js";
import { withEvents } from "../render/output.js";
import { pointAt, repositoryAt } from "../repository.js";

interface ServeCommandOptions extends CommonOptions {
  readonly repo?: string;
  readonly at?: Date;
  readonly socket?: string;
  readonly listen?: { readonly host: string; readonly port: number };
}

export function declare(command: Command, context: CliContext): void {
  withRepository(command.argument("<machine[@point]>", "an id, a prefix of one, a name, latest, latest~N"))
    .option("--at <time>", "the newest point at or before this time", timeArgument)
    .addOption(
      new Option("--socket <path>", "a unix socket to be made, for its owner alone").conflicts("listen"),
    )
    .addOption(
      new Option(
        "--listen <host:port>",
        "a TCP address; port 0 finds a free one. Nothing is encrypted",
      ).argParser(listenArgument),
    )
    .addHelpText(
      "after",
      `
Each disk is an export that bears its name. Read-only, until interrupted; 64 connections at a time. For a writable copy put
an overlay on it: qemu-img create -f qcow2 -F raw -b 'nbd+unix:///vda?socket=/run/web.sock' vda.qcow2

EXAMPLES
  tidemark serve web@latest~1 --repo /backup --socket /run/web.sock
  nbdcopy 'nbd+unix:///vda?socket=/run/web.sock' vda.raw`,
    )
    .action(async (reference: string, options: ServeCommandOptions) => {
      await withEvents(
        context,
        options,
        async (emit) => {
          const address = addressOf(options);
          const repository = await repositoryAt(options, context);
          const { point } = await pointAt(repository, reference, options, context);
          const onProblem = (error: unknown): void => {
            emit({ event: "warning", message: messageOf(error) });
            if (options.json !== true) context.stderr.write(`tidemark: warning: ${messageOf(error)}\n`);
          };
          await using server = await servePoint({
            repository,
            point,
            address,
            onProblem,
            signal: context.signal,
          });
          const disks = describe(server);
          emit({ event: "serving", machine: point.machine.name, point: point.id, disks });
          if (options.json !== true && options.quiet !== true) {
            for (const { name, uri } of disks) context.stdout.write(`${name}: ${uri}\n`);
          }
          return await interrupted(context.signal);
        },
        () => ({}),
      );
    });
}

function addressOf({ socket, listen }: ServeCommandOptions): NbdAddress {
  if (socket !== undefined) return { transport: "unix", path: resolve(socket) };
  if (listen !== undefined) return { transport: "tcp", ...listen };
  throw new UsageError("No place to serve at was given", {
    hint: "Give --socket PATH, or --listen HOST:PORT",
  });
}

function listenArgument(text: string): { host: string; port: number } {
  const [, v6, name, digits] = /^(?:\[([^\]]+)\]|([^:[\]]+)):(\d{1,5})$/.exec(text) ?? [];
  const host = v6 ?? name;
  const port = Number(digits);
  if (host === undefined || !(port <= 65_535)) {
    throw new InvalidArgumentError("An address is written HOST:PORT, for example 127.0.0.1:10809.");
  }
  return { host, port };
}

function describe({
  address,
  disks,
}: PointServer): { name: string; size: number; uri: string; contexts: readonly string[] }[] {
  return disks.map(({ name, size, contexts }) => ({
    ...{ name, size, contexts },
    uri: formatNbdUri({ address, exportName: name, tls: false, parameters: {} }),
  }));
}

/** Waits until the user interrupts: that is how serving ends. */
async function interrupted(signal: AbortSignal): Promise<never> {
  return await new Promise<never>((_resolve, reject) => {
    const end = (): void => reject(signal.reason as Error);
    if (signal.aborted) end();
    else signal.addEventListener("abort", end, { once: true });
  });
}
