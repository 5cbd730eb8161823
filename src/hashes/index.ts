/**
 * Hashes of an image's clusters, in a file beside it: what a later backup compares a disk with, so that it need not
 * read what is stored (docs/format.md, docs/decisions/003-cluster-hashes.md).
 *
 * - hash: 128 bits of a cluster's content, keyed; the key is a chain's own.
 * - block: the hashes of a range of clusters, with what the image holds of each: data, zero, or nothing.
 * - window: what a chain of images holds of a range of clusters, each resolved down the chain.
 */
export { CLUSTER_DATA, HashChain, type HashWindow } from "./chain.js";
export { ClusterHasher, newHashKey } from "./cluster-hash.js";
export { HashDamageError } from "./errors.js";
export { ExpectedClusters } from "./expected.js";
export { HASH_BYTES, HASHES_HEADER_BYTES, hashesLength } from "./layout.js";
export { HashReader, type HashFileFacts } from "./reader.js";
export { HashWriter, type HashesSummary } from "./writer.js";
