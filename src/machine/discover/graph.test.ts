import { describe, expect, it } from "vitest";
import type { BlockGraph, BlockNode } from "../../qmp/index.js";
import { NodeGraph } from "./graph.js";

/** Builds a graph from lines "parent -role-> child"; drivers by name. */
function graphOf(drivers: Record<string, string>, edges: readonly string[]): NodeGraph {
  const names = Object.keys(drivers);
  const nodes = names.map((name): BlockNode => ({
    ...{ name, driver: drivers[name] ?? "", readOnly: false, file: `/${name}`, bitmaps: [] },
    image: { virtualSize: 1, format: "", filename: "", compat: undefined, clusterSize: 0 },
  }));
  const graph: BlockGraph = {
    nodes: names.map((name, id) => ({
      ...{ id, name },
      type: drivers[name] === "job" ? "block-job" : "block-driver",
    })),
    edges: edges.map((edge) => {
      const [parent = "", role = "", child = ""] = edge.split(/ -|-> /);
      return { parent: names.indexOf(parent), child: names.indexOf(child), name: role };
    }),
  };
  return new NodeGraph(
    nodes.filter(({ driver }) => driver !== "job"),
    graph,
  );
}

const names = (nodes: readonly BlockNode[]): string[] => nodes.map(({ name }) => name);

describe("NodeGraph.filterChain()", () => {
  it("goes through filters of users and jobs to the format node, by each filter's own edge", () => {
    const graph = graphOf(
      { t: "throttle", cbw: "copy-before-write", m: "mirror_top", q: "qcow2", scratch: "qcow2", f: "file" },
      ["t -file-> cbw", "cbw -target-> scratch", "cbw -file-> m", "m -backing-> q", "q -file-> f"],
    );
    expect(names(graph.filterChain("t"))).toEqual(["t", "cbw", "m", "q"]);
    expect(graph.protocolNode("q")?.name).toBe("f");
  });

  it("is empty when the graph changed under the query", () => {
    expect(graphOf({ t: "throttle" }, []).filterChain("t")).toEqual([]);
    expect(graphOf({}, []).filterChain("gone")).toEqual([]);
  });
});

describe("NodeGraph.backingChain()", () => {
  it("lists the images below, through filters between them", () => {
    const graph = graphOf({ top: "qcow2", cor: "copy-on-read", middle: "qcow2", base: "raw" }, [
      "top -backing-> cor",
      "cor -file-> middle",
      "middle -backing-> base",
    ]);
    expect(names(graph.backingChain("top"))).toEqual(["cor", "middle", "base"]);
  });
});

describe("NodeGraph.jobsOn()", () => {
  it("names the jobs that stand on a node", () => {
    const graph = graphOf({ q: "qcow2", backup: "job", other: "job", x: "qcow2" }, [
      "backup -main node-> q",
      "other -main node-> x",
    ]);
    expect(graph.jobsOn("q")).toEqual(["backup"]);
  });
});
