import { randomUUID } from "node:crypto";
import { z } from "zod";
import { KiB, type IoOptions } from "../bytes/index.js";
import { NotFoundError, UsageError } from "../errors/index.js";
import { ObjectNotFoundError, type Storage } from "../storage/index.js";
import { ManifestDamageError } from "./errors.js";
import { REPOSITORY_KEY } from "./layout.js";
import { firstIssue, parseJson, requireKnownFormat } from "./manifest-codec.js";

/** The version of the repository's format that this code makes, and the newest that it opens. */
export const REPOSITORY_FORMAT = 1;

const MAX_BYTES = 64 * KiB;

/** A fresh ext4 file system is not quite empty. */
const FOLDERS_OF_THE_SYSTEM: ReadonlySet<string> = new Set(["lost+found"]);

const schema = z
  .looseObject({
    format: z.literal(REPOSITORY_FORMAT),
    id: z.uuid(),
    created: z.iso.datetime(),
    /** What the storage can be trusted with, as tried out when the repository was made. */
    storage: z.looseObject({ ifAbsent: z.boolean() }).readonly(),
  })
  .readonly();

/** The repository's own file, `tidemark.json`. */
export type RepositoryFile = z.output<typeof schema>;

/**
 * Makes the repository's own file.
 *
 * @throws {UsageError} when a repository is there already, or other things are
 */
export async function createRepositoryFile(
  storage: Storage,
  now: Date,
  options: IoOptions,
): Promise<RepositoryFile> {
  await requireEmpty(storage, options);
  const file: RepositoryFile = {
    format: REPOSITORY_FORMAT,
    id: randomUUID(),
    created: now.toISOString(),
    storage: { ifAbsent: true },
  };
  const isFirst = await storage.put(REPOSITORY_KEY, encode(file), { ifAbsent: true, ...options });
  if (!isFirst) throw alreadyThere(storage);
  // A storage that would let a second one in is told apart here; what it then cannot do is known from the start.
  const careless: RepositoryFile = { ...file, storage: { ifAbsent: false } };
  const isHonoured = !(await storage.put(REPOSITORY_KEY, encode(careless), { ifAbsent: true, ...options }));
  return isHonoured ? file : careless;
}

/**
 * Reads the repository's own file.
 *
 * @throws {NotFoundError} TM_REPOSITORY_NOT_FOUND when there is no repository
 * @throws {NewerFormatError} when a newer tidemark made it
 */
export async function readRepositoryFile(storage: Storage, options: IoOptions): Promise<RepositoryFile> {
  const damage = (what: string, cause: unknown): ManifestDamageError =>
    new ManifestDamageError(REPOSITORY_KEY, [], what, { cause });
  let bytes: Buffer;
  try {
    bytes = await storage.get(REPOSITORY_KEY, { maxLength: MAX_BYTES, ...options });
  } catch (error) {
    if (!(error instanceof ObjectNotFoundError)) throw error;
    throw new NotFoundError("TM_REPOSITORY_NOT_FOUND", `Cannot find a repository in ${storage.description}`, {
      cause: error,
      hint: "Check the place given with --repo, and that it is mounted; `tidemark init` makes a new repository",
    });
  }
  const value = parseJson(bytes, damage);
  requireKnownFormat(value, REPOSITORY_KEY, REPOSITORY_FORMAT);
  const parsed = schema.safeParse(value);
  if (parsed.success) return parsed.data;
  throw damage(firstIssue(parsed.error), parsed.error);
}

async function requireEmpty(storage: Storage, options: IoOptions): Promise<void> {
  const refuse = (found: string): UsageError =>
    new UsageError(`Cannot make a repository in ${storage.description}: "${found}" is there`, {
      hint: "Use an empty place for a new repository",
    });
  for await (const folder of storage.listFolders("", options)) {
    if (!FOLDERS_OF_THE_SYSTEM.has(folder)) throw await refusal(folder);
  }
  for await (const { key } of storage.list("", options)) throw await refusal(key);

  async function refusal(found: string): Promise<UsageError> {
    const isRepository = await storage.get(REPOSITORY_KEY, { maxLength: MAX_BYTES, ...options }).then(
      () => true,
      (error: unknown) => {
        if (error instanceof ObjectNotFoundError) return false;
        throw error;
      },
    );
    return isRepository ? alreadyThere(storage) : refuse(found);
  }
}

function alreadyThere(storage: Storage): UsageError {
  return new UsageError(`Cannot make a repository in ${storage.description}: there is one already`, {
    hint: "Use it as it is, or choose an empty place for a new one",
  });
}

function encode(file: RepositoryFile): Buffer {
  return Buffer.from(`${JSON.stringify(file, null, 2)}\n`, "utf8");
}
