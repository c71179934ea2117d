// The text of a document, with the sources of an answer marked in it and on a strip.

import { getText, isAbort, textOf } from "./api.js";
import { $, el, errorBox, number, percent, showPane } from "./dom.js";

const CHUNK = 8000; // characters of one element: the browser lays out only those in sight
const MOST_TEXTS = 8; // texts that are remembered
const LABEL_PX = 28; // room of a number on the strip

export class Reader {
  constructor() {
    this.texts = new Map();
    this.document = null;
    this.sources = [];
    this.from = null; // what to go back to
    $("reader").addEventListener("scroll", () => this.showSight(), { passive: true });
    const redraw = () => requestAnimationFrame(() => this.drawStrip());
    new ResizeObserver(redraw).observe($("strip"));
    $("back").addEventListener("click", () => this.goBack());
    $("text").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.from) this.goBack();
    });
  }

  // Show a document's text, with sources of an answer; `item` is null for none.
  async show(item, sources = []) {
    const isOther = item?.id !== this.document;
    if (!isOther && isSame(sources, this.shown)) return;
    this.document = item?.id ?? null;
    this.shown = null;
    this.sources = [];
    this.forgetBack();
    if (isOther) this.abort?.abort();
    if (item === null) {
      this.note("Choose a document to see its text.");
      $("reader").replaceChildren();
      this.drawStrip();
      return;
    }
    // What is wanted may change while the text comes.
    this.wanted = sources;
    const text = this.texts.get(item.id) ?? (await this.textOf(item, isOther));
    if (text === undefined || this.document !== item.id || this.shown !== null) return;
    this.shown = this.wanted;
    this.draw(text, placed(text, this.shown), isOther);
    this.markAt(0)?.scrollIntoView({ block: "center" });
  }

  // Return a document's text, which may be on its way; undefined if it does not come.
  textOf(item, isOther) {
    if (isOther || !this.coming) {
      const coming = this.load(item).finally(() => {
        if (this.coming === coming) this.coming = null;
      });
      this.coming = coming;
    }
    return this.coming;
  }

  async load(item) {
    this.abort = new AbortController();
    this.note("Loading the text …");
    $("reader").replaceChildren();
    try {
      const text = await getText(`v1/contexts/${item.id}/text`, { signal: this.abort.signal });
      this.texts.set(item.id, text);
      if (this.texts.size > MOST_TEXTS) this.texts.delete(this.texts.keys().next().value);
      return text;
    } catch (error) {
      if (isAbort(error) || this.document !== item.id) return undefined;
      this.note("");
      const again = () => this.show(item);
      $("reader").replaceChildren(errorBox(textOf(error), { label: "Try again", run: again }));
      return undefined;
    }
  }

  forget(id) {
    this.texts.delete(id);
  }

  // Go to a source: in the text, with the focus.
  async goTo(item, sources, index, from) {
    await this.show(item, sources);
    showPane("text");
    this.from = from;
    $("back").hidden = false;
    const mark = this.markAt(index);
    if (mark === null) {
      this.note("This place is not found in the text: the tokenizer writes it differently.");
      return;
    }
    this.reveal(index);
  }

  markAt(index) {
    return $("reader").querySelector(`mark[data-source="${index}"]`);
  }

  // Scroll to a source, and put the focus there.
  reveal(index) {
    for (const mark of $("reader").querySelectorAll("mark")) {
      mark.classList.toggle("chosen", mark.dataset.source === String(index));
    }
    const mark = this.markAt(index);
    mark.focus({ preventScroll: true });
    mark.scrollIntoView({ block: "center" });
    // What was not laid out before may have another height than was guessed.
    requestAnimationFrame(() => mark.scrollIntoView({ block: "center" }));
  }

  goBack() {
    const from = this.from;
    this.forgetBack();
    showPane("talk");
    from?.focus();
  }

  forgetBack() {
    this.from = null;
    $("back").hidden = true;
  }

  note(text) {
    $("text-note").textContent = text;
    $("text-note").hidden = !text;
  }

  // ------------------------------------------------------------------------------- drawing

  draw(text, sources, isOther) {
    const at = isOther ? 0 : $("reader").scrollTop;
    this.sources = sources;
    this.length = text.length;
    const chunks = [];
    for (const [start, end] of chunksOf(text)) {
      chunks.push(el("div", { className: "chunk" }, ...marked(text, start, end, sources)));
    }
    $("reader").replaceChildren(...chunks);
    $("reader").scrollTop = at;
    const places = sources.length === 1 ? "1 place is" : `${sources.length} places are`;
    const what = sources.length ? ` ${places} marked: the answer looked there most.` : "";
    this.note(`${number(text.length)} characters.${what}`);
    this.drawStrip();
  }

  drawStrip() {
    const strip = $("strip");
    strip.hidden = !this.sources.length;
    if (strip.hidden) return;
    const width = strip.clientWidth;
    const sight = el("div", { className: "sight" });
    const ticks = this.sources.map(({ start, weight }) => {
      const tick = el("div", { className: "tick" });
      tick.style.left = `${(100 * start) / this.length}%`;
      tick.style.opacity = 0.45 + 0.55 * Math.min(1, 2 * weight);
      return tick;
    });
    const places = this.sources.map(({ start }) => (width * start) / this.length);
    const labels = labelPlaces(places, width);
    const buttons = this.sources.map((source, index) => {
      const where = percent(source.start / this.length);
      const label = el("button", {
        type: "button",
        textContent: source.number,
        attrs: { "aria-label": `Source ${source.number}, at ${where} of the document` },
        on: { click: () => this.reveal(source.number - 1) },
      });
      label.style.left = `${labels[index]}px`;
      return label;
    });
    strip.replaceChildren(el("div", { className: "bar" }, sight, ...ticks), ...buttons);
    this.showSight();
  }

  // Show on the strip which part of the text is in sight.
  showSight() {
    const sight = $("strip").querySelector(".sight");
    const { scrollTop, clientHeight, scrollHeight } = $("reader");
    if (!sight || !scrollHeight) return;
    sight.style.left = `${(100 * scrollTop) / scrollHeight}%`;
    sight.style.width = `${(100 * clientHeight) / scrollHeight}%`;
  }
}

