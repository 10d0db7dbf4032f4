"""Search by the text in images: signs, screenshots, packaging and memes among the 468 things.

    python benchmarks/text_in_images.py --stamps DIR --fonts DIR [DIR ...] --photos DIR [DIR ...]

Stamps: see things468.py; without --stamps they are downloaded. Fonts: folders with Chinese TrueType
or OpenType files, such as those of the Debian packages fonts-noto-cjk, fonts-wqy-microhei,
fonts-wqy-zenhei, fonts-arphic-ukai, fonts-arphic-uming and fonts-lxgw-wenkai (``apt-get download``
and ``dpkg -x`` need no root). Photos, under the texts: the package's sample, and folders such as
scikit-image's ``data``.

--count images are drawn, each with a text of its own in one font and size. The gallery is the stamps
and these images; it is searched by image embedding alone, and fused with the recognised text
(cn_clip.search.fusion). Queries, each with every image whose drawn text contains it as positives:

- "text": the drawn text, without the small print;
- "part": 2 to 4 neighbouring characters of it;
- "described": the text in a sentence, such as 写着“营业中”的牌子;
- "text-free": the captions of the stamps, whose positives are stamps.

Recall is in percent, with the 95 % bootstrap interval of the paired gain. The constants of the
fusion were chosen with --seed 1 to 3; report other seeds. --save writes the true and the recognised
texts for fulltext.py.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from things468 import fetch, on_white, things

import cn_clip
from cn_clip.eval.metrics.bootstrap import paired_interval
from cn_clip.processes import cpu_info
from cn_clip.sample import embedded_sample
from cn_clip.search.fulltext import fold, units
from cn_clip.search.fusion import TextIndex, fuse
from cn_clip.search.ocr import TextReader

NAMES = "老王 锦绣 福满楼 小南国 张记 李记 同仁 百家 新华 蓝天 金龙 好又来 江南春 蜀香 云边 半亩 拾光 旺财 东海 大熊猫 红苹果 长颈鹿 小白兔 月亮 太阳花".split()
SHOPS = "面馆 火锅城 大药房 书店 理发店 五金建材 水果超市 烤鸭店 茶馆 奶茶铺 洗衣店 眼镜行 服装店 牛肉拉面 包子铺 海鲜酒楼 电动车行 宠物医院 照相馆 花店 早餐店 家具城 文具店 便利店".split()
NOTICES = "禁止吸烟 小心地滑 请勿触摸 安全出口 闲人免进 注意安全 营业中 暂停营业 请走旁门 爱护花草 当心触电 严禁烟火 请勿泊车 禁止停车 出入平安 减速慢行 前方学校 高压危险 保持安静 请排队等候 女士优先 投币口 推开 拉开 失物招领 免费停车 此路不通 水深危险 小心台阶 请戴头盔 谢绝参观 招聘服务员 旺铺转让 清仓大甩卖 全场五折 新品上市 今日特价 欢迎光临 售票处 无障碍通道 消防通道 候车室 收费站 母婴室 开水间 施工现场 禁止游泳 禁止垂钓 垃圾分类".split()
MESSAGES = "明天上午十点开会 快递放在门口了 晚上一起吃饭吗 周末去爬山吧 你的验证码是 会议改到下周三 记得带身份证 电影票已经买好了 作业发到群里 航班延误两小时 妈妈生日快乐 房租已经转给你 高铁候补成功 密码重置成功 网络连接失败 电池电量不足 系统更新完成 订单已发货 余额不足请充值 请假申请已通过 本月账单已出 附近有三家餐厅 天气预报有雨 闹钟已设置 文件传输助手 对方正在输入 请先登录账号 退款将原路返回 体检报告已生成 社保缴费成功 停车费十五元 导航到人民公园 预约挂号成功 实名认证失败 拼团还差一人 直播马上开始 照片已备份 家长会通知 水电费催缴 物业维修通知".split()
BRANDS = "山里人 绿源 天天鲜 老字号 稻花香 金麦郎 农家乐 雪域 恒顺堂 白象山 晨露 三只羊 海之味 暖阳".split()
GOODS = "高钙牛奶 五香牛肉干 乌龙茶 纯净水 酱油 陈醋 苏打饼干 辣条 洗衣液 牙膏 薯片 蜂蜜 黑芝麻糊 核桃仁 方便面 豆瓣酱 橄榄油 洗发水 纸巾 燕麦片 花生油 奶粉 火腿肠 消毒液 维生素片 感冒颗粒".split()
MEMES = "我太难了 打工人加油 今天不想上班 这合理吗 就这样吧 你开心就好 请开始你的表演 万万没想到 别问问就是没钱 周一综合症 我裂开了 吃瓜群众 先干为敬 不愧是你 尴尬而不失礼貌 退一步越想越气 我全都要 在线等挺急的 知识增加了 小丑竟是我自己 人类迷惑行为 想都不要想 求求你别说了 这是什么神仙操作 减肥从明天开始 我有一个大胆的想法 真香警告 听君一席话 地球太危险了 加班到天亮 快乐就完事了 眼睛会了手不会 社恐人的日常 熬夜冠军 精神状态良好 猫都比我过得好 单身狗的周末".split()
SENTENCES = ("写着“{}”的牌子", "上面有“{}”字样", "{}的图片", "带有{}几个字的照片", "显示{}的画面")
SMALL_PRINT = {
    "sign": ("电话：138{:08d}", "TEL {:08d}", "营业时间 {}:00-22:00"),
    "packaging": ("净含量：{}克", "保质期{}个月", "NET WT {}g"),
    "screenshot": ("{}:{:02d}", "已读 {}", "第{}条"),
}
SIZES = {"sign": (22, 84), "screenshot": (13, 26), "packaging": (20, 60), "meme": (26, 56)}
BUCKETS = (16, 22, 32, 48)


@dataclass(frozen=True)
class Drawn:
    image: Image.Image
    kind: str
    text: str  # the main text
    small_print: tuple[str, ...]
    font: str
    size: int
    vertical: bool


def font_files(folders: list[Path]) -> list[tuple[Path, int, str]]:
    """Return file, face and name of each font that has simplified characters; no mono or light."""
    fonts = {}
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".ttf", ".ttc", ".otf")):
            faces = []
            for index in range(12):
                try:
                    faces.append((index, " ".join(ImageFont.truetype(path, 20, index).getname())))
                except OSError:
                    break
            for index, name in faces:
                simplified = "SC" in name.split() or "CN" in name.split() or len(faces) == 1
                if (simplified or "WenQuanYi" in name) and "Mono" not in name:
                    fonts.setdefault(name, (path, index, name))
    with_chinese = []
    for path, index, name in fonts.values():
        font = ImageFont.truetype(path, 20, index)
        missing = font.getmask("\U0010fffd")
        if bytes(font.getmask("锦")) not in (bytes(missing), b""):
            with_chinese.append((path, index, name))
    return with_chinese


def photo_files(folders: list[Path]) -> list[Path]:
    """Return the photos: the package's, and files in the folders of at least 300 x 200 in colour."""
    photos = [path for path in embedded_sample().images if path.name.startswith("photo")]
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".jpg", ".png"):
                with Image.open(path) as image:
                    if image.mode == "RGB" and image.width >= 300 and image.height >= 200:
                        photos.append(path)
    return photos


