// The page: choose an image, type labels, see probabilities.

import { openExport, parseConfig, parseLabels, probabilities, selfTest } from './classifier.mjs';
import { normalize, readPixels } from './image.mjs';
import { Problem } from './problem.mjs';

const EXAMPLES = ['cat', 'rocket', 'coffee', 'astronaut'];
const LABELS = ['猫', '狗', '火箭', '宇航员', '一杯咖啡'];
const MAX_LABELS = 100;
const MAX_THREADS = 4;
const TYPING_PAUSE = 300; // milliseconds

const words = await (await fetch('words.json')).json();
const element = (id) => document.getElementById(id);
const labelEmbeddings = new Map();
let model;
let queue = Promise.resolve(); // of computations, one at a time
let waiting = 0;
const state = {
  language: navigator.language.startsWith('zh') ? 'zh' : 'en',
  image: null, // name and embedding
  status: ['loading', { done: '0', total: '?' }],
  problem: null,
  ranking: [], // [label, probability], best first
  details: null,
};

/** Return a text in the current language, with {name} replaced by values. */
function word(key, values = {}) {
  const text = key.split('.').reduce((level, part) => level[part], words[state.language]);
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

function percent(probability) {
  return `${(100 * probability).toFixed(1)}%`;
}

function set(changes) {
  Object.assign(state, changes);
  render();
}

function render() {
  const { language, problem, ranking, status, details, image } = state;
  document.documentElement.lang = language;
  document.title = word('title');
  for (const node of document.querySelectorAll('[data-word]')) {
    node.textContent = word(node.dataset.word);
  }
  for (const button of element('examples').children) {
    button.firstChild.alt = word(`names.${button.value}`);
    button.setAttribute('aria-pressed', button.value === image?.name);
  }
  element('language').textContent = words[language].other;
  element('language').lang = language === 'zh' ? 'en' : 'zh';
  element('preview').alt = image ? word('preview', image) : '';
  element('problem').textContent = problem ? word(`problems.${problem.problem}`, problem.values) : '';
  element('problem').hidden = !problem;
  element('status').textContent = status ? word(...status) : '';
  element('progress').hidden = model !== undefined || problem !== null;
  element('details').textContent = details ? word('details', details) : '';
  element('results').replaceChildren(...ranking.map(resultRow));
}

function resultRow([label, probability]) {
  const row = document.createElement('li');
  row.dataset.probability = probability;
  const [name, value, bar] = ['label', 'percent', 'bar'].map((className) => {
    const part = document.createElement('span');
    part.className = className;
    row.append(part);
    return part;
  });
  name.textContent = label;
  value.textContent = percent(probability);
  bar.style.setProperty('--width', probability);
  return row;
}

/** Run one computation after those before it; show what goes wrong. */
function enqueue(work) {
  waiting += 1;
  element('results').ariaBusy = true;
  queue = queue.then(async () => {
    try {
      await work();
    } catch (error) {
      const { message } = error;
      set({
        problem: error instanceof Problem ? error : new Problem('unexpected', { message }),
        status: null,
      });
    }
    waiting -= 1;
    element('results').ariaBusy = waiting > 0;
  });
}

/** Read a file of the model folder; `onBytes` gets the size of each piece as it arrives. */
async function readFile(name, onBytes = () => {}) {
  const chunks = [];
  try {
    const response = await fetch(`model/${name}`);
    if (!response.ok) throw new Error(response.statusText);
    const stream = response.body.getReader();
    for (let part = await stream.read(); !part.done; part = await stream.read()) {
      chunks.push(part.value);
      onBytes(part.value.length);
    }
    return new Uint8Array(await new Blob(chunks).arrayBuffer());
  } catch {
    throw new Problem('missingModel', { file: `model/${name}` });
  }
}

async function openModel() {
  const config = parseConfig(await readFile('config.json'));
  const sizes = Object.entries(config.files).filter(([name]) => !name.startsWith('golden/'));
  const total = sizes.reduce((sum, [, { bytes }]) => sum + bytes, 0);
  let done = 0;
  const onBytes = (count) => {
    done += count;
    element('progress').value = done / total;
    const [doneMB, totalMB] = [done, total].map((bytes) => (bytes / 1e6).toFixed(0));
    set({ status: ['loading', { done: doneMB, total: totalMB }] });
  };
  const threads = crossOriginIsolated ? Math.min(MAX_THREADS, navigator.hardwareConcurrency) : 1;
  const opened = await openExport(config, (name) => readFile(name, onBytes), {
    numThreads: threads,
    proxy: true, // in a worker: the page stays responsive
  });
  set({ status: ['testing'] });
  const golden = JSON.parse(new TextDecoder().decode(await readFile('golden/golden.json')));
  const cosine = await selfTest(opened, golden, async (name) =>
    prepare(new Blob([await readFile(`golden/${name}`)]), config),
  );
  model = opened;
  const { precision } = config;
  const shown = Math.floor(cosine * 1e5) / 1e5; // rounded down
  set({
    status: ['noImage'],
    details: { model: config.model.name, precision, threads, ms: '–', cosine: shown.toFixed(5) },
  });
}

async function prepare(blob, config) {
  const { vision, background, image_mean: mean, image_std: std } = config.model;
  return normalize(await readPixels(blob, vision.resolution, background), mean, std);
}

async function classify() {
  if (!model || !state.image) return;
  const labels = parseLabels(element('labels').value);
  if (labels.length < 2) throw new Problem('fewLabels');
  if (labels.length > MAX_LABELS) {
    throw new Problem('manyLabels', { count: labels.length, limit: MAX_LABELS });
  }
  const fresh = labels.filter((label) => !labelEmbeddings.has(label));
  if (fresh.length) set({ status: ['working'] });
  const embedded = await model.embedTexts(fresh);
  fresh.forEach((label, i) => labelEmbeddings.set(label, embedded[i]));
  const rows = labels.map((label) => labelEmbeddings.get(label));
  const values = probabilities(state.image.embedding, rows, model.config.logit_scale);
  const ranking = labels.map((label, i) => [label, values[i]]).sort((a, b) => b[1] - a[1]);
  const [label, probability] = ranking[0];
  set({ ranking, problem: null, status: ['best', { label, percent: percent(probability) }] });
}

async function useImage(blob, name) {
  if (!model) return; // it could not be opened, and the page says so
  set({ status: ['working'], problem: null });
  try {
    const pixels = await prepare(blob, model.config);
    const start = performance.now();
    const embedding = await model.embedImage(pixels);
    const ms = Math.round(performance.now() - start);
    showPreview(blob);
    set({ image: { name, embedding }, details: { ...state.details, ms } });
  } catch (error) {
    if (error instanceof Problem) Object.assign(error.values, { name });
    throw error;
  }
  await classify();
}

function showPreview(blob) {
  const preview = element('preview');
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(blob);
  preview.hidden = false;
}

function chooseFile(file) {
  if (file) enqueue(() => useImage(file, file.name));
}

function addExamples() {
  for (const name of EXAMPLES) {
    const button = document.createElement('button');
    button.type = 'button';
    button.value = name;
    const image = document.createElement('img');
    image.src = `vendor/${name}.jpg`;
    button.append(image);
    button.addEventListener('click', () =>
      enqueue(async () => useImage(await (await fetch(image.src)).blob(), name)),
    );
    element('examples').append(button);
  }
}

function listen() {
  let timer;
  element('labels').addEventListener('input', () => {
    clearTimeout(timer);
    timer = setTimeout(() => enqueue(classify), TYPING_PAUSE);
  });
  element('file').addEventListener('change', ({ target }) => {
    chooseFile(target.files[0]);
    target.value = ''; // the same file can be chosen again
  });
  element('language').addEventListener('click', () =>
    set({ language: state.language === 'zh' ? 'en' : 'zh' }),
  );
  document.addEventListener('paste', ({ clipboardData }) => chooseFile(clipboardData.files[0]));
  document.addEventListener('dragover', (event) => {
    event.preventDefault();
    document.body.classList.add('dragging');
  });
  document.addEventListener('dragleave', ({ relatedTarget }) => {
    if (!relatedTarget) document.body.classList.remove('dragging');
  });
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    document.body.classList.remove('dragging');
    chooseFile(event.dataTransfer.files[0]);
  });
}

element('labels').value = LABELS.join('\n');
addExamples();
listen();
render();
enqueue(openModel);
