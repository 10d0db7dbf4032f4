// Images and words: softmax over the labels, and cosines.

import { ask, node, readImage } from "./api.js";
import { t } from "./words.js";

const byId = (id) => document.getElementById(id);
let images = [];
let last = null; // the answer that is shown

export function startCompare() {
  byId("add-images").onclick = () => byId("compare-files").click();
  byId("compare-files").onchange = async (event) => {
    await add([...event.target.files]);
    event.target.value = "";
  };
  byId("clear-compare").onclick = () => {
    images = [];
    last = null;
    byId("labels").value = byId("template").value = "";
    byId("compare-table").hidden = true;
    showImages();
  };
  byId("compare-form").onsubmit = (event) => { event.preventDefault(); compare(); };
  const shown = () => !byId("view-compare").hidden;
  document.addEventListener("drop", (event) => { if (shown()) add([...event.dataTransfer.files]); });
  document.addEventListener("paste", (event) => { if (shown()) add([...event.clipboardData.files]); });
}

export function retranslateCompare() {
  showImages();
  if (last) showTable();
}

async function add(files) {
  for (const file of files.slice(0, 32)) {
    try { images.push(await readImage(file)); } catch (error) { say(error.message); }
  }
  showImages();
}

function showImages() {
  byId("compare-images").replaceChildren(...images.map((image) => node("button", {
    type: "button", className: "chip", title: t("remove"),
    onclick: () => { images = images.filter((other) => other !== image); showImages(); },
  }, node("img", { src: image.url, alt: `${t("remove")} ${image.name}` }))));
}

async function compare() {
  const labels = [...new Set(byId("labels").value.split(/[,，、\n]/).map((label) => label.trim()).filter(Boolean))];
  if (labels.length < 2) return say(t("needLabels"));
  if (!images.length) return say(t("needImages"));
  const template = byId("template").value.trim();
  say(t("searching"));
  try {
    const answer = await ask("/v1/classify", {
      body: { images: images.map((image) => image.data), labels, ...(template ? { templates: [template] } : {}) },
    });
    last = { labels, images: [...images], data: answer.data };
    say("");
    showTable();
  } catch (error) {
    say(error.message);
  }
}

function say(text) {
  byId("compare-status").textContent = text;
}

function showTable() {
  const head = node("tr", {}, node("th", { scope: "col", textContent: t("image") }),
    ...last.labels.map((label) => node("th", { scope: "col", textContent: label })));
  const rows = last.data.map((row, index) => {
    const image = last.images[index];
    const first = node("th", { scope: "row" }, node("img", { src: image.url, alt: image.name || `${t("image")} ${index + 1}` }));
    if (row.error) return node("tr", {}, first, node("td", { colSpan: last.labels.length, className: "error", textContent: row.error.message }));
    const by = new Map(row.predictions.map((prediction) => [prediction.label, prediction]));
    const best = row.predictions[0].label;
    return node("tr", {}, first, ...last.labels.map((label) => {
      const { probability, cosine } = by.get(label);
      const cell = node("td", { className: label === best ? "heat best" : "heat" },
        `${(100 * probability).toFixed(1)}%`, node("small", { textContent: cosine.toFixed(3) }));
      cell.style.setProperty("--heat", probability.toFixed(3));
      return cell;
    }));
  });
  byId("compare-table").replaceChildren(node("table", {}, node("thead", {}, head), node("tbody", {}, ...rows)));
  byId("compare-table").hidden = false;
}
