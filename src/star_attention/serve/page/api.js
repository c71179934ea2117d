// Requests to the server, its errors, and its streams of events.

import { $, ask } from "./dom.js";

const KEY = "star-attention-key";
const NO_ANSWER = "The server does not answer. Check that it is running, then try again.";

// Hints for errors whose message is about the API's fields, for who uses this page.
const HINTS = {
  context_length_exceeded:
    "Ask for a shorter answer in Options, start a new conversation, or add a shorter document.",
  context_too_large: "Add a shorter document, or have the server keep more (--max-context-bytes).",
  context_not_found: "The document is gone. Add it again.",
  context_expired: "The document is gone. Add it again.",
  context_deleted: "The document is gone. Add it again.",
  pin_budget: "Unpin another document first.",
  out_of_memory: "Delete documents that you do not need, or ask for a shorter answer.",
};

// Errors whose message is for programs alone.
const TEXTS = { invalid_api_key: "This server needs a key. Enter one with “Key”, at the top." };

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }

  // The message, and what to do.
  get text() {
    if (this.code in TEXTS) return TEXTS[this.code];
    const hint = HINTS[this.code] ?? "";
    const wait = this.retryAfter ? `Try again in ${this.retryAfter} seconds.` : "";
    const message = hint ? withoutFields(this.message) : this.message;
    return [sentence(message), hint, wait].filter(Boolean).join(" ");
  }
}

// Messages begin small; a name of a file or a field stays as it is.
function sentence(text) {
  const begun = /^[a-z]+ /.test(text) ? text.charAt(0).toUpperCase() + text.slice(1) : text;
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}

// What a program would do about it, by names of fields that this page does not show.
const withoutFields = (text) => text.replace(/ Shorten the prompt, or lower max_tokens\.$/, "");

export const isAbort = (error) => error.name === "AbortError";

// The text of any error.
export function textOf(error) {
  if (error instanceof ApiError) return error.text;
  return sentence(String(error.message ?? error));
}

export const url = (path) => new URL(path, document.baseURI).href;

// ------------------------------------------------------------------------------------------ key

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

let asking = null;

// Ask for a key; one question for all requests that wait for it. False if there is none.
export function askForKey(message = "") {
  asking ??= askOnce(message).finally(() => (asking = null));
  return asking;
}

async function askOnce(message) {
  const input = $("key");
  $("key-error").hidden = !message;
  $("key-error").textContent = message;
  input.value = "";
  const answer = await ask($("key-dialog"), input);
  const key = input.value.trim();
  input.value = "";
  $("key-button").hidden = false;
  if (answer !== "ok" || !key) return false;
  sessionStorage.setItem(KEY, key);
  return true;
}

function withKey(headers) {
  const key = sessionStorage.getItem(KEY);
  return key === null ? headers : { ...headers, authorization: `Bearer ${key}` };
}

// ------------------------------------------------------------------------------------- requests

// Send a request, and return the response once it is a success.
// A quiet one does not ask for a key.
export async function send(path, { json, form, method, signal, accept, quiet = false } = {}) {
  const headers = json === undefined ? {} : { "content-type": "application/json" };
  if (accept) headers.accept = accept;
  const body = form ?? (json === undefined ? undefined : JSON.stringify(json));
  const options = { method: method ?? (body === undefined ? "GET" : "POST"), body, signal };
  for (;;) {
    const used = sessionStorage.getItem(KEY);
    const response = await request(path, { ...options, headers });
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || quiet) throw error;
    // Another request may have got a new key meanwhile.
    if (used !== sessionStorage.getItem(KEY)) continue;
    if (!(await askForKey(used === null ? "" : "The server does not know this key. Check it."))) {
      throw error;
    }
  }
}

async function request(path, { headers, ...options }) {
  try {
    return await fetch(url(path), { ...options, headers: withKey(headers), cache: "no-store" });
  } catch (error) {
    if (isAbort(error)) throw error;
    if (hasKey() && /[^\x21-\x7e]/.test(sessionStorage.getItem(KEY))) {
      sessionStorage.removeItem(KEY);
      const text = "The key has invalid characters. Enter it again.";
      throw new ApiError(text, { status: 401 });
    }
    throw new ApiError(NO_ANSWER);
  }
}

async function errorOf(response) {
  const retryAfter = response.headers.get("retry-after");
  const about = { status: response.status, retryAfter };
  try {
    const { error } = await response.json();
    return new ApiError(error.message, { ...about, code: error.code });
  } catch {
    return new ApiError(`The server answered with status ${response.status}.`, about);
  }
}

export async function getJson(path, options) {
  return (await send(path, options)).json();
}

// Return a text as it is: `response.text()` would leave out a mark at its beginning, and move all
// places by one.
export async function getText(path, options) {
  const bytes = await (await send(path, options)).arrayBuffer();
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);
}

// Yield the objects of a stream of events, up to its end.
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw isAbort(error) ? error : new ApiError(NO_ANSWER);
      });
      if (done) throw new ApiError(NO_ANSWER);
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue;
        const data = event.slice(6);
        if (data === "[DONE]") return;
        const object = JSON.parse(data);
        if (object.error && !object.object) throw new ApiError(object.error.message, object.error);
        yield object;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
