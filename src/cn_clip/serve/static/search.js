// The search: a query of words, images and images of the library; results that load as one scrolls.

import { ask, node, readImage } from "./api.js";
import { number, t } from "./words.js";

const byId = (id) => document.getElementById(id);
const PAGE = 40;
const PAUSE = 250; // milliseconds after the last key before a search starts
const LIMIT = 1000;

const state = { images: [], like: [], hits: [], more: false, loading: null, divided: false };
let timer = 0;
let opened = -1; // index of the hit in the details

export function startSearch() {
  const query = byId("query");
  byId("form").addEventListener("submit", (event) => { event.preventDefault(); search(); });
  let composing = false; // of an input method: letters of pinyin are no query
  query.addEventListener("compositionstart", () => { composing = true; clearTimeout(timer); });
  query.addEventListener("compositionend", () => { composing = false; searchSoon(); });
  query.addEventListener("input", () => { if (!composing) searchSoon(); });
  for (const id of ["folder", "after", "before", "min-side"]) byId(id).addEventListener("change", search);
  byId("clear-filters").addEventListener("click", () => { clearFilters(); search(); });
  byId("pick").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", (event) => {
    if (event.target.files[0]) searchByFile(event.target.files[0]);
    event.target.value = "";
  });
  window.addEventListener("hashchange", readAddress);
  new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) loadMore();
  }, { rootMargin: "800px" }).observe(byId("more"));
  byId("grid").addEventListener("keydown", moveInGrid);
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName);
    if (event.key === "/" && !typing && !document.querySelector("dialog[open]")) {
      event.preventDefault();
      query.focus();
    }
  });
  startDrop();
  startDetails();
}

export function showExamples() {
  byId("examples").replaceChildren(...t("examples").map((text) => node("button", {
    type: "button", textContent: text,
    onclick: () => { byId("query").value = text; search(); },
  })));
}

export function retranslate() {
  showExamples();
  if (!byId("welcome").hidden) return;
  showStatus();
  const hits = state.hits;
  state.hits = [];
  byId("grid").replaceChildren();
  append(hits);
}

// What is asked for, in the address: back and forward work, and links can be kept.

export function readAddress() {
  if (location.hash === "#compare") return;
  const values = new URLSearchParams(location.hash.slice(1));
  if (values.toString() === address().toString()) return;
  byId("query").value = values.get("q") ?? "";
  state.like = values.getAll("like").map(Number).filter(Number.isSafeInteger);
  state.images = [];
  for (const [id, name] of FILTERS) byId(id).value = values.get(name) ?? "";
  run();
}

const FILTERS = [["folder", "folder"], ["after", "after"], ["before", "before"], ["min-side", "side"]];

function address() {
  const values = new URLSearchParams();
  const query = byId("query").value.trim();
  if (query) values.set("q", query);
  for (const id of state.like) values.append("like", id);
  for (const [id, name] of FILTERS) if (byId(id).value) values.set(name, byId(id).value);
  return values;
}

function searchSoon() {
  clearTimeout(timer);
  timer = setTimeout(() => search(true), PAUSE);
}

function search(typing = false) {
  clearTimeout(timer);
  const hash = `#${address()}`;
  if (hash !== location.hash) history[typing === true ? "replaceState" : "pushState"](null, "", hash);
  run();
}

export async function searchByFile(file) {
  try {
    state.images = [await readImage(file)];
  } catch (error) {
    showFailure(error);
    return;
  }
  state.like = [];
  byId("query").value = "";
  search();
}

function request(offset) {
  const side = byId("min-side").value;
  const filters = {
    folder: byId("folder").value || null, after: byId("after").value || null,
    before: byId("before").value || null, min_side: side ? Number(side) : null,
  };
  return {
    query: byId("query").value, images: state.images.map((image) => image.data), like: state.like,
    k: Math.min(PAGE, LIMIT - offset), offset, filters,
  };
}

