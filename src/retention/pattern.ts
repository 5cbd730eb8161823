/**
 * Whether a name matches a pattern as shells know them: `*` stands for any text, `?` for one character; all
 * others for themselves, upper and lower case told apart.
 */
export function matchesPattern(name: string, pattern: string): boolean {
  const characters = Array.from(name);
  const wanted = Array.from(pattern);
  let at = 0;
  let next = 0;
  /** Where the last `*` stands, and what it may take one character more of, should the rest not match. */
  let star: { readonly next: number; at: number } | undefined;
  while (at < characters.length) {
    if (wanted[next] === "*") {
      star = { next: (next += 1), at };
    } else if (wanted[next] === "?" || wanted[next] === characters[at]) {
      at += 1;
      next += 1;
    } else if (star !== undefined) {
      at = star.at += 1;
      next = star.next;
    } else {
      return false;
    }
  }
  return wanted.slice(next).every((character) => character === "*");
}
