import { createCipheriv, randomBytes } from "node:crypto";
import { HASH_BYTES, KEY_BYTES } from "./layout.js";

/** One nonce for all clusters: the tags are compared, never shown to whoever chooses the content. */
const NONCE = Buffer.alloc(12);

/** A random key for a new chain. */
export function newHashKey(): Buffer {
  return randomBytes(KEY_BYTES);
}

/**
 * Hashes clusters: the tag of AES-128-GCM over nothing, the cluster being its additional data (GMAC, NIST SP 800-38D).
 * Two different clusters of 64 KiB have one tag for at most one key in 2^116, and it is several times as fast as SHA-256.
 */
export class ClusterHasher {
  readonly #key: Uint8Array;

  /** @param key of the chain, 16 bytes */
  constructor(key: Uint8Array) {
    if (key.length !== KEY_BYTES) throw new RangeError(`a key has ${KEY_BYTES} bytes, not ${key.length}`);
    this.#key = key;
  }

  /** The hash of a whole cluster, zero-padded by the caller where the disk ends inside it. */
  hash(cluster: Uint8Array): Buffer {
    const cipher = createCipheriv("aes-128-gcm", this.#key, NONCE, { authTagLength: HASH_BYTES });
    cipher.setAAD(cluster);
    cipher.final();
    return cipher.getAuthTag();
  }
}
