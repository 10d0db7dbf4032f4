// Embeds texts and images with the page's own modules in Node.
// Arguments: folder of the page, folder of the export. Standard input: {texts, images}; images are
// files of RGBA pixels. Standard output: {ids, texts, images, cosine}.

import { readFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';

const [web, folder] = process.argv.slice(2);
const input = JSON.parse(readFileSync(0, 'utf8'));
const load = (name) => import(pathToFileURL(`${web}/${name}`));
const { openExport, parseConfig, selfTest } = await load('classifier.mjs');
const { normalize } = await load('image.mjs');

const read = async (name) => readFileSync(`${folder}/${name}`);
const config = parseConfig(await read('config.json'));
const model = await openExport(config, read, { numThreads: 1 });
const { image_mean: mean, image_std: std } = config.model;
const pixels = (file) => normalize(readFileSync(file), mean, std);

const images = [];
for (const file of input.images) images.push(Array.from(await model.embedImage(pixels(file))));
const texts = (await model.embedTexts(input.texts)).map((row) => Array.from(row));
const golden = JSON.parse(await read('golden/golden.json'));
const cosine = await selfTest(model, golden, async (name) =>
  pixels(input.images.find((file) => file.includes(name))),
);
console.log(JSON.stringify({ ids: input.texts.map(model.tokenize), texts, images, cosine }));
