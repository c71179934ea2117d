// The same question from a program: as a line for a shell, and as Python.

import { hasKey, url } from "./api.js";
import { $, announce, ask } from "./dom.js";

export async function showRequest(body) {
  $("curl").value = asCurl(body);
  $("python").value = asPython(body);
  $("request-note").hidden = !hasKey();
  const closed = ask($("request-dialog"), $("curl"));
  for (const area of [$("curl"), $("python")]) {
    area.setSelectionRange(0, 0);
    area.scrollTop = 0;
  }
  await closed;
}

export function startCopying() {
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      await copy($(button.dataset.copy));
      const text = button.textContent;
      button.textContent = "Copied";
      announce("Copied.");
      setTimeout(() => (button.textContent = text), 1500);
    });
  }
}

// Browsers give the clipboard to pages of HTTPS and of this machine only.
async function copy(area) {
  area.focus();
  area.select();
  try {
    await navigator.clipboard.writeText(area.value);
  } catch {
    document.execCommand("copy");
  }
}

export async function copyText(text) {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "unseen";
  document.body.append(area);
  const focused = document.activeElement;
  await copy(area);
  area.remove();
  focused?.focus();
}

function asCurl(body) {
  const lines = [`curl ${inShell(url("v1/chat/completions"))}`];
  lines.push("-H 'Content-Type: application/json'");
  if (hasKey()) lines.push('-H "Authorization: Bearer $STAR_ATTENTION_KEY"');
  lines.push(`-d ${inShell(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

const inShell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// JSON's strings and numbers are Python's, too.
function asPython({ model, messages, context, sources, ...options }) {
  const key = hasKey() ? 'os.environ["STAR_ATTENTION_KEY"]' : '"none"';
  const extra = { context, ...(sources ? { sources } : {}) };
  const pairs = Object.entries(extra).map(([name, value]) => `"${name}": ${inPython(value)}`);
  const fields = Object.entries(options).map(([name, value]) => `    ${name}=${inPython(value)},`);
  const turns = messages.map((message) => `        ${JSON.stringify(message)},`);
  const printed = [
    'for source in answer.star["sources"]:',
    '    print(source["weight"], source["text"])',
  ];
  return [
    ...(hasKey() ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(url("v1"))}, api_key=${key})`,
    "answer = client.chat.completions.create(",
    `    model=${JSON.stringify(model)},`,
    "    messages=[",
    ...turns,
    "    ],",
    ...fields,
    `    extra_body={${pairs.join(", ")}},`,
    ")",
    "print(answer.choices[0].message.content)",
    ...(sources ? printed : []),
  ].join("\n");
}

function inPython(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  return JSON.stringify(value);
}
