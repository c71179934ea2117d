// Answers as models write them: the part of Markdown that they use most, as elements.
// Nothing in an answer becomes a link or an image, and all texts go in as texts.

import { el } from "./dom.js";

const FENCE = /^\s*(```|~~~)/;
const HEADING = /^#{1,6} +(\S.*)$/;
const BULLET = /^(\s*)[-*+] +(\S.*)$/;
const NUMBERED = /^(\s*)(\d{1,4}[.)]) +(\S.*)$/;
const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*)/;
const DEEPEST = 3; // levels of lists

// Return the nodes of an answer, or of its beginning.
export function rendered(text) {
  const nodes = [];
  const lines = text.split("\n");
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    const end = endOf(lines, at);
    if (FENCE.test(line)) nodes.push(codeOf(lines.slice(at, end)));
    else if (HEADING.test(line)) nodes.push(el("p", { className: "heading" }, ...inline(line)));
    else if (isItem(line)) nodes.push(itemOf(line));
    else if (line.trim()) nodes.push(el("p", {}, ...inline(lines.slice(at, end).join("\n"))));
    at = end;
  }
  return nodes;
}

const isItem = (line) => BULLET.test(line) || NUMBERED.test(line);

// Return the line after the block that begins at a line.
function endOf(lines, start) {
  const fence = FENCE.exec(lines[start]);
  let end = start + 1;
  if (fence) {
    while (end < lines.length && !lines[end].trimStart().startsWith(fence[1])) end += 1;
    return Math.min(end + 1, lines.length);
  }
  if (HEADING.test(lines[start]) || isItem(lines[start]) || !lines[start].trim()) return end;
  const isPlain = (line) => line.trim() && ![FENCE, HEADING].some((kind) => kind.test(line));
  while (end < lines.length && isPlain(lines[end]) && !isItem(lines[end])) end += 1;
  return end;
}

function codeOf(lines) {
  const isClosed = lines.length > 1 && FENCE.test(lines.at(-1));
  const textContent = lines.slice(1, isClosed ? -1 : undefined).join("\n");
  return el("pre", { tabIndex: 0 }, el("code", { textContent }));
}

// The mark of an item stays as the model wrote it: numbers may begin anywhere.
function itemOf(line) {
  const [, space, number, text] = NUMBERED.exec(line) ?? bulletOf(line);
  const level = Math.min(Math.floor(space.length / 2), DEEPEST);
  const mark = el("span", { className: "mark", textContent: number });
  return el("div", { className: `item level-${level}` }, mark, el("div", {}, ...inline(text)));
}

function bulletOf(line) {
  const [whole, space, text] = BULLET.exec(line);
  return [whole, space, "•", text];
}

function inline(text) {
  const heading = HEADING.exec(text);
  return (heading ? heading[1] : text).split(INLINE).map((part) => {
    if (part.startsWith("`") && INLINE.test(part)) {
      return el("code", { textContent: part.slice(1, -1) });
    }
    if (part.startsWith("**") && INLINE.test(part)) {
      return el("strong", { textContent: part.slice(2, -2) });
    }
    return part;
  });
}
