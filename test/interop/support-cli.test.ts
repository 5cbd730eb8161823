import { describe, expect, it } from "vitest";
import { runTidemark, startTidemark, tidemark } from "../support/cli.js";

describe("runTidemark()", () => {
  it("runs the command line from its sources and gives code and both outputs", async () => {
    const help = await runTidemark(["--help"]);
    expect(help).toMatchObject({ code: 0, signal: null, stderr: "" });
    expect(help.stdout).toContain("Usage: tidemark");
    const wrong = await runTidemark(["no-such-command"], { cwd: "/" });
    expect(wrong).toMatchObject({ code: 2, stdout: "" });
    expect(wrong.stderr).toContain("no-such-command");
  });

  it("reads the error of a failed run as JSON", async () => {
    const failed = await runTidemark(["no-such-command", "--json"]);
    expect(failed.json()).toMatchObject({ event: "error", exitCode: 2 });
    expect(failed.events()).toEqual([]);
  });
});

describe("tidemark()", () => {
  it("throws with what was printed when the run fails", async () => {
    await expect(tidemark(["no-such-command"])).rejects.toThrow(/code 2\n.*no-such-command/s);
  });
});

describe("startTidemark()", () => {
  it("ends with the signal that killed it, and so does the wait for an event", async () => {
    await using running = startTidemark(["--help", "--json"]);
    const event = running.nextEvent(() => true);
    running.kill("SIGKILL");
    await expect(event).rejects.toThrow("SIGKILL");
    expect(await running.ended).toMatchObject({ code: null, signal: "SIGKILL" });
  });
});
