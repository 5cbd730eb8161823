// The house rule, by machine: a file imports from its own folder or from the index.ts of a folder on a
// lower row. Seen: import, export from, type imports, multi-line forms, import(), and files named by
// new URL("./x.js", import.meta.url), which is how workers and child processes are started.
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, relative, resolve, sep } from "node:path";
import ts from "typescript";

const ROWS = [
  ["errors"],
  ["bytes", "flow", "process"],
  ["point", "extent", "retention"],
  ["qmp", "nbd", "qcow2", "hashes", "storage", "guest-agent"],
  ["machine", "repository"],
  ["transfer"],
  ["backup", "restore", "verify", "serve", "rewrite", "copy", "inspect"],
  ["config"],
  ["cli", "index.ts"],
];

const src = resolve(process.argv[2] ?? "src");
const rowOf = new Map(ROWS.flatMap((folders, row) => folders.map((folder) => [folder, row])));
const folderOf = (file) => relative(src, file).split(sep)[0] ?? "";
const problems = [];

for (const entry of readdirSync(src, { recursive: true, withFileTypes: true })) {
  if (!entry.isFile() || !entry.name.endsWith(".ts") || entry.name.endsWith(".test.ts")) continue;
  const file = join(entry.parentPath, entry.name);
  const text = readFileSync(file, "utf8");
  const specifiers = ts.preProcessFile(text, true, true).importedFiles.map((found) => found.fileName);
  for (const match of text.matchAll(/new URL\(\s*["'`](\.[^"'`]+)["'`]\s*,\s*import\.meta\.url/g))
    specifiers.push(match[1]);

  const folder = folderOf(file);
  const row = rowOf.get(folder);
  if (row === undefined) problems.push(`${relative(".", file)}: folder "${folder}" stands on no row`);
  for (const specifier of specifiers) {
    if (!specifier.startsWith(".")) continue;
    const target = resolve(dirname(file), specifier);
    if (relative(src, target).startsWith("..")) continue;
    const targetFolder = folderOf(target);
    if (targetFolder === folder || row === undefined) continue;
    const targetRow = rowOf.get(targetFolder);
    const say = (why) => problems.push(`${relative(".", file)}: imports "${specifier}": ${why}`);
    if (targetRow === undefined) say("not a known folder");
    else if (targetRow >= row) say(targetRow === row ? "a neighbour on its own row" : "a higher row");
    else if (relative(src, target) !== join(targetFolder, "index.js"))
      say("reaches past the folder's index.ts");
  }
}

for (const problem of problems) console.error(problem);
console.log(problems.length === 0 ? "layers: clean" : `layers: ${problems.length} problems`);
process.exitCode = problems.length === 0 ? 0 : 1;
