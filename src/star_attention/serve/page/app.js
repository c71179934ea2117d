// Starts the page: what is chosen, dropped, pasted and entered.

import { askForKey, getJson, hasKey, textOf } from "./api.js";
import { Documents, nameOf } from "./documents.js";
import { $, alertText, ask, clearAlert, number, showPane } from "./dom.js";
import { Reader } from "./reader.js";
import { startCopying } from "./requests.js";
import { Talks } from "./talk.js";

let model = "";
const reader = new Reader();
const talks = new Talks({
  model: () => model,
  goTo: (item, sources, index, from) => reader.goTo(item, sources, index, from),
  marked: (item, sources) => reader.show(item, sources),
});
const documents = new Documents({ chosen, gone, isUsed: (item) => talks.hasTurns(item) });

function chosen(item) {
  $("text-title").textContent = item === null ? "Text" : nameOf(item);
  talks.show(item);
  reader.show(item, item === null ? [] : talks.sourcesOf(item));
}

function gone(item) {
  talks.drop(item.id);
  reader.forget(item.id);
}

async function start() {
  clearAlert();
  $("key-button").hidden = !hasKey();
  try {
    const { data } = await getJson("v1/models");
    const [served] = data;
    model = served.id;
    const limit = served.max_model_len;
    $("model").textContent = model;
    $("limit").textContent = limit ? ` · up to ${number(limit)} tokens` : "";
    await documents.start();
  } catch (error) {
    alertText(textOf(error), { label: "Try again", run: start });
  }
}

// --------------------------------------------------------------------------------------- adding

$("choose").addEventListener("click", () => $("files").click());
$("files").addEventListener("change", () => {
  documents.addAll($("files").files);
  $("files").value = "";
});

$("paste").addEventListener("click", async () => {
  const time = new Date().toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  $("paste-name").value = `Pasted text, ${time}`;
  $("paste-error").hidden = true;
  if ((await ask($("paste-dialog"), $("paste-text"))) !== "ok") return;
  documents.upload($("paste-text").value, $("paste-name").value.trim() || "Pasted text");
  $("paste-text").value = "";
});
$("paste-ok").addEventListener("click", (event) => {
  if ($("paste-text").value.trim()) return;
  event.preventDefault();
  $("paste-error").textContent = "There is no text. Paste one, or cancel.";
  $("paste-error").hidden = false;
  $("paste-text").focus();
});

const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  $("overlay").hidden = false;
});
addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) $("overlay").hidden = true;
});
addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  $("overlay").hidden = true;
  documents.addAll(event.dataTransfer.files);
});

// ---------------------------------------------------------------------------------------- parts

for (const button of document.querySelectorAll("[data-show]")) {
  button.addEventListener("click", () => showPane(button.dataset.show));
}
const narrow = matchMedia("(max-width: 720px)");
function fit() {
  if (!narrow.matches && document.body.dataset.pane === "documents") showPane("talk");
}
narrow.addEventListener("change", fit);
fit();
$("key-button").addEventListener("click", async () => {
  if (await askForKey()) location.reload();
});
for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close("cancel"));
}
startCopying();
start();
