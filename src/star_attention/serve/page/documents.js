// The list of documents: added, watched while they are read, pinned, deleted, chosen.

import { ApiError, eventsOf, getJson, isAbort, send, textOf } from "./api.js";
import { $, alertText, announce, ask, el, errorBox, number, percent, showPane } from "./dom.js";

const LOOK_MS = 1000; // between looks at documents that somebody else's request is having read
const REFRESH_MS = 15000; // between looks at all
const MOST_WATCHED = 2; // streams of progress: browsers have six connections to a server
const PAGE = 1000; // documents of one list
const PLACES = {
  device: "in memory",
  host: "in memory",
  disk: "on disk",
  cold: "read again when asked",
};
const BROKEN =
  "The upload was interrupted. The file may be larger than the server takes (--max-body), or the" +
  " server has stopped.";
const UNDER_WAY = ["queued", "encoding"];

// Calls `chosen(document)` when another one is chosen, or the chosen one has changed, and
// `gone(document)` when one is no more. `isUsed(document)` tells if there is a conversation about
// it.
export class Documents {
  constructor({ chosen, gone, isUsed }) {
    this.onChosen = chosen;
    this.onGone = gone;
    this.isUsed = isUsed;
    this.byId = new Map(); // in the order of the list, the newest first
    this.current = null;
    this.uploads = 0;
  }

