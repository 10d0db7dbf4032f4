// Requests to the server. A request without a valid session opens the log-in, and is sent again.

import { shownLanguage, t } from "./words.js";

const byId = (id) => document.getElementById(id);
let login = null; // the log-in that is open

export class Refused extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

export async function ask(path, { body, signal } = {}) {
  const headers = { "accept-language": shownLanguage() };
  const options = body === undefined ? { headers } : {
    method: "POST", headers: { ...headers, "content-type": "application/json" },
    body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, { ...options, signal, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(t("offline"), 0);
  }
  if (answer.status === 401) {
    await logIn();
    return ask(path, { body, signal });
  }
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  if (answer.status === 429) throw new Refused(t("busy"), 429);
  let message = `${answer.status}`;
  try { message = (await answer.json()).error.message; } catch { /* not ours */ }
  throw new Refused(message, answer.status);
}

function logIn() {
  login ??= new Promise((resolve) => {
    const dialog = byId("login");
    byId("login-error").textContent = "";
    dialog.oncancel = (event) => event.preventDefault(); // there is nothing behind it
    byId("login-form").onsubmit = async (event) => {
      event.preventDefault();
      const answer = await fetch("/login", {
        method: "POST", headers: { "content-type": "application/json" },
        body: JSON.stringify({ key: byId("key").value }), credentials: "same-origin",
      }).catch(() => null);
      if (answer?.ok) {
        byId("key").value = "";
        dialog.close();
        login = null;
        resolve();
      } else {
        byId("login-error").textContent = answer ? t("wrongKey") : t("offline");
        byId("key").select();
      }
    };
    dialog.showModal();
  });
  return login;
}

// Image files.

const LARGE = 3 << 20; // bytes; larger files are made smaller before they are sent
const SIDE = 1536;

export async function readImage(file) {
  let blob = file;
  if (file.size > LARGE || !/^image\/(jpeg|png|webp|gif|bmp|tiff)$/.test(file.type)) {
    blob = await smaller(file);
  }
  const data = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Refused(t("notImage"), 400));
    reader.readAsDataURL(blob);
  });
  return { data, name: file.name ?? "", url: URL.createObjectURL(blob) };
}

async function smaller(file) {
  let bitmap;
  try { bitmap = await createImageBitmap(file); } catch { throw new Refused(t("notImage"), 400); }
  const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve, reject) => canvas.toBlob(
    (blob) => (blob ? resolve(blob) : reject(new Refused(t("notImage"), 400))), "image/jpeg", 0.92,
  ));
}

export function node(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
