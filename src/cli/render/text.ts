/** What a terminal shows two columns wide: East Asian wide and fullwidth letters, and pictures. */
const WIDE =
  /^(?:[\u1100-\u115f\u2e80-\u303e\u3041-\ua4cf\ua960-\ua97f\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]|[\u{20000}-\u{3fffd}]|\p{Emoji_Presentation})/u;
/** What takes no room of its own. */
const NARROW = /^[\p{Mn}\p{Me}\p{Cf}]+$/u;

const graphemes = new Intl.Segmenter("en", { granularity: "grapheme" });
const isPlain = (text: string): boolean => /^[\x20-\x7e]*$/.test(text);

function widthOfGrapheme(text: string): number {
  if (WIDE.test(text)) return 2;
  return NARROW.test(text) ? 0 : 1;
}

/** Columns that a text takes on a terminal. */
export function textWidth(text: string): number {
  if (isPlain(text)) return text.length;
  return [...graphemes.segment(text)].reduce((sum, { segment }) => sum + widthOfGrapheme(segment), 0);
}

/** A text of at most `width` columns: one that is longer ends with `mark` instead of its rest. */
export function cutText(text: string, width: number, mark = "…"): string {
  if (textWidth(text) <= width) return text;
  const room = width - textWidth(mark);
  if (room < 0) return "";
  let kept = "";
  let taken = 0;
  for (const { segment } of graphemes.segment(text)) {
    taken += widthOfGrapheme(segment);
    if (taken > room) break;
    kept += segment;
  }
  return kept.trimEnd() + mark;
}

/** A text padded with spaces to `width` columns. */
export function padText(text: string, width: number, align: "left" | "right" = "left"): string {
  const padding = " ".repeat(Math.max(0, width - textWidth(text)));
  return align === "right" ? padding + text : text + padding;
}
