"""Settings of a curation: dataclass defaults <= YAML <= `section.key=value`, checked before any work."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

PROMPT = (
    "Describe this picture in one paragraph of 60 to 120 words, as a caption from which it could be drawn. Say for every person: apparent gender and age group, "
    "hair, face and expression, glasses and make-up, clothing and jewellery, pose, gaze and gesture, and what each visible hand does. Then background, light, framing and style "
    "(photograph, drawing, ...). State only what is visible; do not guess names, places or what happens outside the picture. Begin with the subject, without an introduction."
)
ON_FAILURE = ("original", "drop")


@dataclass
class ReadConfig:
    max_bytes: int = 50_000_000  # of an image file; larger ones are not read
    max_pixels: int = 40_000_000  # of an image by its header; larger ones are not decoded
    check_pairs: bool = True  # drop samples of a shard whose JSON names another key, caption or size than the sample has
    files_per_part: int = 1_000  # a folder of images is treated in parts of this many, as if they were shards


@dataclass
class FilterConfig:
    min_short: int = 256  # shortest allowed short edge (pixels)
    max_aspect: float = 16 / 9  # long edge / short edge at most
    require_caption: Optional[bool] = None  # drop samples without a readable caption; null: unless captions are made (caption.model)
    max_punsafe: Optional[float] = None  # drop a larger "punsafe" in the JSON; null: not looked at. Samples without the field are kept
    max_pwatermark: Optional[float] = None  # the same for "pwatermark"
    nsfw: List[str] = field(default_factory=list)  # values of "NSFW" in the JSON that are kept, e.g. [UNLIKELY]; []: not looked at
    placeholders: Optional[str] = None  # file with the SHA-256 of known placeholder images, one a line
    placeholder_repeats: int = 50  # drop all images whose very bytes occur this often: an error page's picture; 0: never


@dataclass
class DedupConfig:
    exact: bool = True  # keep one of several images with the same bytes
    near: bool = True  # keep one of several images that look the same
    distance: int = 16  # bits of the 64 of two perceptual hashes that may differ for two images to look the same (0 to 20; as a rule an even number differs)
    color: float = 6.0  # and mean difference of their 8x8 colour thumbnails at most, after the best change of brightness and contrast (levels of 255)
    mirrored: bool = True  # a mirror image looks the same


@dataclass
class AestheticConfig:
    reward: Optional[str] = None  # reward that scores pictures: aesthetic (CLIP-L/14 + MLP); null: no scores
    path: Optional[str] = None  # folder of its weights; null: where docs/rewards.md puts them
    min_score: float = 4.5  # drop lower scores
    batch_size: int = 256  # images a batch
    dtype: str = "fp32"  # fp32, bf16 or fp16
    image_size: int = 224  # pictures are cut to a square of this side for scores and hands (pixels)


@dataclass
class HandsConfig:
    keys: List[str] = field(default_factory=lambda: ["hands", "num_hands", "hand_boxes"])  # JSON keys that tell: a number, a list or a truth value
    detector: Optional[str] = None  # for pictures whose JSON does not tell: clip:FOLDER (zero-shot) or MODULE:FUNCTION (your own); null: none
    threshold: float = 0.5  # probability from which on a picture shows hands
    batch_size: int = 256  # images a batch


@dataclass
class CaptionConfig:
    model: Optional[str] = None  # folder of Qwen2.5-VL-7B-Instruct (or another Qwen2.5-VL); null: captions stay as they are
    prompt: str = PROMPT  # what the model is asked
    batch_size: int = 16  # images a batch
    max_tokens: int = 256  # longest answer (tokens)
    max_pixels: int = 512 * 512  # larger pictures are shown to the model at this size (pixels)
    dtype: str = "bf16"  # of the weights and the arithmetic
    retries: int = 2  # further attempts, sampled, where an answer is empty, a refusal, a loop or unfinished
    on_failure: str = "original"  # after those: keep the original caption (drop if there is none), or drop


@dataclass
class WriteConfig:
    shard_size: int = 1_000  # samples a shard
    held_out: float = 0.005  # share of pictures kept from training, by the hash of their content
    hands_apart: bool = False  # write the pictures with hands to a folder of their own, hands/, instead of train/
    image_size: int = 256  # buckets (height x width of training) are recorded for this size (pixels)
    bucket_step: int = 32  # their sides are multiples of it (pixels)
    prompts: int = 2_000  # captions of held-out pictures to list as prompts for evaluation


@dataclass
class RunConfig:
    workers: int = 0  # processes that decode; 0: one a core
    device: Optional[str] = None  # of the models; null: the first GPU, or the CPU


@dataclass
class Curation:
    read: ReadConfig = field(default_factory=ReadConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    aesthetic: AestheticConfig = field(default_factory=AestheticConfig)
    hands: HandsConfig = field(default_factory=HandsConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    write: WriteConfig = field(default_factory=WriteConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def require_caption(self) -> bool:
        required = self.filter.require_caption
        return self.caption.model is None if required is None else required

    def results(self) -> dict:
        """The settings that results depend on: all but `run`."""
        return {name: values for name, values in dataclasses.asdict(self).items() if name != "run"}


def load_curation(files=(), overrides=()) -> Curation:
    """Defaults, then YAML `files`, then "section.key=value" `overrides`. ValueError names the source, the key and the fix."""
    config = OmegaConf.structured(Curation)
    for file in files:
        try:
            tree = OmegaConf.to_container(OmegaConf.load(file))
        except Exception as error:  # yaml, OmegaConf and the file system raise many kinds
            raise ValueError(f"config file {file} is not readable YAML: {error}") from None
        if not isinstance(tree, dict) or not all(isinstance(values, dict) for values in tree.values()):
            raise ValueError(f"config file {file} must hold sections ({', '.join(_names())}) of `key: value` lines")
        for section, values in tree.items():
            for key, value in values.items():
                _assign(config, f"{section}.{key}", value, str(file))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or "." not in key:
            raise ValueError(f"override {override!r}: expected section.key=value, for example filter.min_short=512")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
        except Exception as error:
            raise ValueError(f"override {override!r}: cannot read the value: {error}") from None
        _assign(config, key, value, f"override {override!r}")
    config = OmegaConf.to_object(config)
    validate(config)
    return config


def _names(section: str | None = None) -> list[str]:
    if section is None:
        return [f.name for f in dataclasses.fields(Curation)]
    return [f.name for f in dataclasses.fields(Curation.__dataclass_fields__[section].default_factory)]


def _assign(config, key: str, value, source: str) -> None:
    section, _, name = key.partition(".")
    if section not in _names() or name not in _names(section):
        known = [f"{s}.{n}" for s in _names() for n in _names(s)]
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        own = [k for k in known if k.startswith(section + ".")] or _names()
        raise ValueError(f"{source}: unknown key {key};" + (f" did you mean {close[0]}?" if close else "") + f" valid: {', '.join(own)}")
    try:
        OmegaConf.update(config, key, value, merge=False)
    except OmegaConfBaseException:
        expected = Curation.__dataclass_fields__[section].default_factory.__dataclass_fields__[name].type
        raise ValueError(f"{source}: {key} must be {expected}, got {value!r} ({type(value).__name__})") from None


def validate(c: Curation) -> None:
    positive = {"read.max_bytes": c.read.max_bytes, "read.max_pixels": c.read.max_pixels, "read.files_per_part": c.read.files_per_part,
                "filter.min_short": c.filter.min_short, "aesthetic.batch_size": c.aesthetic.batch_size, "aesthetic.image_size": c.aesthetic.image_size,
                "hands.batch_size": c.hands.batch_size, "caption.batch_size": c.caption.batch_size, "caption.max_tokens": c.caption.max_tokens,
                "caption.max_pixels": c.caption.max_pixels, "write.shard_size": c.write.shard_size, "write.bucket_step": c.write.bucket_step,
                "write.image_size": c.write.image_size}  # fmt: skip
    for key, value in positive.items():
        if not value > 0:
            raise ValueError(f"{key} must be positive, got {value}")
    for key, value in {"filter.placeholder_repeats": c.filter.placeholder_repeats, "caption.retries": c.caption.retries, "run.workers": c.run.workers,
                       "dedup.color": c.dedup.color, "write.prompts": c.write.prompts}.items():  # fmt: skip
        if not value >= 0:
            raise ValueError(f"{key} must not be negative, got {value}")
    if not c.filter.max_aspect >= 1:
        raise ValueError(f"filter.max_aspect is long edge / short edge, at least 1; got {c.filter.max_aspect}")
    if not 0 <= c.dedup.distance <= 20:
        raise ValueError(f"dedup.distance must lie between 0 and 20 (bits of 64), got {c.dedup.distance}")
    if not 0 <= c.write.held_out < 1:
        raise ValueError(f"write.held_out is a share in [0, 1), got {c.write.held_out}")
    if c.write.image_size % c.write.bucket_step:
        raise ValueError(f"write.image_size ({c.write.image_size}) must be a multiple of write.bucket_step ({c.write.bucket_step})")
    if c.caption.on_failure not in ON_FAILURE:
        raise ValueError(f"caption.on_failure must be one of {', '.join(ON_FAILURE)}; got {c.caption.on_failure!r}")
    for key, value in {"aesthetic.dtype": c.aesthetic.dtype, "caption.dtype": c.caption.dtype}.items():
        if value not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"{key} must be fp32, bf16 or fp16; got {value!r}")
    if c.filter.placeholders is not None and not Path(c.filter.placeholders).is_file():
        raise ValueError(f"filter.placeholders: {c.filter.placeholders} does not exist; give a file with one SHA-256 a line")


def read_placeholders(path: str | None) -> frozenset[bytes]:
    """Digests of a file with one hexadecimal SHA-256 a line (# begins a comment)."""
    if path is None:
        return frozenset()
    lines = [line.split("#")[0].strip() for line in Path(path).read_text().splitlines()]
    try:
        digests = frozenset(bytes.fromhex(line) for line in lines if line)
    except ValueError:
        digests = {b""}
    if any(len(digest) != 32 for digest in digests):
        raise ValueError(f"filter.placeholders: {path} must hold one SHA-256 (64 hexadecimal digits) a line")
    return digests
