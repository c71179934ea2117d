// Conversations: one for each document, with answers that stream.

import { ApiError, askForKey, eventsOf, isAbort, send, textOf } from "./api.js";
import { isGone, isReady, nameOf } from "./documents.js";
import { $, announce, el, errorBox, number, percent } from "./dom.js";
import { rendered } from "./markdown.js";
import { copyText, showRequest } from "./requests.js";

const HINT = "Enter asks. Shift+Enter starts a new line.";
const OF_ALL = " of the attention";
const SHARE = "Share of the model's attention to the document";
const BUSY = "An answer is running. Wait for it, or stop it.";
const NEAR_PX = 80; // from the end, within which a conversation is scrolled along

// `goTo(item, sources, index, from)` shows a source; `marked(item, sources)` marks all of an
// answer.
export class Talks {
  constructor({ model, goTo, marked }) {
    this.model = model;
    this.goTo = goTo;
    this.marked = marked;
    this.byId = new Map();
    this.current = null;
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    $("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.submit();
    });
    $("stop").addEventListener("click", () => this.current?.abort?.abort());
    $("new-talk").addEventListener("click", () => this.restart());
  }

  // Show the conversation about a document; null for none.
  show(item) {
    const talk = item === null ? null : this.of(item);
    if (talk !== this.current) {
      this.keepDraft(talk);
      this.current = talk;
      $("question").value = talk?.draft ?? "";
      for (const other of this.byId.values()) other.node.hidden = other !== talk;
      $("talks").scrollTop = $("talks").scrollHeight;
    }
    this.showState();
  }

  of(item) {
    let talk = this.byId.get(item.id);
    if (!talk) {
      const node = el("div", { className: "turns", hidden: true });
      talk = { item, turns: [], node, sources: [] };
      this.byId.set(item.id, talk);
      $("talks").append(talk.node);
    }
    talk.item = item;
    return talk;
  }

  // Drop the conversation about a document that is gone.
  drop(id) {
    const talk = this.byId.get(id);
    talk?.abort?.abort();
    talk?.node.remove();
    this.byId.delete(id);
    if (talk === this.current) this.show(null);
  }

  hasTurns(item) {
    return Boolean(this.byId.get(item.id)?.turns.length);
  }

  sourcesOf(item) {
    return this.byId.get(item.id)?.sources ?? [];
  }

  // Keep what is being written: with its document, or for the first one.
  keepDraft(next) {
    const written = $("question").value;
    if (this.current) this.current.draft = written;
    else if (next && written) next.draft ??= written;
  }

  showState() {
    const talk = this.current;
    const busy = Boolean(talk?.abort);
    // The button that has the focus does not go away under it.
    const moves = document.activeElement === $("send") || document.activeElement === $("stop");
    const isNew = talk !== null && !talk.turns.length;
    $("welcome").hidden = talk !== null;
    $("begin").hidden = !isNew;
    if (isNew) {
      $("begin-title").textContent = `Ask about ${nameOf(talk.item)}`;
      $("begin-state").textContent = beginText(talk.item);
    }
    $("new-talk").hidden = !talk?.turns.length;
    $("send").hidden = busy;
    $("stop").hidden = !busy;
    $("ask-hint").textContent = busy ? "An answer is under way." : HINT;
    $("send").disabled = talk === null || isGone(talk.item);
    $("about").textContent = talk === null ? "" : `about ${nameOf(talk.item)}`;
    if (moves) (busy ? $("stop") : $("question")).focus();
  }

  restart() {
    const talk = this.current;
    talk.abort?.abort();
    talk.turns = [];
    talk.node.replaceChildren();
    talk.sources = [];
    this.marked(talk.item, []);
    this.showState();
    $("question").focus();
    announce("A new conversation about the same document.");
  }

  submit() {
    const talk = this.current;
    const text = $("question").value.trim();
    if (!talk) return;
    if (talk.abort) {
      announce(BUSY);
      return;
    }
    if (!text) {
      $("question").focus();
      announce("Write a question first.");
      return;
    }
    if ($("send").disabled) return;
    $("question").value = "";
    this.answer(talk, text);
  }

  // ----------------------------------------------------------------------------- answering

  async answer(talk, text) {
    const turn = { question: text, text: "", reasoning: "", sources: [] };
    const messages = [...messagesOf(talk.turns), { role: "user", content: text }];
    turn.body = { model: this.model(), context: talk.item.id, messages, ...options() };
    talk.turns.push(turn);
    this.open(talk, turn);
    talk.abort = new AbortController();
    this.showState();
    turn.node.scrollIntoView({ block: "end" });
    const started = performance.now();
    try {
      await this.stream(talk, turn);
      turn.seconds = (performance.now() - started) / 1000;
      this.end(talk, turn);
    } catch (error) {
      this.drawNow(turn);
      if (isAbort(error)) this.stopped(talk, turn);
      else this.fail(talk, turn, error);
    } finally {
      talk.abort = null;
      if (talk === this.current) this.showState();
      this.follow(talk, { far: true });
    }
  }

  async stream(talk, turn) {
    const stream_options = { include_usage: true, include_progress: true };
    const json = { ...turn.body, stream: true, stream_options };
    const response = await send("v1/chat/completions", { json, signal: talk.abort.signal });
    for await (const chunk of eventsOf(response)) {
      const [choice] = chunk.choices;
      if (chunk.usage) turn.usage = chunk.usage;
      if (chunk.star?.sources) turn.sources = chunk.star.sources;
      if (choice?.finish_reason) turn.reason = choice.finish_reason;
      turn.text += choice?.delta?.content ?? "";
      turn.reasoning += choice?.delta?.reasoning_content ?? "";
      this.drawProgress(turn, chunk.star);
      this.drawText(talk, turn);
    }
  }

  end(talk, turn) {
    turn.done = true;
    turn.wait.remove();
    this.drawNow(turn);
    if (!turn.text) turn.answer.textContent = "(The answer is empty.)";
    turn.node.append(...this.sourceList(talk, turn), this.foot(talk, turn));
    if (turn.sources.length) this.mark(talk, turn);
    announce(`Answer: ${turn.text || "empty"}. ${turn.sources.length} sources.`);
  }

  stopped(talk, turn) {
    turn.done = true;
    turn.wait.textContent = "Stopped.";
    if (turn.text) turn.node.append(this.foot(talk, turn));
    announce("Stopped.");
  }

  fail(talk, turn, error) {
    turn.wait.remove();
    const again = () => {
      if (talk.abort) {
        announce(BUSY);
        return;
      }
      this.withdraw(talk, turn);
      this.answer(talk, turn.question);
    };
    const newKey = async () => (await askForKey()) && again();
    const isKey = error instanceof ApiError && error.status === 401;
    const ask = { label: "Ask again", run: again };
    const action = isKey ? { label: "Enter a key", run: newKey } : ask;
    turn.node.append(errorBox(textOf(error), action));
  }

  // Take a turn without an answer out of the conversation.
  withdraw(talk, turn) {
    talk.turns = talk.turns.filter((other) => other !== turn);
    turn.node.remove();
  }

  // ------------------------------------------------------------------------------- drawing

  open(talk, turn) {
    turn.answer = el("div", { className: "answer" });
    turn.wait = el("p", { className: "muted small wait", textContent: waitText(talk.item) });
    turn.node = el(
      "article",
      { className: "turn", attrs: { "aria-label": `Question: ${turn.question}` } },
      el("p", { className: "question", textContent: turn.question }),
      turn.answer,
      turn.wait,
    );
    talk.node.append(turn.node);
  }

  drawProgress(turn, star) {
    if (turn.text) turn.wait.textContent = "";
    else if (star?.phase === "encode" && star.total) {
      turn.wait.textContent = `Reading the document, ${percent(star.done / star.total)} …`;
    } else if (star?.phase) turn.wait.textContent = "Answering …";
  }

  drawText(talk, turn) {
    if (turn.isDrawing) return;
    turn.isDrawing = true;
    // Tokens may come faster than the screen shows them.
    requestAnimationFrame(() => {
      turn.isDrawing = false;
      this.drawNow(turn);
      this.follow(talk);
    });
  }

  drawNow(turn) {
    if (turn.reasoning) this.drawReasoning(turn);
    if (turn.drawn === turn.text) return;
    turn.drawn = turn.text;
    turn.answer.replaceChildren(...rendered(turn.text));
  }

  drawReasoning(turn) {
    if (!turn.thoughts) {
      turn.thoughts = el("div", { className: "thoughts" });
      const summary = el("summary", { textContent: "Reasoning" });
      turn.answer.before(el("details", {}, summary, turn.thoughts));
    }
    turn.thoughts.textContent = turn.reasoning;
  }

  // Scroll along with an answer, unless its reader has scrolled away; `far` for its end.
  follow(talk, { far = false } = {}) {
    const box = $("talks");
    const left = box.scrollHeight - box.scrollTop - box.clientHeight;
    if (talk === this.current && (far || left < NEAR_PX)) {
      talk.node.lastElementChild?.scrollIntoView({ block: "end" });
    }
  }

  sourceList(talk, turn) {
    if (!turn.body.sources) return [];
    if (!turn.sources.length) {
      const textContent = "No place in the document stood out.";
      return [el("p", { className: "muted small", textContent })];
    }
    const items = turn.sources.map((source, index) => {
      const go = (event) => {
        this.mark(talk, turn);
        this.goTo(talk.item, turn.sources, index, event.currentTarget);
      };
      return el("li", {}, sourceButton(source, index, go));
    });
    const title = el("h3", { textContent: "Where the answer looked" });
    return [title, el("ol", { className: "sources" }, ...items)];
  }

  mark(talk, turn) {
    talk.sources = turn.sources;
    for (const other of talk.node.querySelectorAll(".turn")) {
      other.classList.toggle("marked", other === turn.node);
    }
    if (talk === this.current) this.marked(talk.item, turn.sources);
  }

  foot(talk, turn) {
    const copied = async (event) => {
      await copyText(turn.text);
      event.target.textContent = "Copied";
      setTimeout(() => (event.target.textContent = "Copy answer"), 1500);
    };
    const quiet = (textContent, click) =>
      el("button", { type: "button", className: "quiet", textContent, on: { click } });
    const copy = quiet("Copy answer", copied);
    const show = quiet("Copy as curl or Python", () => showRequest(turn.body));
    const facts = el("span", { className: "muted small", textContent: factsOf(turn) });
    return el("div", { className: "row foot" }, copy, show, facts);
  }
}

