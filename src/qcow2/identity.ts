/** What an image says about itself, so that one that lost its manifest still tells where it belongs. */
export interface ImageIdentity {
  /** Id of the point that the image belongs to. */
  readonly point: string;
  /** Id of the point that the image is an increment of; null for a full image. */
  readonly parent: string | null;
  readonly machine: string;
  readonly disk: string;
  /** The disk's token: ties the image to the bitmaps of its chain. */
  readonly token: string;
}

/** The data of our header extension: the identity as JSON text in UTF-8. */
export function encodeIdentity(identity: ImageIdentity): Buffer {
  const { point, parent, machine, disk, token } = identity;
  return Buffer.from(JSON.stringify({ point, parent, machine, disk, token }), "utf8");
}

/**
 * Reads the data of our header extension; fields it does not know are ignored.
 *
 * @param data bounded by the header's cluster
 * @throws {SyntaxError | TypeError} when it is not the JSON text of an identity
 */
export function decodeIdentity(data: Buffer): ImageIdentity {
  const value: unknown = JSON.parse(data.toString("utf8"));
  if (typeof value !== "object" || value === null) throw new TypeError("identity is not an object");
  const fields = value as Record<string, unknown>;
  const parent = fields["parent"];
  return {
    point: text(fields, "point"),
    parent: parent === null ? null : text(fields, "parent"),
    machine: text(fields, "machine"),
    disk: text(fields, "disk"),
    token: text(fields, "token"),
  };
}

function text(fields: Record<string, unknown>, name: keyof ImageIdentity): string {
  const value = fields[name];
  if (typeof value !== "string") throw new TypeError(`identity has no text "${name}"`);
  return value;
}