const isSame = (a, b) => a === b || (b !== null && !a.length && !b.length);

// Cut a text into parts of about the same length: after a line's end, or else after a word.
function* chunksOf(text) {
  let start = 0;
  while (start < text.length) {
    const end = endOfChunk(text, start);
    yield [start, end];
    start = end;
  }
}

function endOfChunk(text, start) {
  const most = start + 2 * CHUNK;
  if (most >= text.length) return text.length;
  const line = text.indexOf("\n", start + CHUNK);
  if (line >= 0 && line < most) return line + 1;
  const word = text.lastIndexOf(" ", most - 1);
  if (word > start + CHUNK) return word + 1;
  // Not inside of a character.
  return /[\ud800-\udbff]/.test(text.charAt(most - 1)) ? most + 1 : most;
}

// Return the nodes of a part of a text.
function marked(text, start, end, sources) {
  const nodes = [];
  let at = start;
  for (const source of sources) {
    const from = Math.max(source.start, at);
    const to = Math.min(source.end, end);
    if (from >= to) continue;
    nodes.push(text.slice(at, from), markOf(text.slice(from, to), source));
    at = to;
  }
  nodes.push(text.slice(at, end));
  return nodes;
}

function markOf(text, { number: own, weight }) {
  return el(
    "mark",
    {
      textContent: text,
      attrs: {
        tabindex: "-1",
        "data-source": own - 1,
        "data-number": own,
        title: `Source ${own}, ${percent(weight)} of the attention`,
      },
    },
  );
}

// Return the sources that have a place, as indexes of a JavaScript string, in the text's order.
// The server counts characters; here those beyond the first 65,536 count twice.
function placed(text, sources) {
  const known = sources
    .map((source, index) => ({ ...source, number: index + 1 }))
    .filter((source) => source.start !== null)
    .sort((a, b) => a.start - b.start);
  if (!/[\ud800-\udbff]/.test(text)) return known;
  const wanted = new Set(known.flatMap(({ start, end }) => [start, end]));
  const places = new Map();
  let unit = 0;
  let character = 0;
  for (const each of text) {
    if (wanted.has(character)) places.set(character, unit);
    unit += each.length;
    character += 1;
  }
  places.set(character, unit);
  return known.map((source) => ({
    ...source,
    start: places.get(source.start),
    end: places.get(source.end),
  }));
}

// Return where labels go so that none covers another, each as near to its place as it can be.
function labelPlaces(places, width) {
  const result = [];
  for (const place of places) {
    const previous = result.at(-1) ?? -LABEL_PX;
    result.push(Math.max(place - LABEL_PX / 2, previous + LABEL_PX, 0));
  }
  let most = width - LABEL_PX;
  for (let index = result.length - 1; index >= 0; index--) {
    result[index] = Math.min(result[index], most);
    most = result[index] - LABEL_PX;
  }
  return result;
}
