import { once } from "node:events";
import { copyFile } from "node:fs/promises";
import { createServer, type Server, type Socket } from "node:net";
import { withDeadline } from "../../src/flow/index.js";
import { run } from "./tools.js";

/** UEFI firmware (OVMF) of Debian's package `ovmf`: its code, and variables that nobody has changed yet. */
const CODE = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const VARIABLES = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/** Of the variables that tests set. */
const VENDOR = "6f0c2d7e-4a51-4b0e-9d35-5a1f7c8e2b90";

// eslint-disable-next-line no-control-regex -- escape sequences are what it is about
const ESCAPE_SEQUENCE = /\x1b\[[0-9;=]*[A-Za-z]/g;
const PROMPT = /Shell> $/;

/** Makes an image of firmware variables as a machine is delivered with. @returns its path */
export async function createVariables(path: string, format: "raw" | "qcow2"): Promise<string> {
  if (format === "raw") await copyFile(VARIABLES, path);
  else await run("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", VARIABLES, path]);
  return path;
}

/**
 * The UEFI shell of a machine, on its serial port. Make it before the machine, whose firmware then starts the shell
 * since there is nothing else to boot.
 */
export class FirmwareShell implements AsyncDisposable {
  /** For QEMU: firmware, its variables on node `nvram`, and the serial port. */
  readonly machineArguments: readonly string[];
  readonly #server: Server;
  readonly #connected: Promise<Socket>;
  readonly #listeners = new Set<() => void>();
  #text = "";

  private constructor(server: Server, path: string, variables: string, format: "raw" | "qcow2") {
    this.#server = server;
    this.#connected = once(server, "connection").then(([socket]) => {
      (socket as Socket).setEncoding("latin1").on("data", (text: string) => {
        this.#text += text;
        for (const listener of this.#listeners) listener();
      });
      // A machine that is killed takes its serial port along.
      (socket as Socket).on("error", () => undefined);
      return socket as Socket;
    });
    this.machineArguments = [
      ...["-m", "128", "-machine", "pflash0=firmware,pflash1=nvram"],
      ...["-blockdev", `driver=raw,node-name=firmware,read-only=on,file.driver=file,file.filename=${CODE}`],
      ...["-blockdev", `driver=${format},node-name=nvram,file.driver=file,file.filename=${variables}`],
      ...["-chardev", `socket,id=serial,path=${path}`, "-serial", "chardev:serial"],
    ];
  }

  /**
   * @param path of a socket to make
   * @param variables image of the firmware's variables
   */
  static async listen(path: string, variables: string, format: "raw" | "qcow2"): Promise<FirmwareShell> {
    const server = createServer().listen(path);
    await once(server, "listening");
    return new FirmwareShell(server, path, variables, format);
  }

  /**
   * Waits until the firmware of a machine has started its shell.
   *
   * @param reset resets the machine: on a busy host the firmware sometimes finds that its console takes too long
   *   ("Device Error"), and starts nothing
   */
  async start(reset: () => Promise<unknown>): Promise<void> {
    const socket = await withDeadline(this.#connected, 20_000, "Wait for the machine's serial port");
    for (let resets = 0; ; resets += 1) {
      const text = await this.#until(/to skip startup\.nsh|No bootable option/);
      if (text.includes("to skip startup.nsh")) break;
      if (resets === 3) throw new Error(`The firmware does not start its shell: ${text.slice(-500)}`);
      this.#text = "";
      await reset();
    }
    // Any other key than ESC: it does not wait the rest of its five seconds.
    socket.write(" ");
    await this.#until(PROMPT);
  }

  /** Sets a variable that outlives the machine: by the firmware's own code, which writes to its flash. */
  async setVariable(name: string, hex: string): Promise<void> {
    await this.#command(`setvar ${name} -guid ${VENDOR} -bs -rt -nv =${hex}`);
  }

  /** What a variable holds, in hex; undefined when it is not there. */
  async variable(name: string): Promise<string | undefined> {
    const answer = await this.#command(`setvar ${name} -guid ${VENDOR}`);
    if (/Unable to get/.test(answer)) return undefined;
    const [, bytes] = /Bytes\s+((?:[0-9A-F]{2} )+)/i.exec(answer) ?? [];
    if (bytes === undefined) throw new Error(`The UEFI shell says of variable ${name}: ${answer}`);
    return bytes.replaceAll(" ", "").toLowerCase();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await new Promise((resolve) => {
      this.#server.close(resolve);
      this.#connected.then(
        (socket) => socket.destroy(),
        () => undefined,
      );
    });
  }

  async #command(line: string): Promise<string> {
    const socket = await this.#connected;
    this.#text = "";
    socket.write(`${line}\r`);
    const answer = await this.#until(PROMPT);
    return answer.slice(answer.indexOf("\n") + 1);
  }

  /** @returns all that came until then, plain */
  async #until(wanted: RegExp): Promise<string> {
    const found = new Promise<string>((resolve) => {
      const look = (): void => {
        const text = this.#text.replaceAll(ESCAPE_SEQUENCE, "");
        if (!wanted.test(text)) return;
        this.#listeners.delete(look);
        resolve(text);
      };
      this.#listeners.add(look);
      look();
    });
    return await withDeadline(found, 40_000, `Wait for ${wanted.source} of the UEFI shell`).catch(
      (error: unknown) => {
        throw new Error(`${String(error)}; so far: ${this.#text.slice(-500)}`, { cause: error });
      },
    );
  }
}
