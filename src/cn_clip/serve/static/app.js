// The page: language, views, the state of the library.

import { ask, node } from "./api.js";
import { retranslateCompare, startCompare } from "./compare.js";
import { readAddress, retranslate, showExamples, startSearch } from "./search.js";
import { number, startLanguage, t, toggleLanguage } from "./words.js";

const byId = (id) => document.getElementById(id);
let library = null;
let answers = true; // whether the server did so last time

function showView() {
  const compare = location.hash === "#compare";
  byId("view-search").hidden = compare;
  byId("view-compare").hidden = !compare;
  for (const [id, on] of [["tab-search", !compare], ["tab-compare", compare]]) {
    if (on) byId(id).setAttribute("aria-current", "page");
    else byId(id).removeAttribute("aria-current");
  }
}

async function showLibrary() {
  try {
    library = await ask("/v1/library");
    answers = true;
  } catch (error) {
    answers = false;
    if (error.status === 404 && !library) { // a model alone
      byId("tab-search").hidden = true;
      if (location.hash !== "#compare") location.hash = "#compare";
      byId("compare-status").textContent = t("noLibrary");
    }
    return;
  }
  drawLibrary();
}

function drawLibrary() {
  if (!library) return;
  const running = library.index?.running ?? false;
  byId("library-button").hidden = false;
  const [before, after] = t("images", "|").split("|"); // a phone shows the number alone
  const unit = (textContent) => node("span", { className: "unit", textContent });
  byId("library-count").replaceChildren(unit(before), number(library.images), unit(after));
  byId("library-button").setAttribute("aria-label", `${t("library")}: ${t("images", number(library.images))}`);
  byId("library-button").querySelector(".dot").classList.toggle("busy", running);
  byId("library-name").textContent = library.name;
  const facts = [
    [t("model"), library.model ?? "–"],
    [t("images", number(library.images)), ""],
    ...library.roots.map((root) => [root.name, t("files", number(root.files))]),
    ...(library.unreadable ? [[t("unreadable"), number(library.unreadable)]] : []),
  ];
  byId("library-facts").replaceChildren(...facts.map(([name, value]) => node("div", {},
    node("dt", { textContent: name }), node("dd", { textContent: value }))));
  byId("folders").replaceChildren(...library.roots.map((root) => node("option", { value: root.name })));
  byId("index").hidden = !library.may_index;
  byId("start-index").disabled = running;
  const bar = byId("index-progress");
  bar.hidden = !running;
  const state = library.index;
  if (running && state.total) { bar.max = state.total; bar.value = state.done; } else bar.removeAttribute("value");
  byId("index-status").textContent = !state ? ""
    : running ? t("indexRunning", number(state.done ?? 0), state.total == null ? null : number(state.total))
    : state.error ? t("indexFailed", state.error) : state.new === undefined ? "" : t("indexDone", state);
}

async function follow() {
  while (true) {
    const soon = answers && (library?.index?.running || byId("library").open);
    await new Promise((resolve) => setTimeout(resolve, soon ? 1000 : 30000));
    if (!document.hidden && library) await showLibrary();
  }
}

startLanguage();
startSearch();
startCompare();
showExamples();
showView();
readAddress();
window.addEventListener("hashchange", showView);
byId("language").onclick = () => { toggleLanguage(); retranslate(); retranslateCompare(); drawLibrary(); };
byId("library-button").onclick = () => { showLibrary(); byId("library").showModal(); };
byId("close-library").onclick = () => byId("library").close();
byId("library").onclick = (event) => { if (event.target === byId("library")) byId("library").close(); };
byId("start-index").onclick = async () => {
  byId("start-index").disabled = true;
  try {
    await ask("/v1/library/index", { body: {} });
  } catch (error) {
    byId("index-status").textContent = error.message;
  }
  await new Promise((resolve) => setTimeout(resolve, 700));
  await showLibrary();
};
byId("logout").onclick = async () => { await ask("/logout", { body: {} }); location.reload(); };
showLibrary().then(follow);
ask("/session").then(({ key }) => { byId("logout").hidden = !key; }, () => {});
if (matchMedia("(pointer: fine)").matches && location.hash !== "#compare") byId("query").focus();
