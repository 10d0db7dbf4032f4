// The words of the page. Chinese first: most of its users read it.

const WORDS = {
  zh: {
    title: "图片搜索 · cn-clip", brand: "cn-clip", skip: "跳到内容", views: "视图",
    tabSearch: "搜索", tabCompare: "图文对比", otherLanguage: "English", logout: "退出",
    query: "描述要找的图片", placeholder: "描述要找的图片，例如：海边的日落", pick: "用图片搜索",
    search: "搜索", filters: "筛选", folder: "目录", anywhere: "全部", after: "不早于",
    before: "不晚于", minSide: "尺寸", anySize: "不限", clear: "清除",
    lead: "用一句话，找到你的图片", hint: "也可以拖入或粘贴一张图片。用权重和减号细调：2:猫 -室内",
    results: "搜索结果", dropHere: "松开即可用这张图片搜索", details: "图片详情",
    previous: "上一张", next: "下一张", close: "关闭", similar: "找相似图片", openImage: "查看大图",
    copyPath: "复制路径", copied: "已复制", library: "图库", indexing: "索引进度",
    startIndex: "更新图库", login: "登录", loginHint: "此服务需要 API 密钥。", key: "API 密钥",
    enter: "进入", wrongKey: "密钥无效", remove: "移除这张图片", searching: "正在搜索…",
    found: (n, more) => `${more ? "已显示" : "共"} ${n} 个结果`,
    missingParts: (n) => `${n} 个分部没有应答，结果不全`,
    nothing: "没有匹配的图片", nothingMore: "以下是最接近的结果。", noImages: "没有符合筛选条件的图片",
    weaker: "以下结果可能不匹配", images: (n) => `${n} 张图片`, probability: "匹配概率",
    cosine: "余弦相似度", size: "像素", taken: "拍摄时间", caption: "描述", text: "图中文字",
    path: "位置", copies: "相同文件", why: "匹配来源", whyImage: "图像", whyText: "图中文字",
    whyCaption: "描述", model: "模型", unreadable: "无法读取的文件",
    files: (n) => `${n} 个文件`, indexRunning: (done, total) => total === null ? "正在列出文件…" : `${done} / ${total} 个文件`,
    indexDone: (s) => `已完成：新增 ${s.new}，更改 ${s.changed}，删除 ${s.deleted}，失败 ${s.failed}`,
    indexFailed: (e) => `未完成：${e}`, noLibrary: "此服务没有图库，但可以对比图片与文字。",
    compareTitle: "图片与文字对比", compareHint: "给出几个标签和几张图片：每张图片在各标签上的概率（softmax）和余弦相似度。",
    labels: "标签（逗号或换行分隔）", labelsPlaceholder: "猫，狗，火箭", template: "模板（可选）",
    templatePlaceholder: "一张{}的照片", addImages: "添加图片…", compare: "对比", table: "对比结果",
    image: "图片", needLabels: "请给出至少两个不同的标签", needImages: "请添加图片",
    busy: "服务器繁忙，请稍后再试", offline: "无法连接服务器", notImage: "这不是可以读取的图片",
    examples: ["海边的日落", "一只猫", "红色的汽车", "雪山", "吃饭的人们", "文字海报"],
  },
  en: {
    title: "Image search · cn-clip", brand: "cn-clip", skip: "Skip to content", views: "Views",
    tabSearch: "Search", tabCompare: "Compare", otherLanguage: "中文", logout: "Log out",
    query: "Describe the image", placeholder: "Describe an image, in Chinese: 海边的日落",
    pick: "Search by image", search: "Search", filters: "Filters", folder: "Folder",
    anywhere: "Anywhere", after: "From", before: "To", minSide: "Size", anySize: "Any",
    clear: "Clear", lead: "Find your images with one sentence",
    hint: "Or drop or paste an image. Weights and minus refine a query: 2:猫 -室内",
    results: "Results", dropHere: "Drop to search with this image", details: "Image details",
    previous: "Previous", next: "Next", close: "Close", similar: "Similar images",
    openImage: "Open image", copyPath: "Copy path", copied: "Copied", library: "Library",
    indexing: "Index progress", startIndex: "Update library", login: "Log in",
    loginHint: "This server needs an API key.", key: "API key", enter: "Log in",
    wrongKey: "The key is not valid", remove: "Remove this image", searching: "Searching…",
    found: (n, more) => `${n} result${n === 1 ? "" : "s"}${more ? " so far" : ""}`,
    missingParts: (n) => `${n} part${n === 1 ? "" : "s"} did not answer: results are incomplete`,
    nothing: "Nothing here matches", nothingMore: "These are the nearest images.",
    noImages: "No image meets the filters", weaker: "These may not match",
    images: (n) => `${n} image${n === "1" ? "" : "s"}`, probability: "Probability of a match",
    cosine: "Cosine", size: "Pixels", taken: "Taken", caption: "Caption", text: "Text in the image",
    path: "Place", copies: "Same file", why: "Matched by", whyImage: "image", whyText: "text in it",
    whyCaption: "caption", model: "Model", unreadable: "Unreadable files",
    files: (n) => `${n} file${n === "1" ? "" : "s"}`,
    indexRunning: (done, total) => total === null ? "Listing files…" : `${done} of ${total} files`,
    indexDone: (s) => `Done: ${s.new} new, ${s.changed} changed, ${s.deleted} deleted, ${s.failed} failed`,
    indexFailed: (e) => `Not completed: ${e}`,
    noLibrary: "This server has no library; it can compare images with words.",
    compareTitle: "Images and words", compareHint: "Give some labels and images: the probability of each label (softmax) and its cosine, for each image.",
    labels: "Labels (separated by commas or lines)", labelsPlaceholder: "猫，狗，火箭",
    template: "Template (optional)", templatePlaceholder: "一张{}的照片", addImages: "Add images…",
    compare: "Compare", table: "Result", image: "Image",
    needLabels: "Give at least two different labels", needImages: "Add an image",
    busy: "The server is busy; try again in a moment", offline: "The server does not answer",
    notImage: "This is not a readable image",
    examples: ["海边的日落", "一只猫", "红色的汽车", "雪山", "吃饭的人们", "文字海报"],
  },
};

const KEY = "cn-clip-language";
let language = "en";

export function t(name, ...values) {
  const word = WORDS[language][name];
  return typeof word === "function" ? word(...values) : word;
}

export const shownLanguage = () => language;
export const number = (value) => value.toLocaleString(language);

export function startLanguage() {
  let stored = null;
  try { stored = localStorage.getItem(KEY); } catch { /* storage is off */ }
  const wanted = stored ?? (navigator.languages ?? [navigator.language])[0] ?? "zh";
  setLanguage(wanted.toLowerCase().startsWith("zh") ? "zh" : "en");
}

export function toggleLanguage() {
  setLanguage(language === "zh" ? "en" : "zh");
  try { localStorage.setItem(KEY, language); } catch { /* storage is off */ }
}

function setLanguage(value) {
  language = value;
  document.documentElement.lang = value === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-pixels]")) node.textContent = `≥ ${node.dataset.pixels} px`;
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", t(node.dataset.label));
  for (const node of document.querySelectorAll("[data-title]")) node.title = t(node.dataset.title);
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = t(node.dataset.placeholder);
}
