/** Decoded clusters, the least recently used of which go first. Whoever asks for one that is being read waits for it. */
export class ClusterCache<Content> {
  readonly #limit: number;
  readonly #clusters = new Map<number, Promise<Content>>();

  /** @param limit most clusters that are kept */
  constructor(limit: number) {
    this.#limit = Math.max(limit, 1);
  }

  /** The content of a cluster, which must not be changed. @param read reads it when it is not there */
  async get(cluster: number, read: () => Promise<Content>): Promise<Content> {
    const found = this.#clusters.get(cluster) ?? read();
    this.#clusters.delete(cluster);
    this.#clusters.set(cluster, found);
    const [oldest] = this.#clusters.keys();
    if (this.#clusters.size > this.#limit && oldest !== undefined) this.#clusters.delete(oldest);
    try {
      return await found;
    } catch (error) {
      // A failure may pass: who asks again, reads again.
      if (this.#clusters.get(cluster) === found) this.#clusters.delete(cluster);
      throw error;
    }
  }

  /** Forgets everything. */
  clear(): void {
    this.#clusters.clear();
  }
}
