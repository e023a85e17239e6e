"""Frozen text encoders: captions in, one fixed-length token sequence per encoder out."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, T5EncoderModel
from transformers.utils import logging as logging_utils

from ..transfer import send
from .files import check_component, check_loaded

ENCODERS = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}
DEFAULT_T5_LENGTH = 128  # T5 has relative positions and no length of its own (recommended)

log = logging.getLogger(__name__)


class TextEncoder(nn.Module):
    """One or more tokenizer + encoder pairs (CLIPTextModel or T5EncoderModel), frozen, in eval mode for good.

    `dims[i]`, `lengths[i]`: width and number of tokens of encoder i. A caption's embedding depends on that caption
    alone: it is padded to the full length, padding is masked, and positions past the text's end are zeroed.
    """

    def __init__(self, tokenizers: list, encoders: list[nn.Module], lengths: list[int] | None = None):
        super().__init__()
        if not encoders or len(tokenizers) != len(encoders) or (lengths and len(lengths) != len(encoders)):
            raise ValueError("tokenizers, encoders and lengths must be as many as the encoders, at least one")
        self.tokenizers = list(tokenizers)
        self.encoders = nn.ModuleList(encoders)
        self.dims = [encoder.config.hidden_size for encoder in encoders]
        self.lengths = list(lengths or (_default_length(t, e.config) for t, e in zip(tokenizers, encoders)))
        for length, encoder in zip(self.lengths, encoders):
            limit = getattr(encoder.config, "max_position_embeddings", None) or length
            if length > limit:
                raise ValueError(f"text length {length} exceeds the encoder's {limit} positions")
        self.requires_grad_(False).eval()
        self._warned = False

    @classmethod
    def from_pretrained(cls, folder: Path | str, device="cpu", dtype: torch.dtype = torch.float32,
                        only: Sequence[str] | None = None) -> "TextEncoder":
        """Read FOLDER/text_encoder + FOLDER/tokenizer, and text_encoder_2 + tokenizer_2 and so on where present, or `only` the
        text encoders of these names."""
        sources = [(tokenizer, encoder) for tokenizer, encoder in _sources(folder) if only is None or encoder.name in only]
        return cls.from_sources(sources, device=device, dtype=dtype)

    @classmethod
    def from_sources(cls, sources: Sequence[tuple[Path | str, Path | str]], lengths: list[int] | None = None,
                     device="cpu", dtype: torch.dtype = torch.float32) -> "TextEncoder":
        """Load (tokenizer, encoder) pairs, each a local folder or a hub id. Only safetensors weights are read."""
        pairs = [(_load_tokenizer(tokenizer), _load_encoder(encoder, dtype)) for tokenizer, encoder in sources]
        return cls([p[0] for p in pairs], [p[1] for p in pairs], lengths).to(device)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write what from_pretrained reads; the lengths travel as each tokenizer's model_max_length."""
        for i, (tokenizer, encoder, length) in enumerate(zip(self.tokenizers, self.encoders, self.lengths)):
            suffix = f"_{i + 1}" if i else ""
            encoder.save_pretrained(Path(folder) / f"text_encoder{suffix}")
            tokenizer.model_max_length = length
            tokenizer.save_pretrained(Path(folder) / f"tokenizer{suffix}")

    def train(self, mode: bool = True) -> "TextEncoder":
        return super().train(False)

    @torch.no_grad()
    def forward(self, captions: list[str], encoders: Sequence[int] | None = None) -> list[Tensor]:
        """captions (B strings; "" is the null caption) -> per encoder [B, L_i, D_i] float32 on the encoder's device.
        encoders: numbers of those to ask (default: all)."""
        if isinstance(captions, str):
            raise ValueError("captions must be a list of strings, not one string")
        unique = list(dict.fromkeys(captions))  # repeated prompts (and nulls) are encoded once
        rows = {caption: row for row, caption in enumerate(unique)}
        index = send(torch.tensor([rows[caption] for caption in captions]), self.device)
        return [self._encode(i, unique)[index] for i in (range(len(self.encoders)) if encoders is None else encoders)]

    def truncated(self, captions: list[str]) -> list[bool]:
        """Per caption: does any encoder cut it?"""
        return _cut(self.tokenizers, self.lengths, captions)

    def unheard(self, caption: str) -> str:
        """The end of the caption that no encoder is shown because it is too long; "" when one hears all of it."""
        return _unheard(self.tokenizers, self.lengths, caption)

    def warn_unheard(self, prompts: list[str]) -> None:
        """Log what of each prompt no encoder is shown."""
        self._warned = True  # `forward` need not say it again
        for prompt in dict.fromkeys(prompts):
            if end := self.unheard(prompt):
                log.warning("the prompt is longer than the model's %d tokens; it does not hear %r, the end of %r", max(self.lengths), end, prompt)

    @property
    def device(self) -> torch.device:
        return next(self.encoders.parameters()).device

    def _encode(self, i: int, captions: list[str]) -> Tensor:
        batch = self.tokenizers[i](captions, padding="max_length", truncation=True, max_length=self.lengths[i],
                                   return_tensors="pt")
        self._warn_if_cut(i, captions, batch["attention_mask"])
        ids, mask = (send(batch[key], self.device) for key in ("input_ids", "attention_mask"))
        with torch.autocast(self.device.type, enabled=False):
            hidden = self.encoders[i](input_ids=ids, attention_mask=mask).last_hidden_state
        # where, not multiply: an encoder may give NaN at masked positions
        return torch.where(mask.bool()[..., None], hidden.float(), 0.0)

    def _warn_if_cut(self, i: int, captions: list[str], mask: Tensor) -> None:
        if self._warned:
            return
        full = [caption for caption, row in zip(captions, mask.all(dim=1).tolist()) if row]
        cut = [caption for caption, is_cut in zip(full, self.truncated(full)) if is_cut] if full else []
        if cut:
            self._warned = True
            log.warning("captions longer than %d tokens are cut, e.g. %r (said once; TextEncoder.truncated "
                        "tells which)", self.lengths[i], cut[0])