def main_texts(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Return distinct pairs of kind and text, a quarter of each kind as far as there are texts."""
    pools = {
        "sign": NOTICES + [a + b for a in NAMES for b in SHOPS],
        "screenshot": MESSAGES + [f"{m}{tail}" for m in MESSAGES for tail in ("谢谢", "了吗")],
        "packaging": [a + b for a in BRANDS for b in GOODS],
        "meme": MEMES + [f"{m}{tail}" for m in MEMES for tail in ("哈哈哈", "真的", "吗")],
    }
    chosen: dict[str, str] = {}
    for kind, pool in pools.items():
        notices = rng.sample(pool[:48], 24) if kind == "sign" else []
        for text in [*notices, *rng.sample(pool, len(pool))]:
            if sum(k == kind for k in chosen.values()) < math.ceil(count / 4):
                chosen.setdefault(text, kind)
    return [(kind, text) for text, kind in chosen.items()][:count]


def colours(rng: random.Random) -> tuple[str, str]:
    """Return the colours of a ground and of the text on it."""
    return rng.choice(
        [
            ("#b3121d", "#fff4c2"),
            ("#1f5fae", "#ffffff"),
            ("#ffffff", "#202020"),
            ("#ffd400", "#1a1a1a"),
            ("#0e6b3a", "#f4f4f4"),
            ("#222222", "#ff9d1f"),
            ("#f2e6cf", "#5b2a12"),
            ("#e9e9e9", "#a01818"),
            ("#7d8a94", "#dfe4e8"),  # weak contrast
        ]
    )


def place(photo: Image.Image, board: Image.Image, rng: random.Random) -> Image.Image:
    """Return a photo with a board on it, turned a little and softened, as a camera sees it."""
    scale = max(1.0, 1.15 * board.width / photo.width, 1.3 * board.height / photo.height)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
    mask = Image.new("L", board.size, 255)
    angle = rng.uniform(-7, 7)
    turned = board.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    mask = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    x = rng.randint(0, max(0, photo.width - turned.width))
    y = rng.randint(0, max(0, photo.height - turned.height))
    photo.paste(turned, (x, y), mask)
    photo = ImageEnhance.Brightness(photo).enhance(rng.uniform(0.6, 1.15))
    return photo.filter(ImageFilter.GaussianBlur(rng.choice((0, 0, 0.5, 0.9))))


def board_of(
    text: str,
    small: list[str],
    font: ImageFont.FreeTypeFont,
    little: ImageFont.FreeTypeFont,
    vertical: bool,
    rng: random.Random,
) -> Image.Image:
    ground, ink = colours(rng)
    size = round(font.size)
    if vertical:
        board = Image.new("RGB", (2 * size, round((len(text) * 1.15 + 1) * size)), ground)
        pen = ImageDraw.Draw(board)
        for n, character in enumerate(text):
            pen.text((size, (n * 1.15 + 1) * size), character, ink, font, anchor="mm")
        return board
    widths = [font.getlength(text), *(little.getlength(line) for line in small)]
    height = round(2.2 * size + len(small) * 1.5 * little.size)
    board = Image.new("RGB", (round(max(widths) + 1.2 * size), height), ground)
    pen = ImageDraw.Draw(board)
    pen.text((board.width / 2, 1.1 * size), text, ink, font, anchor="mm")
    for n, line in enumerate(small):
        y = 1.9 * size + (n + 0.5) * 1.4 * little.size
        pen.text((board.width / 2, y), line, ink, little, anchor="mm")
    return board


def screenshot(
    text: str, small: list[str], font: ImageFont.FreeTypeFont, rng: random.Random
) -> Image.Image:
    size = font.size
    dark = rng.random() < 0.3
    page = Image.new(
        "RGB", (round(22 * size), round(rng.uniform(24, 40) * size)), "#111" if dark else "#ededed"
    )
    pen = ImageDraw.Draw(page)
    y = 2 * size
    for n, line in enumerate(rng.sample([text, *small], 1 + len(small))):
        own = n % 2 == 1
        width = font.getlength(line)
        x = page.width - width - 2.5 * size if own else 2.5 * size
        box = (x - 0.7 * size, y - 0.6 * size, x + width + 0.7 * size, y + 1.8 * size)
        fill = ("#3eb575" if own else "#2c2c2c") if dark else ("#95ec69" if own else "#ffffff")
        pen.rounded_rectangle(box, 0.3 * size, fill)
        pen.text((x, y), line, "#ddd" if dark and not own else "#111", font)
        y += 4 * size
    return page


def meme(text: str, photo: Image.Image, font: ImageFont.FreeTypeFont) -> Image.Image:
    size = round(font.size)
    scale = max(1.0, (font.getlength(text) + size) / photo.width)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)))
    pen = ImageDraw.Draw(photo)
    where = (photo.width / 2, photo.height - size)
    pen.text(where, text, "white", font, "mm", stroke_width=max(1, size // 14), stroke_fill="black")
    return photo


def draw(
    kind: str, text: str, face: tuple[Path, int, str], photo: Path, rng: random.Random
) -> Drawn:
    low, high = SIZES[kind]
    size = round(math.exp(rng.uniform(math.log(low), math.log(high))))
    font = ImageFont.truetype(face[0], size, face[1])
    little = ImageFont.truetype(face[0], max(12, size // 3), face[1])
    with Image.open(photo) as opened:
        ground = opened.convert("RGB")
    ground.thumbnail((640, 640))
    templates = SMALL_PRINT.get(kind, ())
    small = [
        t.format(rng.randint(100, 900), rng.randint(0, 59))
        for t in rng.sample(templates, min(len(templates), rng.randint(0, 2)))
    ]
    vertical = kind in ("sign", "packaging") and rng.random() < 0.15
    if vertical:
        small = []
    if kind == "screenshot":
        image = screenshot(text, small, font, rng)
    elif kind == "meme":
        image = meme(text, ground, font)
    else:
        image = place(ground, board_of(text, small, font, little, vertical, rng), rng)
    return Drawn(image, kind, text, tuple(small), face[2], size, vertical)


def character_errors(text: str, recognised: str) -> float:
    """Return the share of characters of a text that are not in the recognised text in order."""
    wanted, seen = units(text), units(recognised)
    wanted, seen = list("".join(wanted)), list("".join(seen))
    row = [0] * (len(seen) + 1)
    for a in wanted:  # longest common subsequence
        previous = 0
        for n, b in enumerate(seen, 1):
            previous, row[n] = row[n], previous + 1 if a == b else max(row[n], row[n - 1])
    return 1 - row[-1] / len(wanted)


def part_of(text: str, rng: random.Random) -> str:
    length = min(len(text), rng.randint(2, 4))
    start = rng.randint(0, len(text) - length)
    return text[start : start + length]


def recalls(orders: list[list[int]], positives: list[set[int]]) -> dict[str, np.ndarray]:
    return {
        f"R@{k}": np.array(
            [100.0 * bool(p & set(o[:k])) for o, p in zip(orders, positives, strict=True)]
        )
        for k in (1, 5, 10)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stamps", type=Path, help="folder of the stamps; default: download them")
    parser.add_argument("--fonts", type=Path, nargs="+", required=True)
    parser.add_argument("--photos", type=Path, nargs="*", default=[])
    parser.add_argument("--model", default="mini", help="anything that cn_clip.load takes")
    parser.add_argument("--count", type=int, default=360, help="images with text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of the text recognition")
    parser.add_argument("--save", type=Path, help="write the true and the recognised texts")
    parser.add_argument("--sheet", type=Path, help="write the first 48 images as one PNG")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()

    rng = random.Random(options.seed)
    fonts, photos = font_files(options.fonts), photo_files(options.photos)
    if not fonts:
        parser.error("no Chinese font in the folders of --fonts")
    texts = main_texts(options.count, rng)
    rng.shuffle(texts)
    drawn = [
        draw(kind, text, fonts[n % len(fonts)], rng.choice(photos), rng)
        for n, (kind, text) in enumerate(texts)
    ]
    if options.sheet:
        write_sheet(drawn[:48], options.sheet)
    with tempfile.TemporaryDirectory() as scratch:
        pairs = things(options.stamps or fetch(Path(scratch)))
        stamps = [on_white(path) for path, _ in pairs]

    reader = TextReader(threads=options.threads)
    recognised: list[list[str]] = []
    seconds = []
    for image in [*stamps, *(d.image for d in drawn)]:
        start = time.perf_counter()
        recognised.append([line.text for line in reader.recognize(image)])
        seconds.append(time.perf_counter() - start)
    embedder = cn_clip.load(options.model)
    gallery = embedder.embed_images([*stamps, *(d.image for d in drawn)])

    cpu = next(iter(cpu_info("model name")), platform.machine()).split(":")[-1].strip()
    print(f"{cpu}; {reader.name}, {options.threads} threads; {options.model}; seed {options.seed}")
    print(
        f"{len(stamps)} stamps, {len(drawn)} images with text, {len(fonts)} fonts, {len(photos)} photos"
    )
    print(
        f"OCR: stamps {len(stamps) / sum(seconds[: len(stamps)]):.1f} images/s, with text "
        f"{len(drawn) / sum(seconds[len(stamps) :]):.1f} images/s; text in "
        f"{sum(map(bool, recognised[: len(stamps)]))} of the stamps"
    )
    errors = [
        character_errors(d.text, " ".join(r))
        for d, r in zip(drawn, recognised[len(stamps) :], strict=True)
    ]
    show_errors(drawn, errors)
    if options.save:
        rows = zip(drawn, recognised[len(stamps) :], strict=True)
        lines = [
            json.dumps({"text": d.text, "recognised": "\n".join(r)}, ensure_ascii=False)
            for d, r in rows
        ]
        options.save.write_text("\n".join(lines) + "\n", encoding="utf-8")

    captions = list(dict.fromkeys(caption for _, caption in pairs))
    contains = [fold(d.text).replace(" ", "") for d in drawn]
    parts = [part_of(d.text, rng) for d in drawn]
    described = [rng.choice(SENTENCES).format(d.text) for d in drawn]
    by_text = [
        [
            {len(stamps) + n for n, text in enumerate(contains) if fold(query) in text}
            for query in some
        ]
        for some in ([d.text for d in drawn], parts)
    ]
    groups = {
        "text": ([d.text for d in drawn], by_text[0]),
        "part": (parts, by_text[1]),
        "described": (described, by_text[0]),
        "text-free": (
            captions,
            [{n for n, (_, c) in enumerate(pairs) if c == caption} for caption in captions],
        ),
    }
    index = TextIndex(recognised)
    result: dict[str, dict[str, list[float]]] = {}
    for name, (queries, positives) in groups.items():
        cosines = embedder.embed_texts(queries) @ gallery.T
        alone, fused = [], []
        for query, row in zip(queries, cosines, strict=True):
            order = np.argsort(-row, kind="stable")
            alone.append(order.tolist())
            fused.append(
                [
                    hit.id
                    for hit in fuse(
                        order, row[order], index.search(query), logit_scale=embedder.logit_scale
                    )
                ]
            )
        before, after = recalls(alone, positives), recalls(fused, positives)
        result[name] = {}
        for k in before:
            gain = paired_interval(after[k], before[k])
            result[name][k] = [before[k].mean(), after[k].mean(), gain.low, gain.high]
        cells = "   ".join(
            f"{k} {v[0]:5.1f} -> {v[1]:5.1f} [{v[2]:+.1f}, {v[3]:+.1f}]"
            for k, v in result[name].items()
        )
        print(f"{name:<10} {len(queries)} queries   {cells}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def show_errors(drawn: list[Drawn], errors: list[float]) -> None:
    """Print the error rate of characters by kind, font, size and direction."""
    columns: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for image, error in zip(drawn, errors, strict=True):
        above = [size for size in BUCKETS if image.size >= size]
        columns["size"][f"from {above[-1]} px" if above else f"below {BUCKETS[0]} px"].append(error)
        columns["font"][image.font].append(error)
        columns["kind"][image.kind].append(error)
        columns["direction"]["vertical" if image.vertical else "horizontal"].append(error)
    print(f"characters not recognised: {100 * statistics.mean(errors):.1f} %")
    for column, rows in columns.items():
        cells = (
            f"{k} {100 * statistics.mean(v):.1f} % of {len(v)}" for k, v in sorted(rows.items())
        )
        print(f"  by {column}: {'; '.join(cells)}")


def write_sheet(drawn: list[Drawn], path: Path) -> None:
    sheet = Image.new("RGB", (8 * 200, 6 * 200), "white")
    for n, one in enumerate(drawn):
        small = one.image.copy()
        small.thumbnail((196, 196))
        sheet.paste(small, (n % 8 * 200, n // 8 * 200))
    sheet.save(path)


if __name__ == "__main__":
    main()
