// Elements, announcements and dialogs. Texts go in by textContent alone: documents are untrusted.

export const $ = (id) => document.getElementById(id);

// Make an element: properties by their DOM names, attributes in `attrs`, children as nodes or
// texts.
export function el(tag, { attrs = {}, on = {}, ...properties } = {}, ...children) {
  const node = document.createElement(tag);
  Object.assign(node, properties);
  for (const [name, value] of Object.entries(attrs)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  for (const [name, listener] of Object.entries(on)) node.addEventListener(name, listener);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Say something to screen readers, once what they are reading has ended.
export function announce(text) {
  $("status").textContent = "";
  // A text that did not change is not read again.
  setTimeout(() => ($("status").textContent = text), 50);
}

// Show what went wrong above everything, until it is closed.
export function alertText(text, action = null) {
  const close = el("button", { type: "button", className: "quiet", textContent: "Close" });
  const box = el("div", { className: "notice" }, el("p", { textContent: text }));
  if (action) box.append(actionButton(action, () => box.remove()));
  close.addEventListener("click", () => box.remove());
  box.append(close);
  $("alert").replaceChildren(box);
}

export function clearAlert() {
  $("alert").replaceChildren();
}

// A text of an error, with what can be done about it.
export function errorBox(text, action = null) {
  const box = el("div", { className: "error", attrs: { role: "alert" } });
  box.append(el("p", { textContent: text }));
  if (action) box.append(actionButton(action));
  return box;
}

function actionButton({ label, run }, after = () => {}) {
  const click = () => {
    after();
    run();
  };
  return el("button", { type: "button", textContent: label, on: { click } });
}

// Open a dialog, and return what it was closed with: "ok" or "cancel".
export function ask(dialog, focused = null) {
  return new Promise((resolve) => {
    dialog.returnValue = "cancel";
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
    dialog.showModal();
    if (focused) focused.focus();
  });
}

export const number = (value) => value.toLocaleString("en-US");

export const percent = (share) => `${Math.round(100 * share)} %`;

// Show one of the three parts, where there is no room for all.
export function showPane(name) {
  document.body.dataset.pane = name;
  for (const button of document.querySelectorAll("[data-show]")) {
    button.setAttribute("aria-pressed", String(button.dataset.show === name));
  }
}