def text_sizes(folder: Path | str) -> tuple[list[int], list[int]]:
    """`dims` and `lengths` of the TextEncoder in a folder, without loading weights. Raises ValueError as loading would."""
    dims, lengths = [], []
    for tokenizer, encoder in _sources(folder):
        _check_type(encoder, check_component(encoder).get("model_type"))
        config = AutoConfig.from_pretrained(encoder)
        config = getattr(config, "text_config", config)  # that of a whole CLIP model
        dims.append(config.hidden_size)
        lengths.append(_default_length(_load_tokenizer(tokenizer), config))
    return dims, lengths


def encoder_names(folder: Path | str) -> list[str]:
    """Of the text encoders in a model folder, in order: "text_encoder", "text_encoder_2", ..."""
    return [encoder.name for _, encoder in _sources(folder)]


def cut_captions(folder: Path | str, captions: list[str]) -> list[bool]:
    """`truncated` of the TextEncoder in a folder, without loading weights. Raises ValueError as loading would."""
    return _cut([_load_tokenizer(tokenizer) for tokenizer, _ in _sources(folder)], text_sizes(folder)[1], captions)


def unheard_ends(folder: Path | str, captions: list[str]) -> list[str]:
    """`unheard` of the TextEncoder in a folder, for each caption, without loading weights. Raises ValueError as loading would."""
    tokenizers, lengths = [_load_tokenizer(tokenizer) for tokenizer, _ in _sources(folder)], text_sizes(folder)[1]
    return [_unheard(tokenizers, lengths, caption) for caption in captions]


def _unheard(tokenizers: list, lengths: list[int], caption: str) -> str:
    ends = []
    for tokenizer, length in zip(tokenizers, lengths):
        ids = tokenizer(caption, verbose=False)["input_ids"]
        if len(ids) <= length:
            return ""
        ends.append(tokenizer.decode(ids[length - 1:-1]))  # the last place is that of the end token
    return min(ends, key=len)


def _cut(tokenizers: list, lengths: list[int], captions: list[str]) -> list[bool]:
    cut = [False] * len(captions)
    for tokenizer, length in zip(tokenizers, lengths):
        for row, ids in enumerate(tokenizer(list(captions), verbose=False)["input_ids"]):
            cut[row] |= len(ids) > length
    return cut


def _sources(folder: Path | str) -> list[tuple[Path, Path]]:
    """The (tokenizer, encoder) folders in a model folder."""
    folder, suffixes = Path(folder), [""]
    while (folder / f"text_encoder_{len(suffixes) + 1}").is_dir():
        suffixes.append(f"_{len(suffixes) + 1}")
    return [(folder / f"tokenizer{s}", folder / f"text_encoder{s}") for s in suffixes]


def _default_length(tokenizer, config) -> int:
    """The tokenizer's length, bounded by the encoder's positions; DEFAULT_T5_LENGTH where neither knows one."""
    known = [n for n in (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
             if n and n < 100_000]  # transformers says 1e30 for "unknown"
    return min(known) if known else DEFAULT_T5_LENGTH


def _load_tokenizer(source: Path | str):
    if isinstance(source, Path) and not source.is_dir():
        raise ValueError(f"the model's {source.name} folder is missing: {source}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"cannot load the tokenizer in {source}: {error}") from error
    if tokenizer.pad_token is None:
        raise ValueError(f"the tokenizer in {source} has no pad_token; set one in its tokenizer_config.json")
    return tokenizer


def _load_encoder(source: Path | str, dtype: torch.dtype) -> nn.Module:
    if Path(source).is_dir():
        source = Path(source)
        model_type = check_component(source).get("model_type")
    else:
        model_type = AutoConfig.from_pretrained(source).model_type
    _check_type(source, model_type)
    bar = logging_utils.is_progress_bar_enabled()
    logging_utils.disable_progress_bar()
    try:
        encoder, info = ENCODERS[str(model_type)].from_pretrained(source, dtype=dtype, use_safetensors=True,
                                                             output_loading_info=True)
    finally:
        if bar:
            logging_utils.enable_progress_bar()
    check_loaded(Path(source), info)
    return encoder


def _check_type(source: Path | str, model_type: str | None) -> None:
    if model_type not in ENCODERS:
        raise ValueError(f"{source} is a {model_type!r} model; text encoders of these types are known: "
                         f"{', '.join(ENCODERS)}")