async function run() {
  state.loading?.abort();
  showChips();
  const asked = byId("query").value.trim() || state.images.length || state.like.length;
  byId("welcome").hidden = Boolean(asked);
  byId("notice").hidden = true;
  const count = FILTERS.filter(([id]) => byId(id).value).length;
  byId("filter-count").hidden = !count;
  byId("filter-count").textContent = count;
  if (!asked) {
    Object.assign(state, { hits: [], more: false, loading: null });
    byId("grid").replaceChildren();
    byId("status").textContent = "";
    return;
  }
  const loading = state.loading = new AbortController();
  byId("status").textContent = t("searching");
  byId("grid").classList.add("stale");
  if (!byId("grid").children.length) {
    byId("grid").replaceChildren(...Array.from({ length: 12 }, () => node("li", { className: "waiting" })));
  }
  try {
    const answer = await ask("/v1/search", { body: request(0), signal: loading.signal });
    Object.assign(state, { hits: [], more: answer.more, loading: null, divided: answer.nothing_matches });
    state.missing = answer.parts?.missing.length ?? 0; // of a server in front of parts
    byId("grid").replaceChildren();
    if (answer.nothing_matches) showNothing(answer.hits.length > 0);
    append(answer.hits);
    showStatus();
    window.scrollTo({ top: 0 });
  } catch (error) {
    if (error.name !== "AbortError") showFailure(error);
  } finally {
    if (state.loading === null || state.loading === loading) byId("grid").classList.remove("stale");
  }
}

async function loadMore() {
  if (!state.more || state.loading || state.hits.length >= LIMIT) return;
  const loading = state.loading = new AbortController();
  try {
    const answer = await ask("/v1/search", { body: request(state.hits.length), signal: loading.signal });
    state.more = answer.more && answer.hits.length > 0;
    state.missing = answer.parts?.missing.length ?? 0;
    append(answer.hits);
    showStatus();
  } catch (error) {
    if (error.name !== "AbortError") { state.more = false; showFailure(error); }
  } finally {
    if (state.loading === loading) state.loading = null;
  }
}

function append(hits) {
  const grid = byId("grid");
  for (const hit of hits) {
    if (!hit.matches && !state.divided) { // the first that may not match
      state.divided = true;
      if (state.hits.length) grid.append(node("li", { className: "divider", textContent: t("weaker") }));
    }
    grid.append(tile(hit, state.hits.length));
    state.hits.push(hit);
  }
}

function tile(hit, index) {
  const name = nameOf(hit);
  const image = node("img", { src: hit.thumbnail, alt: hit.caption || name, loading: "lazy", decoding: "async" });
  const ratio = hit.width / hit.height;
  const whole = ratio > 1.9 || ratio < 0.53; // cut to a square, little of it would be left
  const frame = node("span", { className: whole ? "frame whole" : "frame" }, image);
  image.onerror = () => { image.remove(); frame.classList.add("broken"); };
  const button = node("button", {
    type: "button", className: hit.matches ? "tile" : "tile weak", title: hit.path,
    onclick: () => showDetails(index),
  }, frame);
  // Where only its text matched, a figure of the image would mislead.
  if (hit.probability !== null || hit.why.includes("image")) button.append(node("span", { className: "score", textContent: score(hit) }));
  const other = hit.why.filter((reason) => reason !== "image");
  if (other.length) button.append(node("span", { className: "why", textContent: other.map(reasonOf).join(" · ") }));
  button.append(node("span", { className: "name", textContent: hit.caption || name }));
  return node("li", {}, button);
}

const nameOf = (hit) => hit.path.split("/").pop();
const reasonOf = (reason) => t(`why${reason[0].toUpperCase()}${reason.slice(1)}`) ?? reason;
const score = (hit) => (hit.probability === null ? hit.cosine.toFixed(2) : `${Math.round(100 * hit.probability)}%`);

function showStatus() {
  const found = state.hits.length ? t("found", number(state.hits.length), state.more) : "";
  const missing = state.missing ? t("missingParts", state.missing) : "";
  byId("status").textContent = [found, missing].filter(Boolean).join(" · ");
}

function showNothing(some) {
  const notice = byId("notice");
  notice.className = "notice";
  const head = some || !FILTERS.some(([id]) => byId(id).value) ? t("nothing") : t("noImages");
  notice.replaceChildren(node("strong", { textContent: head }), ...(some ? [t("nothingMore")] : []));
  notice.hidden = false;
}

function showFailure(error) {
  state.loading = null;
  byId("status").textContent = "";
  byId("grid").replaceChildren();
  state.hits = [];
  const notice = byId("notice");
  notice.className = "notice failed";
  notice.textContent = error.message;
  notice.hidden = false;
  byId("welcome").hidden = true;
}

