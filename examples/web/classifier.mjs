// A model exported by `cn-clip export`, run by onnxruntime-web in the browser or in Node.

import * as ort from './vendor/ort.wasm.min.mjs';
import { Tokenizer } from './vendor/tokenizers.min.mjs';
import { Problem } from './problem.mjs';

const TEXT_BATCH = 32;
const LENGTH_STEP = 8; // text lengths are padded to multiples of it
const ALLOWED = { float32: 1e-5, float16: 1e-3, int8: 1e-3 }; // 1 - cosine that rounding explains

/** Parse the content of an export's config.json. */
export function parseConfig(content) {
  try {
    const config = parse(content);
    if (config.format === 'cn-clip export' && config.runtime === 'onnx') return config;
  } catch {
    // not JSON
  }
  throw new Problem('notAnExport');
}

/**
 * Open an export.
 *
 * @param config - from `parseConfig`
 * @param read - returns the content of a file of the export, Uint8Array, by name
 * @param wasm - settings of onnxruntime-web, such as `numThreads`
 * @returns the model: its config, `tokenize`, `embedImage`, `embedTexts`
 */
export async function openExport(config, read, wasm) {
  Object.assign(ort.env.wasm, wasm);
  const tokenizer = new Tokenizer(
    parse(await read('tokenizer.json')),
    parse(await read('tokenizer_config.json')),
  );
  const image = await openGraph(read, config, config.image);
  const text = await openGraph(read, config, config.text);
  const longest = config.model.context_length;

  function tokenize(value) {
    const { ids } = tokenizer.encode(value);
    return ids.length <= longest ? ids : [...ids.slice(0, longest - 1), ids.at(-1)];
  }

  /** Embed normalised pixels, Float32Array of (3, S, S): a unit vector. */
  async function embedImage(pixels) {
    const size = config.model.vision.resolution;
    const [row] = await run(image, new ort.Tensor('float32', pixels, [1, 3, size, size]));
    return row;
  }

  /** Embed lists of token ids: a unit vector each. */
  async function embedTokens(rows) {
    const length = Math.min(longest, roundUp(Math.max(...rows.map((ids) => ids.length))));
    const data = new BigInt64Array(rows.length * length); // 0 is padding
    rows.forEach((ids, row) => data.set(ids.map(BigInt), row * length));
    return run(text, new ort.Tensor('int64', data, [rows.length, length]));
  }

  /** Embed texts: a unit vector each, in order. */
  async function embedTexts(texts) {
    const embeddings = [];
    for (let start = 0; start < texts.length; start += TEXT_BATCH) {
      const rows = texts.slice(start, start + TEXT_BATCH).map(tokenize);
      embeddings.push(...(await embedTokens(rows)));
    }
    return embeddings;
  }

  return { config, tokenize, embedImage, embedTexts };
}

/**
 * Compare a model with the golden vectors of its export.
 *
 * @param model - from `openExport`
 * @param golden - content of golden/golden.json
 * @param prepare - returns the normalised pixels of a golden image by its file name
 * @returns the smallest cosine, over all images and texts
 */
export async function selfTest(model, golden, prepare) {
  const { config } = model;
  const images = [];
  for (const { file } of golden.images) images.push(await model.embedImage(await prepare(file)));
  const texts = await model.embedTexts(golden.texts.map(({ text }) => text));
  const worst = {};
  for (const [tower, actual, expected] of [
    ['image', images, golden.images],
    ['text', texts, golden.texts],
  ]) {
    worst[tower] = Math.min(...actual.map((row, i) => dot(row, expected[i].embedding)));
    const exported = config.precision === 'int8' ? 2 * config.deviation[tower] : 0;
    if (!(1 - worst[tower] <= ALLOWED[config.precision] + exported)) {
      throw new Problem('wrongEmbeddings', { cosine: worst[tower].toFixed(6) });
    }
  }
  return Math.min(worst.image, worst.text);
}

/** Return the probability of each label: softmax of the scaled cosines, as `cn_clip.classify`. */
export function probabilities(imageEmbedding, labelEmbeddings, logitScale) {
  const logits = labelEmbeddings.map((row) => logitScale * dot(row, imageEmbedding));
  const largest = Math.max(...logits);
  const weights = logits.map((logit) => Math.exp(logit - largest));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

/** Return the distinct labels in a text: one per line, or separated by commas. */
export function parseLabels(text) {
  return [...new Set(text.split(/[\n,，、;；]/).map((label) => label.trim()))].filter(Boolean);
}

function parse(content) {
  return JSON.parse(new TextDecoder().decode(content));
}

async function openGraph(read, config, graph) {
  const data = `${graph.file}.data`;
  const externalData = data in config.files ? [{ path: data, data: await read(data) }] : [];
  const content = await read(graph.file);
  const session = await ort.InferenceSession.create(content, { externalData });
  return { session, ...graph };
}

async function run({ session, input, output }, tensor) {
  const { data, dims } = (await session.run({ [input]: tensor }))[output];
  const [rows, dim] = dims;
  return Array.from({ length: rows }, (_, i) => unit(data.slice(i * dim, (i + 1) * dim)));
}

function unit(row) {
  const norm = Math.sqrt(dot(row, row));
  return row.map((value) => value / norm);
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i += 1) sum += a[i] * b[i];
  return sum;
}

function roundUp(length) {
  return Math.ceil(length / LENGTH_STEP) * LENGTH_STEP;
}
