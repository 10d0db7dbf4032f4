// Images to pixels: the preprocessing of the model, in the browser.

import resize from './vendor/resize/index.js';
import { Problem } from './problem.mjs';

const MAX_PIXELS = 50e6; // resizing takes about 20 bytes per pixel

/**
 * Decode an image and resize it to S x S; the aspect ratio is not kept.
 *
 * @param blob - the content of a file
 * @param size - S
 * @param background - colour behind transparent pixels; without it their own colour is used
 * @returns RGBA pixels, Uint8ClampedArray of S * S * 4
 */
export async function readPixels(blob, size, background) {
  await checkSize(blob);
  const bitmap = await createImageBitmap(blob, {
    colorSpaceConversion: 'none',
    premultiplyAlpha: 'none',
  }).catch(() => {
    throw new Problem('notAnImage');
  });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true });
  if (background) {
    context.fillStyle = background;
    context.fillRect(0, 0, width, height);
  }
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const pixels = context.getImageData(0, 0, width, height);
  return (await shrink(pixels, size)).data;
}

/** Return `(pixels / 255 - mean) / std` of RGBA pixels: Float32Array of (3, S, S). */
export function normalize(pixels, mean, std) {
  const count = pixels.length / 4;
  const planes = new Float32Array(3 * count);
  for (let channel = 0; channel < 3; channel += 1) {
    for (let i = 0; i < count; i += 1) {
      planes[channel * count + i] = (pixels[4 * i + channel] / 255 - mean[channel]) / std[channel];
    }
  }
  return planes;
}

/**
 * Resize to S x S as Pillow does: with the bicubic filter, which is Catmull-Rom and is widened to
 * shrink an image, and in two passes, each rounded to 8 bits. Their order is that of Pillow 13.
 */
async function shrink(pixels, size) {
  const { width, height } = pixels;
  if (width === size && height === size) return pixels;
  const filter = { method: 'catrom', linearRGB: false, premultiply: false };
  const verticalFirst = height > size && height - size > 2 * (width - size);
  const between = verticalFirst ? { width, height: size } : { width: size, height };
  const passed = await resize(pixels, { ...filter, ...between });
  return resize(passed, { ...filter, width: size, height: size });
}

/** Read the size in a file's header, before all its pixels are decoded. */
async function checkSize(blob) {
  const image = new Image();
  image.src = URL.createObjectURL(blob);
  try {
    await new Promise((resolve, reject) => {
      image.onload = resolve;
      image.onerror = () => reject(new Problem('notAnImage'));
    });
  } finally {
    URL.revokeObjectURL(image.src);
  }
  const { naturalWidth: width, naturalHeight: height } = image;
  if (width * height > MAX_PIXELS) {
    throw new Problem('tooLarge', { width, height, limit: MAX_PIXELS / 1e6 });
  }
}