function sourceButton({ text, weight }, index, click) {
  const unseen = (textContent) => el("span", { className: "unseen", textContent });
  return el(
    "button",
    { type: "button", className: "source", on: { click } },
    el("span", { className: "badge" }, unseen("Source "), String(index + 1)),
    el("span", { className: "passage", textContent: text }),
    el("span", { className: "muted small share", title: SHARE }, percent(weight), unseen(OF_ALL)),
  );
}

// The turns so far, as messages; those without an answer are left out.
function messagesOf(turns) {
  return turns
    .filter((turn) => turn.done && turn.text)
    .flatMap((turn) => [
      { role: "user", content: turn.question },
      { role: "assistant", content: turn.text },
    ]);
}

function options() {
  const wanted = { sources: $("want-sources").checked };
  const most = $("max-tokens").valueAsNumber;
  const temperature = $("temperature").valueAsNumber;
  if (!Number.isNaN(most)) wanted.max_tokens = most;
  if (!Number.isNaN(temperature)) wanted.temperature = temperature;
  return wanted;
}

function beginText(item) {
  if (isReady(item)) return "It has been read. Answers come at once.";
  if (isGone(item)) return "Add it again to ask about it.";
  return "The model is reading it. Ask now, and the answer comes once it is through.";
}

function waitText(item) {
  return isReady(item) ? "Answering …" : "Reading the document …";
}

function factsOf({ usage, seconds, reason }) {
  const facts = [];
  if (usage) facts.push(`${number(usage.completion_tokens)} tokens`);
  if (seconds !== undefined) facts.push(`${seconds.toFixed(1)} s`);
  if (reason === "length") facts.push("cut at the longest answer: raise it in Options");
  return facts.join(" · ");
}