function showChips() {
  const drop = (list, item) => () => { state[list] = state[list].filter((other) => other !== item); search(); };
  const chip = (src, onclick) => node("button", { type: "button", className: "chip", title: t("remove"), onclick },
    node("img", { src, alt: t("remove") }));
  byId("chips").replaceChildren(
    ...state.images.map((image) => chip(image.url, drop("images", image))),
    ...state.like.map((id) => chip(`/v1/images/${id}/thumbnail`, drop("like", id))),
  );
}

function clearFilters() {
  for (const [id] of FILTERS) byId(id).value = "";
}

function moveInGrid(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const down = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step && !down) return;
  const tiles = [...byId("grid").querySelectorAll(".tile")];
  const at = tiles.indexOf(document.activeElement);
  if (at < 0) return;
  event.preventDefault();
  const top = tiles[at].offsetTop;
  const columns = tiles.findIndex((other, index) => index > 0 && other.offsetTop !== tiles[0].offsetTop);
  const target = step ? at + step : at + down * (columns > 0 ? columns : 1);
  (tiles[target] ?? (down > 0 && tiles.at(-1).offsetTop > top ? tiles.at(-1) : null))?.focus();
}

// An image dropped or pasted anywhere.

function startDrop() {
  let depth = 0;
  const hasFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const show = (on) => { byId("drop").hidden = !on; };
  const searching = () => !byId("view-search").hidden;
  document.addEventListener("dragenter", (event) => { if (hasFile(event) && searching()) { depth += 1; show(true); } });
  document.addEventListener("dragleave", (event) => { if (hasFile(event)) { depth = Math.max(0, depth - 1); if (!depth) show(false); } });
  document.addEventListener("dragover", (event) => { if (hasFile(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    depth = 0;
    show(false);
    const file = event.dataTransfer.files[0];
    if (file && searching()) searchByFile(file);
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((item) => item.type.startsWith("image/"));
    if (file && searching()) { event.preventDefault(); searchByFile(file); }
  });
}

// One image, large, with its facts.

function startDetails() {
  const dialog = byId("details");
  byId("close-details").onclick = () => dialog.close();
  dialog.onclick = (event) => { if (event.target === dialog) dialog.close(); };
  dialog.onclose = () => byId("grid").querySelectorAll(".tile")[opened]?.focus();
  byId("previous").onclick = () => showDetails(opened - 1);
  byId("next").onclick = () => showDetails(opened + 1);
  dialog.onkeydown = (event) => {
    if (event.key === "ArrowLeft") showDetails(opened - 1);
    if (event.key === "ArrowRight") showDetails(opened + 1);
  };
  byId("similar").onclick = () => {
    Object.assign(state, { like: [state.hits[opened].id], images: [] });
    byId("query").value = "";
    opened = -1;
    dialog.close();
    search();
  };
  byId("copy-path").onclick = async () => {
    await navigator.clipboard?.writeText(state.hits[opened].path);
    byId("copy-path").textContent = t("copied");
    setTimeout(() => { byId("copy-path").textContent = t("copyPath"); }, 1500);
  };
}

function showDetails(index) {
  const hit = state.hits[index];
  if (!hit) return;
  opened = index;
  const image = byId("details-image");
  image.src = hit.thumbnail; // at once; the large one replaces it
  image.alt = hit.caption || nameOf(hit);
  const large = new Image();
  large.onload = () => { if (opened === index) image.src = large.src; };
  large.src = `${hit.image}?side=2048`;
  byId("details-name").textContent = nameOf(hit);
  const facts = [
    ["path", hit.path],
    ["probability", hit.probability === null ? null : `${(100 * hit.probability).toFixed(1)}%`],
    ["cosine", hit.cosine.toFixed(4)],
    ["why", hit.why.map(reasonOf).join(" · ")],
    ["size", `${hit.width} × ${hit.height}`],
    ["taken", hit.taken?.replace("T", " ")],
    ["caption", hit.caption],
    ["text", hit.text],
    ["copies", hit.copies.join("\n")],
  ];
  byId("details-facts").replaceChildren(...facts.filter(([, value]) => value).map(([name, value]) => node("div", {},
    node("dt", { textContent: t(name) }), node("dd", { textContent: value }))));
  byId("open-image").href = `${hit.image}?side=4096`;
  byId("previous").hidden = index === 0;
  byId("next").hidden = index === state.hits.length - 1;
  if (index > state.hits.length - 5) loadMore();
  if (!byId("details").open) byId("details").showModal();
}
