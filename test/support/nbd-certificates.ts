import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { run } from "./tools.js";

/** An authority of a test's own, with its key, in a directory. Made with openssl. */
export class CertificateAuthority {
  readonly #directory: string;
  #serial = 0;

  private constructor(directory: string) {
    this.#directory = directory;
  }

  static async create(directory: string): Promise<CertificateAuthority> {
    await mkdir(directory, { recursive: true });
    const files = ["-keyout", join(directory, "key.pem"), "-out", join(directory, "cert.pem")];
    await run("openssl", [
      ...["req", "-x509", "-nodes", ...KEY, ...files, "-days", "3", "-subj", "/CN=tidemark test authority"],
    ]);
    return new CertificateAuthority(directory);
  }

  /**
   * Writes a directory as qemu-nbd, nbdkit and libnbd want it: `ca-cert.pem`, `<role>-cert.pem`, `<role>-key.pem`.
   *
   * @param options.names subject alternative names: "DNS:localhost", "IP:127.0.0.1"
   * @param options.days how long the certificate is good from now on; negative: it has expired
   * @param options.trust the authority whose certificate becomes `ca-cert.pem`; default: this one
   */
  async issue(
    directory: string,
    role: "server" | "client",
    options: {
      readonly names?: readonly string[];
      readonly days?: number;
      readonly trust?: CertificateAuthority;
    } = {},
  ): Promise<string> {
    const { names = ["DNS:localhost"], days = 3, trust = this } = options;
    await mkdir(directory, { recursive: true });
    const file = (name: string): string => join(directory, `${role}-${name}`);
    const subject = ["-subj", `/CN=tidemark test ${role}`];
    await run("openssl", [
      ...[
        "req",
        "-nodes",
        "-new",
        ...KEY,
        "-keyout",
        file("key.pem"),
        "-out",
        file("request.pem"),
        ...subject,
      ],
    ]);
    const usage = role === "server" ? "serverAuth" : "clientAuth";
    const extensions = `subjectAltName=${names.join(",")}\nextendedKeyUsage=${usage}\n`;
    await writeFile(file("extensions"), extensions);
    this.#serial += 1;
    await run("openssl", [
      ...["x509", "-req", "-in", file("request.pem"), "-out", file("cert.pem"), "-days", String(days)],
      ...["-CA", join(this.#directory, "cert.pem"), "-CAkey", join(this.#directory, "key.pem")],
      ...["-set_serial", String(this.#serial), "-extfile", file("extensions")],
    ]);
    await trust.trustIn(directory);
    return directory;
  }

  /** Writes this authority's certificate as `ca-cert.pem`. */
  async trustIn(directory: string): Promise<string> {
    await mkdir(directory, { recursive: true });
    await run("cp", [join(this.#directory, "cert.pem"), join(directory, "ca-cert.pem")]);
    return directory;
  }
}

const KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];