  async start() {
    await this.refresh({ quiet: false });
    const first = [...this.byId.values()][0];
    if (first) this.choose(first.id);
    setInterval(() => document.hidden || this.quietly(this.refresh()), REFRESH_MS);
    setInterval(() => document.hidden || this.lookAtPending(), LOOK_MS);
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.quietly(this.refresh());
    });
  }

  // A look that nobody asked for says nothing when it fails: the next request of the user does.
  quietly(promise) {
    return promise.catch(() => {});
  }

  get(id) {
    return this.byId.get(id) ?? null;
  }

  // ------------------------------------------------------------------------------ looking

  async refresh({ quiet = true } = {}) {
    const { data } = await getJson(`v1/contexts?limit=${PAGE}`, { quiet });
    const ids = new Set(data.map((context) => context.id));
    for (const item of [...this.byId.values()]) {
      // One that is being uploaded has no id of the server's.
      if (!item.upload && !ids.has(item.id)) this.lose(item);
    }
    for (const context of data.reverse()) this.update(context);
    this.showEmpty();
  }

  async lookAtPending() {
    for (const item of this.byId.values()) {
      if (item.watched || item.upload || !isUnderWay(item)) continue;
      try {
        this.update(await getJson(`v1/contexts/${item.id}`, { quiet: true }));
      } catch (error) {
        if (error.status === 404) this.lose(item);
      }
    }
  }

  // Note that the server has no such document any more; a conversation about it stays.
  lose(item) {
    if (this.isUsed(item)) this.update({ ...item.context, status: "gone", pinned: false });
    else this.remove(item);
  }

  update(context) {
    const item = this.byId.get(context.id) ?? this.add({ id: context.id });
    const before = item.context;
    item.context = context;
    this.draw(item);
    const wasUnderWay = before && UNDER_WAY.includes(before.status);
    if (wasUnderWay && context.status === "ready") announce(readyText(item));
    if (item === this.current && before?.status !== context.status) this.onChosen(item);
    return item;
  }

  // -------------------------------------------------------------------------------- adding

  async addAll(files) {
    await Promise.all([...files].map((file) => this.upload(file, file.name)));
  }

  // Upload a file or a text, and watch it being read.
  async upload(source, name) {
    const item = this.add({ id: `upload-${++this.uploads}`, name, upload: true });
    item.abort = new AbortController();
    item.before = this.current;
    this.draw(item);
    this.showEmpty();
    announce(`Uploading ${name}.`);
    try {
      await this.watch(item, source, name);
    } catch (error) {
      if (isAbort(error)) return;
      const { status } = error;
      // A file that the server refuses once, it refuses again.
      if (!status || status >= 500 || [401, 429].includes(status)) {
        item.again = () => {
          this.remove(item);
          this.upload(source, name);
        };
      }
      this.fail(item, status === 0 ? new ApiError(BROKEN) : error);
    }
  }

  async watch(item, source, name) {
    const form = new FormData();
    const blob = typeof source === "string" ? new Blob([source], { type: "text/plain" }) : source;
    form.append("file", blob, name);
    form.append("name", name.slice(0, 200));
    const options = { form, accept: "text/event-stream", signal: item.abort.signal };
    const response = await send("v1/contexts", options);
    let known = null;
    let said = 0;
    try {
      for await (const context of eventsOf(response)) {
        if (known === null) {
          known = this.arrived(item, context);
          const watched = [...this.byId.values()].filter((other) => other.watched);
          // The others are looked at now and then.
          if (watched.length >= MOST_WATCHED) return;
          known.watched = true;
        }
        this.update(context);
        const share = shareOf(context);
        if (share >= said + 0.25 && share < 1) {
          said = share;
          announce(`${name}: ${percent(share)} read.`);
        }
      }
    } catch (error) {
      // The server has the document: how far it is, the next look tells.
      if (known === null) throw error;
    } finally {
      if (known !== null) known.watched = false;
    }
  }

  // Put a document in the place of its upload. It may be there already.
  arrived(item, context) {
    const isThere = this.byId.has(context.id);
    this.remove(item);
    const known = this.update(context);
    if (isThere) announce(`${nameOf(known)} is here already.`);
    if (context.status === "ready") announce(readyText(known));
    // Whoever has turned to another document meanwhile stays there.
    if (this.current === null || this.current === item.before) this.choose(known.id);
    return known;
  }

  fail(item, error) {
    item.failure = error;
    this.draw(item);
    announce(`${nameOf(item)} could not be added.`);
  }

  // ------------------------------------------------------------------------------ changing

  choose(id) {
    const item = this.byId.get(id);
    if (!item || item.upload) return;
    const before = this.current;
    this.current = item;
    if (before) this.draw(before);
    this.draw(item);
    this.onChosen(item);
  }

  // Choose a document by hand: where parts are shown one at a time, its questions come next.
  open(id) {
    this.choose(id);
    if (document.body.dataset.pane === "documents") showPane("talk");
  }

  async pin(item) {
    const pin = !item.context.pinned;
    try {
      this.update(await getJson(`v1/contexts/${item.id}`, { json: { pin } }));
      announce(pin ? `${nameOf(item)} stays in memory.` : `${nameOf(item)} may leave memory.`);
    } catch (error) {
      alertText(textOf(error));
    }
  }

  async delete(item) {
    $("delete-text").textContent = `“${nameOf(item)}” and its conversation will be gone.`;
    if ((await ask($("delete-dialog"))) !== "ok") return;
    try {
      await send(`v1/contexts/${item.id}`, { method: "DELETE" });
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 404)) {
        alertText(textOf(error));
        return;
      }
    }
    announce(`${nameOf(item)} was deleted.`);
    this.remove(item);
    const [next] = this.byId.values();
    const button = next?.node.querySelector("button") ?? $("choose");
    button.focus();
  }

  // ------------------------------------------------------------------------------- drawing

  add(item) {
    item.node = el("li");
    this.byId = new Map([[item.id, item], ...this.byId]);
    $("list").prepend(item.node);
    this.showEmpty();
    return item;
  }

  remove(item) {
    this.byId.delete(item.id);
    item.node.remove();
    this.showEmpty();
    this.onGone(item);
    if (item !== this.current) return;
    this.current = null;
    const [next] = [...this.byId.values()].filter((other) => !other.upload);
    if (next) this.choose(next.id);
    else this.onChosen(null);
  }

  showEmpty() {
    $("no-documents").hidden = this.byId.size > 0;
  }

  draw(item) {
    const isCurrent = item === this.current;
    const { context, failure, upload } = item;
    const state = [isUnderWay(item), isGone(item), context?.pinned, isCurrent];
    const key = JSON.stringify([nameOf(item), upload, failure?.message, ...state]);
    // Progress changes many times a second: a button must not be another one at the end of a click.
    if (key !== item.drawn) this.rebuild(item);
    item.drawn = key;
    item.node.className = isCurrent ? "current" : "";
    if (failure) return;
    item.state.textContent = stateOf(item);
    if (item.bar && context?.status === "encoding") item.bar.value = shareOf(context);
  }

  rebuild(item) {
    const focused = item.node.contains(document.activeElement)
      ? document.activeElement.dataset.role
      : null;
    item.node.replaceChildren(...this.parts(item));
    // A redrawn button keeps the focus.
    if (focused) item.node.querySelector(`[data-role="${focused}"]`)?.focus();
  }

  parts(item) {
    const choose = el(
      "button",
      {
        type: "button",
        className: "name",
        title: nameOf(item),
        disabled: Boolean(item.upload),
        attrs: { "aria-current": item === this.current ? "true" : null, "data-role": "name" },
        on: { click: () => this.open(item.id) },
      },
      nameOf(item),
    );
    if (item.failure) return [choose, this.failureOf(item)];
    const label = item.upload ? "Uploading" : "Reading";
    item.state = el("p", { className: "muted small" });
    item.bar = isUnderWay(item) ? el("progress", { attrs: { "aria-label": label } }) : null;
    return [choose, item.state, item.bar, this.buttons(item)].filter(Boolean);
  }

  buttons(item) {
    const name = nameOf(item);
    if (item.upload) {
      const cancel = () => {
        item.abort.abort();
        this.remove(item);
      };
      return el("div", { className: "row" }, button("Cancel", `Cancel ${name}`, cancel));
    }
    const remove = button("Delete", `Delete ${name}`, () => this.delete(item));
    if (isGone(item)) return el("div", { className: "row" }, remove);
    const { pinned } = item.context;
    const pin = button("Pin", `Pin ${name}`, () => this.pin(item));
    pin.setAttribute("aria-pressed", String(pinned));
    pin.title = "A pinned document always stays in memory";
    return el("div", { className: "row" }, pin, remove);
  }

  failureOf(item) {
    const action = item.again ? { label: "Try again", run: item.again } : null;
    const box = errorBox(textOf(item.failure), action);
    box.append(button("Close", `Close ${nameOf(item)}`, () => this.remove(item)));
    return box;
  }
}

