"""Portraits: the embedded default data set, drawn people with captions whose truth is known.

Every picture is a pure function of its seed. Eight attributes are captioned (`ATTRIBUTES`); position, proportions,
shirt, shades and lighting vary freely. A small grammar names the attributes in varying words and order and leaves some
out; which values were *stated* travels in the JSON, so that text-image alignment can be measured exactly.
The shards have img2dataset's layout (png + txt + json), so drawn and real data share every line of the loader.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "person": ("woman", "man"),
    "skin": ("light", "tan", "dark"),
    "hair_color": ("black", "brown", "blond", "red", "gray"),
    "hair_style": ("short", "long", "curly", "bun"),
    "expression": ("smiling", "serious", "surprised"),
    "eyewear": ("none", "glasses", "sunglasses"),
    "hat": ("none", "beanie", "brimmed"),
    "background": ("blue", "green", "yellow", "pink", "white"),
}

# ---------------------------------------------------------------------------------------------- drawing
SUPERSAMPLING = 4
SKIN = {"light": (248, 216, 190), "tan": (214, 160, 112), "dark": (122, 78, 52)}
HAIR = {"black": (28, 24, 28), "brown": (110, 66, 32), "blond": (236, 202, 96), "red": (196, 70, 24), "gray": (166, 168, 174)}
BACKGROUND = {"blue": (84, 140, 226), "green": (92, 178, 104), "yellow": (244, 220, 84), "pink": (244, 150, 190), "white": (240, 240, 238)}
SHIRTS = ((176, 40, 52), (34, 60, 120), (40, 100, 70), (90, 60, 120), (60, 60, 66), (214, 120, 40), (225, 225, 215))
HATS = ((150, 30, 60), (30, 70, 140), (40, 120, 110), (110, 70, 150), (70, 72, 80))


def _jitter(rng: random.Random, color: tuple[int, int, int], amount: int = 10) -> tuple[int, int, int]:
    shift = rng.randint(-amount, amount)
    return tuple(max(0, min(255, c + shift + rng.randint(-4, 4))) for c in color)


def _shade(color: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return tuple(max(0, min(255, round(c * factor))) for c in color)


def draw_attributes(rng: random.Random) -> dict[str, str]:
    """One value for every attribute, uniformly and independently."""
    return {name: rng.choice(values) for name, values in ATTRIBUTES.items()}


def draw_portrait(attributes: dict[str, str], rng: random.Random, size: int = 64) -> Image.Image:
    """Draws the person `attributes` describes. `size`: pixels, a multiple of 32. Returns an RGB image size x size."""
    if size < 32 or size % 32:
        raise ValueError(f"portraits are drawn at multiples of 32 pixels, not {size}")
    canvas = size * SUPERSAMPLING
    unit = canvas / 64  # coordinates below are in 1/64 of the picture
    background = _jitter(rng, BACKGROUND[attributes["background"]], 8)
    image = Image.new("RGB", (canvas, canvas), background)
    draw = ImageDraw.Draw(image)

    def ellipse(cx, cy, rx, ry, fill):
        draw.ellipse([(cx - rx) * unit, (cy - ry) * unit, (cx + rx) * unit, (cy + ry) * unit], fill=fill)

    def polygon(points, fill):
        draw.polygon([(x * unit, y * unit) for x, y in points], fill=fill)

    def box(x0, y0, x1, y1, fill, radius=0.0):
        draw.rounded_rectangle([x0 * unit, y0 * unit, x1 * unit, y1 * unit], radius=radius * unit, fill=fill)

    def arc(cx, cy, rx, ry, start, end, fill, width):
        draw.arc([(cx - rx) * unit, (cy - ry) * unit, (cx + rx) * unit, (cy + ry) * unit], start, end, fill=fill, width=round(width * unit))

    woman = attributes["person"] == "woman"
    skin, hair = _jitter(rng, SKIN[attributes["skin"]], 6), _jitter(rng, HAIR[attributes["hair_color"]], 6)
    style, hat = attributes["hair_style"], attributes["hat"]
    shirt, hat_color = _jitter(rng, rng.choice(SHIRTS)), _jitter(rng, rng.choice(HATS))
    cx, cy = 32 + rng.uniform(-3, 3), 30 + rng.uniform(-2, 2)
    rx, ry = (12.2 if woman else 13.2) + rng.uniform(-0.8, 0.8), 15.0 + rng.uniform(-1, 1)
    dark_skin = _shade(skin, 0.82)

    # a soft light behind the head, so that the background is not one flat colour
    ellipse(cx, cy, 27, 27, _shade(background, 1.0 + rng.uniform(0.02, 0.06)))

    # hair behind the head
    if style == "long":
        box(cx - rx - 4, cy - 8, cx + rx + 4, cy + 24, hair, 6)
    elif style == "curly":
        for i in range(15):
            angle = math.pi * (0.86 + 1.28 * i / 14)
            ellipse(cx + (rx + 2.4) * math.cos(angle), cy - 2 + (ry + 0.6) * math.sin(angle), 5.0 + rng.uniform(-0.5, 0.5), 5.0, hair)
    elif style == "bun":
        if hat == "none":
            ellipse(cx, cy - ry - 4.4, 5.8, 5.4, hair)
        else:  # a low bun shows beside the neck
            ellipse(cx + rx + 2.2, cy + 8, 5.4, 5.4, hair)

    # body
    shoulder = (15.5 if woman else 20.0) + rng.uniform(-1, 1)
    box(cx - shoulder, 53 + rng.uniform(-1, 1), cx + shoulder, 76, shirt, 8)
    neck = 4.2 if woman else 6.2
    box(cx - neck, cy + 10, cx + neck, 56, dark_skin, 2)

    # ears, head, jaw
    for side in (-1, 1):
        ellipse(cx + side * rx, cy + 1.5, 2.4, 3.4, dark_skin)
    ellipse(cx, cy, rx, ry, skin)
    if not woman:
        box(cx - rx + 1.6, cy + 2, cx + rx - 1.6, cy + ry + 0.8, skin, 5.5)
    if woman:  # earrings
        for side in (-1, 1):
            ellipse(cx + side * (rx + 0.3), cy + 6.2, 1.3, 1.3, (250, 226, 120))

    # hair on top: a cap of hair with a hairline over the forehead
    if hat == "none":
        top = {"short": 1.6, "long": 2.2, "curly": 2.0, "bun": 1.4}[style]
        draw.chord([(cx - rx - top) * unit, (cy - ry - top) * unit, (cx + rx + top) * unit, (cy + ry * 0.75) * unit], 186, 354, fill=hair)
        if style == "curly":
            for i in range(7):
                ellipse(cx - rx + 2 * rx * i / 6, cy - ry * 0.56 + abs(i - 3) * 0.9 - 2.6, 3.3, 3.1, hair)
    if style == "short":
        for side in (-1, 1):
            box(cx + side * rx - 2.2, cy - 8, cx + side * rx + 2.2, cy + 1.5, hair, 1.2)
    if style == "long":
        for side in (-1, 1):
            box(cx + side * (rx + 1.2) - 2.6, cy - 7, cx + side * (rx + 1.2) + 2.6, cy + 22, hair, 2.5)
    if style == "bun" and hat == "none":
        arc(cx, cy - ry - 1.2, 4.6, 1.6, 0, 180, _shade(hair, 0.7), 0.7)
    if style == "bun" and hat != "none":
        for side in (-1, 1):
            box(cx + side * (rx - 0.2) - 1.2, cy - 8, cx + side * (rx - 0.2) + 1.2, cy - 1.5, hair, 1)

    # eyes, brows
    expression, eyewear = attributes["expression"], attributes["eyewear"]
    ex, ey = 5.4 + rng.uniform(-0.4, 0.4), cy - 0.5
    open_eye = 1.9 if expression == "surprised" else 1.3
    for side in (-1, 1):
        ellipse(cx + side * ex, ey, 2.3, open_eye + 0.5, (252, 252, 250))
        ellipse(cx + side * ex, ey + 0.1, 1.3, min(1.4, open_eye), (40, 34, 40))
        brow = ey - 4.0 - (1.5 if expression == "surprised" else 0.0)
        box(cx + side * ex - 2.9, brow - (0.45 if woman else 0.95), cx + side * ex + 2.9, brow + (0.45 if woman else 0.95), _shade(hair, 0.6), 0.4)
        if woman:  # lashes
            arc(cx + side * ex, ey, 2.6, open_eye + 0.9, 190, 350, (30, 24, 30), 0.8)

    # nose, mouth
    arc(cx, cy + 3.2, 1.6, 1.6, 20, 160, _shade(skin, 0.7), 0.8)
    mouth_y = cy + 8.3
    lips = (204, 44, 70) if woman else _shade(skin, 0.56)
    if expression == "smiling":
        draw.chord([(cx - 5.4) * unit, (mouth_y - 4.4) * unit, (cx + 5.4) * unit, (mouth_y + 3.4) * unit], 12, 168, fill=lips)
        draw.chord([(cx - 4.1) * unit, (mouth_y - 3.4) * unit, (cx + 4.1) * unit, (mouth_y + 2.0) * unit], 16, 164, fill=(252, 252, 252))
    elif expression == "serious":
        box(cx - 4.2, mouth_y - 0.4, cx + 4.2, mouth_y + 1.1, lips, 0.7)
    else:
        ellipse(cx, mouth_y + 0.8, 2.9, 3.5, lips)
        ellipse(cx, mouth_y + 0.9, 1.8, 2.4, (60, 18, 26))

    # eyewear
    if eyewear != "none":
        frame = (24, 24, 30)
        for side in (-1, 1):
            if eyewear == "sunglasses":
                box(cx + side * ex - 4.5, ey - 3.0, cx + side * ex + 4.5, ey + 3.4, (22, 22, 28), 2.2)
                polygon([(cx + side * ex - 2.6, ey - 1.8), (cx + side * ex - 0.8, ey - 1.8), (cx + side * ex - 2.4, ey + 1.6)], (96, 100, 116))
            else:
                arc(cx + side * ex, ey, 4.5, 4.1, 0, 360, frame, 1.1)
        box(cx - 1.2, ey - 0.9, cx + 1.2, ey + 0.3, frame)
        for side in (-1, 1):
            box(min(cx + side * (ex + 4.2), cx + side * rx), ey - 0.9, max(cx + side * (ex + 4.2), cx + side * rx), ey + 0.2, frame)

    # hat
    if hat == "beanie":
        draw.chord([(cx - rx - 2.0) * unit, (cy - ry - 5.0) * unit, (cx + rx + 2.0) * unit, (cy + ry * 0.55) * unit], 180, 360, fill=hat_color)
        box(cx - rx - 2.6, cy - ry * 0.60, cx + rx + 2.6, cy - ry * 0.60 + 4.6, _shade(hat_color, 0.74), 2)
        ellipse(cx, cy - ry - 5.4, 3.0, 3.0, _shade(hat_color, 1.3))
    elif hat == "brimmed":
        box(cx - rx * 0.84, cy - ry - 6.4, cx + rx * 0.84, cy - ry * 0.42, hat_color, 3)
        box(cx - rx * 0.84, cy - ry * 0.42 - 4.2, cx + rx * 0.84, cy - ry * 0.42 - 1.4, _shade(hat_color, 0.5))
        ellipse(cx, cy - ry * 0.44, rx + 9.5, 3.0, hat_color)
    return image.resize((size, size), Image.Resampling.BOX)


# ---------------------------------------------------------------------------------------------- captions
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "person": {"woman": ("woman", "lady"), "man": ("man", "gentleman")},
    "skin": {"light": ("fair", "pale"), "tan": ("tan", "olive"), "dark": ("dark skinned",)},
    "hair_color": {"black": ("black",), "brown": ("brown", "brunette"), "blond": ("blond", "blonde", "golden"), "red": ("red", "ginger"), "gray": ("gray", "grey", "silver")},
    "expression": {"smiling": ("smiling", "happy", "cheerful"), "serious": ("serious", "calm"), "surprised": ("surprised", "astonished")},
    "eyewear": {"none": ("no glasses", "without glasses"), "glasses": ("glasses", "spectacles"), "sunglasses": ("sunglasses", "dark glasses")},
    "hat": {"none": ("no hat", "without a hat"), "beanie": ("a beanie", "a knit cap"), "brimmed": ("a brimmed hat", "a wide hat")},
    "background": {"blue": ("blue",), "green": ("green",), "yellow": ("yellow",), "pink": ("pink",), "white": ("white",)},
}
OPENINGS = ("a", "a", "portrait of a", "photo of a")
DROP = 0.1  # chance that an attribute goes unmentioned
DROP_NONE = 0.5  # an absent hat or absent glasses go unmentioned more often, as people write


def write_caption(attributes: dict[str, str], rng: random.Random, complete: bool = False) -> tuple[str, list[str]]:
    """A caption and the list of attributes it states. `complete`: state all eight (the prompts of the evaluation)."""

    def says(name: str) -> bool:
        return complete or rng.random() >= (DROP_NONE if attributes[name] == "none" else DROP)

    stated = ["person"] + [name for name in ATTRIBUTES if name != "person" and says(name)]

    def word(name: str) -> str:
        return rng.choice(WORDS[name][attributes[name]])

    adjectives = [word(name) for name in ("expression", "skin") if name in stated]
    rng.shuffle(adjectives)
    described = " ".join([*adjectives, word("person")])
    text = rng.choice(OPENINGS) + ("n " if described[0] in "aeiou" else " ") + described
    color = word("hair_color") + " " if "hair_color" in stated else ""
    style = attributes["hair_style"] if "hair_style" in stated else ""
    hair = ""
    if style == "bun":
        hair = f"{color}hair in a bun"
    elif style or color:
        hair = " ".join(f"{style} {color}hair".split())
    extras = [hair] if hair else []
    extras += [word(name) for name in ("eyewear", "hat") if name in stated]
    tail = extras[1:] if hair else extras
    rng.shuffle(tail)
    extras = ([hair] if hair else []) + tail
    if extras:
        joined = " and ".join([" ".join(extras[:-1]), extras[-1]]) if len(extras) > 1 else extras[0]
        text += " with " + joined
    if "background" in stated:
        text += rng.choice((" on {} background", " against {}", " {} background")).format(word("background"))
    return text, stated


# ---------------------------------------------------------------------------------------------- samples and shards
def make_portrait(seed: int, size: int = 64, complete: bool = False) -> tuple[Image.Image, str, dict]:
    """Picture, caption and metadata {"attributes", "stated", "seed"} of one seed."""
    rng = random.Random(seed)
    attributes = draw_attributes(rng)
    caption, stated = write_caption(attributes, random.Random(seed ^ 0x5DEECE66D), complete)
    return draw_portrait(attributes, rng, size), caption, {"attributes": attributes, "stated": stated, "seed": seed}


def make_arrays(first_seed: int, count: int, size: int = 64) -> tuple[np.ndarray, list[str], list[dict]]:
    """`count` portraits in memory: images uint8 [count, 3, size, size], captions, metadata."""
    images, captions, metadata = np.empty((count, 3, size, size), np.uint8), [], []
    for i in range(count):
        image, caption, meta = make_portrait(first_seed + i, size)
        images[i] = np.asarray(image).transpose(2, 0, 1)
        captions.append(caption)
        metadata.append(meta)
    return images, captions, metadata


def write_portraits(folder: str | Path, num_images: int, size: int = 64, seed: int = 0, shard_size: int = 1000, progress: bool = True) -> None:
    """Draws `num_images` portraits (seeds `seed` … `seed + num_images - 1`) into WebDataset shards under `folder`."""
    from tqdm import tqdm

    from proxt2i.data.shards import write_samples

    def samples():
        for i in tqdm(range(num_images), desc="drawing portraits", unit="image", disable=not progress):
            image, caption, meta = make_portrait(seed + i, size)
            yield {"key": f"{seed + i:09d}", "image": image, "caption": caption, "json": meta}

    write_samples(folder, samples(), shard_size)
