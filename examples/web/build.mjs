// Copies what the page needs from node_modules and ../ into vendor/. Nothing is bundled: the copied
// files are the modules that the page imports.

import { cpSync, mkdirSync, rmSync, statSync } from 'node:fs';

const FILES = {
  'node_modules/onnxruntime-web/dist/': [
    'ort.wasm.min.mjs',
    'ort-wasm-simd-threaded.mjs',
    'ort-wasm-simd-threaded.wasm',
  ],
  'node_modules/@huggingface/tokenizers/dist/': ['tokenizers.min.mjs'],
  'node_modules/@jsquash/': ['resize'],
  '../': ['cat.jpg', 'rocket.jpg', 'coffee.jpg', 'astronaut.jpg'],
};

process.chdir(import.meta.dirname);
rmSync('vendor', { recursive: true, force: true });
mkdirSync('vendor');
for (const [folder, names] of Object.entries(FILES)) {
  for (const name of names) cpSync(folder + name, `vendor/${name}`, { recursive: true });
}
const wasm = statSync('vendor/ort-wasm-simd-threaded.wasm').size;
console.log(`vendor/ is ready; the wasm of onnxruntime-web has ${(wasm / 1e6).toFixed(1)} MB`);