const readyText = (item) => `${nameOf(item)} is ready. Ask a question.`;

const isUnderWay = (item) => Boolean(item.upload) || UNDER_WAY.includes(item.context.status);

// True for a document that nobody can ask any more.
export const isGone = (item) => ["failed", "expired", "gone"].includes(item.context?.status);

export const isReady = (item) => item?.context?.status === "ready";

export function nameOf(item) {
  return item.context?.name ?? item.name ?? `From a request, ${item.id.slice(0, 12)}…`;
}

function shareOf({ progress: { done, total } }) {
  return total ? done / total : 0;
}

function button(text, label, click) {
  return el("button", {
    type: "button",
    className: "quiet",
    textContent: text,
    attrs: { "aria-label": label, "data-role": text },
    on: { click },
  });
}

// What a document's line says.
function stateOf({ upload, context }) {
  if (upload) return "Uploading …";
  const tokens = `${number(context.tokens)} tokens`;
  if (context.status === "queued") return `${tokens} · waits to be read`;
  if (context.status === "encoding") return `${tokens} · reading, ${percent(shareOf(context))}`;
  if (context.status === "failed") return `Could not be read: ${context.error}. Add it again.`;
  if (context.status === "gone") return "No longer on the server. Add it again.";
  if (context.status === "expired") return "Expired. Add it again.";
  const expires = context.expires_at === null ? "" : ` · goes ${timeTo(context.expires_at)}`;
  return `${tokens} · ${PLACES[context.location] ?? context.location ?? ""}${expires}`;
}

function timeTo(seconds) {
  const minutes = Math.max(1, Math.round((seconds - Date.now() / 1000) / 60));
  if (minutes < 90) return `in ${minutes} min if unused`;
  return `in ${Math.round(minutes / 60)} h if unused`;
}
