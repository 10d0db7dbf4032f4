// Uses the page in headless Chromium as a person does.
// Arguments: folder of the page, path of Chromium. Standard input: {url, broken, labels, images,
// pixels, bad}. Standard output: a report as JSON.

import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';

const [web, executablePath] = process.argv.slice(2);
const { chromium } = createRequire(`${web}/`)('playwright-core');
const { url, broken, labels, images, pixels, bad } = JSON.parse(readFileSync(0, 'utf8'));
const args = ['--no-sandbox', '--disable-gpu', '--disable-background-networking'];
const browser = await chromium.launch({ executablePath, args });
const report = { foreign: [], errors: [], results: {}, pixels: {}, problems: {} };

async function open(address, prepare = () => {}) {
  const page = await browser.newPage({ locale: 'en-US' });
  await prepare(page);
  page.on('pageerror', (error) => report.errors.push(error.message));
  page.on('request', (request) => {
    const local = [url, broken, 'blob:', 'data:'].some((start) => request.url().startsWith(start));
    if (!local) report.foreign.push(request.url());
  });
  await page.goto(address);
  await idle(page);
  return page;
}

const idle = (page) =>
  page.waitForFunction(() => document.getElementById('results').ariaBusy === 'false', null, {
    timeout: 120_000,
  });
const text = (page, id) => page.locator(`#${id}`).textContent();
const ranking = (page) =>
  page.$$eval('#results li', (rows) =>
    rows.map((row) => [row.querySelector('.label').textContent, Number(row.dataset.probability)]),
  );

async function setLabels(page, value) {
  await page.fill('#labels', value);
  await page.waitForTimeout(500); // the page waits for the end of typing
  await idle(page);
}

const page = await open(url);
report.isolated = await page.evaluate(() => crossOriginIsolated);
report.details = await text(page, 'details');
await setLabels(page, labels.join('\n'));
for (const file of images) {
  await page.setInputFiles('#file', file);
  await idle(page);
  report.results[file] = await ranking(page);
}
for (const path of pixels) {
  report.pixels[path] = await page.evaluate(async (image) => {
    const { readPixels } = await import('./image.mjs');
    const blob = await (await fetch(image)).blob();
    return Array.from(await readPixels(blob, 224, 'white'));
  }, path);
}
for (const [name, file] of Object.entries(bad)) {
  await page.setInputFiles('#file', file);
  await idle(page);
  report.problems[name] = await text(page, 'problem');
}
await setLabels(page, '猫，猫');
report.problems.fewLabels = await text(page, 'problem');
await setLabels(page, Array.from({ length: 101 }, (_, i) => `第${i}个`).join('\n'));
report.problems.manyLabels = await text(page, 'problem');
await setLabels(page, '猫，狗；火箭');
await page.focus('#examples button:nth-child(2)');
await page.keyboard.press('Enter');
await idle(page);
report.example = await ranking(page);
report.status = await text(page, 'status');
await page.click('#language');
report.chinese = [await text(page, 'status'), await page.title()];
report.alts = await page.$$eval('img', (all) => all.map((image) => image.alt));
const without = await open(broken);
report.problems.missingModel = await text(without, 'problem');
const wrong = await open(url, (fresh) =>
  fresh.route('**/golden.json', async (route) => {
    const response = await route.fetch();
    const golden = await response.json();
    golden.texts[0].embedding = golden.texts[1].embedding;
    await route.fulfill({ response, json: golden });
  }),
);
report.problems.wrongEmbeddings = await text(wrong, 'problem');
await browser.close();
console.log(JSON.stringify(report));
