import type { BlockGraph, BlockNode } from "../../qmp/index.js";

/**
 * Drivers that pass a disk's content through unchanged (`is_filter` in QEMU), with the edge that leads to
 * what they filter. Jobs insert the last four.
 */
const FILTERED_CHILD: ReadonlyMap<string, string> = new Map([
  ["throttle", "file"],
  ["compress", "file"],
  ["preallocate", "file"],
  ["blkdebug", "image"],
  ["blklogwrites", "file"],
  ["copy-on-read", "file"],
  ["copy-before-write", "file"],
  ["mirror_top", "backing"],
  ["commit_top", "backing"],
]);

/** The block graph with its nodes at hand, to walk on. */
export class NodeGraph {
  readonly #nodes: ReadonlyMap<string, BlockNode>;
  readonly #ids: ReadonlyMap<string, number>;
  readonly #graph: BlockGraph;

  constructor(nodes: readonly BlockNode[], graph: BlockGraph) {
    this.#nodes = new Map(nodes.map((node) => [node.name, node]));
    this.#graph = graph;
    this.#ids = new Map(
      graph.nodes.filter(({ type }) => type === "block-driver").map(({ id, name }) => [name, id]),
    );
  }

  /**
   * From the node that a device uses down through filters to the top format node, both included.
   * The last one carries the bitmaps. Empty when a node on the way is gone.
   */
  filterChain(root: string): BlockNode[] {
    const chain: BlockNode[] = [];
    for (let node = this.#nodes.get(root); node !== undefined;) {
      chain.push(node);
      const role = FILTERED_CHILD.get(node.driver);
      if (role === undefined) return chain;
      node = this.child(node.name, role);
    }
    return [];
  }

  /** Whether a node only passes on what is below it. */
  static isFilter(node: BlockNode): boolean {
    return FILTERED_CHILD.has(node.driver);
  }

  /** The nodes below a node, nearest first: images, and filters among them. */
  backingChain(name: string): BlockNode[] {
    const chain: BlockNode[] = [];
    for (let node = this.child(name, "backing"); node !== undefined;) {
      if (chain.includes(node)) break;
      chain.push(node);
      const role = FILTERED_CHILD.get(node.driver) ?? "backing";
      node = this.child(node.name, role);
    }
    return chain;
  }

  /** The protocol node below a format node: where the image's file is. */
  protocolNode(name: string): BlockNode | undefined {
    let node = this.#nodes.get(name);
    for (let below = node; below !== undefined; below = this.child(below.name, "file")) node = below;
    return node;
  }

  child(name: string, role: string): BlockNode | undefined {
    const id = this.#ids.get(name);
    const edge = this.#graph.edges.find((item) => item.parent === id && item.name === role);
    const below = this.#graph.nodes.find((item) => item.id === edge?.child);
    return below === undefined ? undefined : this.#nodes.get(below.name);
  }

  /** Names of the jobs that work on a node. */
  jobsOn(name: string): string[] {
    const id = this.#ids.get(name);
    const parents = new Set(
      this.#graph.edges.filter((edge) => edge.child === id).map(({ parent }) => parent),
    );
    return this.#graph.nodes
      .filter((node) => node.type === "block-job" && parents.has(node.id))
      .map((node) => node.name);
  }
}
