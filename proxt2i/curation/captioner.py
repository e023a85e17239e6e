"""Captions by Qwen2.5-VL through transformers: a batch of pictures in, one caption a picture out, failures told apart."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from proxt2i.curation.config import CaptionConfig
from proxt2i.models.files import check_component, check_loaded
from proxt2i.rewards.base import DTYPES

HOW_TO_GET = ("get it with\n  hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir {folder}\n(17 GB; note the commit), or give another folder of a Qwen2.5-VL in "
              "caption.model. Without caption.model the captions stay as they are")
# Answers that speak of the model or the request instead of the picture.
REFUSAL = re.compile(r"^\W*(i'?m sorry|sorry,|i apologi[sz]e|i can('|no)?t\b|i cannot|i am (not able|unable)|i'?m (not able|unable)|as an ai|unfortunately, i|"
                     r"i do not have the ability|it is not possible (for me )?to)|\bas an ai (language )?model\b", re.IGNORECASE)
INTRODUCTION = re.compile(r"^\W*(sure|certainly|of course|here is|here's|caption|description)\b[^:.\n]{0,60}:\s*", re.IGNORECASE)
WINDOW = (4, 4)  # a run of this many words that comes this often is a loop


@dataclass
class Answer:
    caption: str  # "" after a failure
    trouble: str = ""  # of the last attempt that failed: empty, refusal, loop, unfinished
    attempts: int = 1


def judge(text: str, finished: bool) -> tuple[str, str]:
    """(caption, trouble): the model's text without introduction and line breaks, and what is wrong with it, "" if nothing is.

    An unfinished text is cut after its last whole sentence; it is a failure only if that leaves fewer than 8 words.
    """
    caption = " ".join(INTRODUCTION.sub("", text.strip()).split()).strip('"“” ')
    words = re.findall(r"\w+", caption.lower())
    if len(words) < 3:
        return "", "empty"
    if REFUSAL.search(caption):
        return "", "refusal"
    runs = Counter(tuple(words[i:i + WINDOW[0]]) for i in range(len(words) - WINDOW[0] + 1))
    if (runs and max(runs.values()) >= WINDOW[1]) or (len(words) >= 24 and len(set(words)) < len(words) / 6):
        return "", "loop"
    if not finished:
        whole = re.match(r".*[.!?](?=\s|$)", caption, re.DOTALL)
        if whole is None or len(whole[0].split()) < 8:
            return "", "unfinished"
        caption = whole[0]
    return caption, ""


class Captioner:
    """A Qwen2.5-VL with its prompt. (list of uint8 [H, W, 3]) -> list of Answer.

    The first attempt is greedy, the others are sampled (temperature 0.7) with a seed that is a function of the attempt, so that the same batch
    on the same device gives the same captions. ValueError when the folder lacks something.
    """

    def __init__(self, config: CaptionConfig, device: torch.device):
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # needs no torchvision

        self.config, folder = config, check_folder(config.model)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
            self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
            self.model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                folder, dtype=DTYPES[config.dtype], use_safetensors=True, local_files_only=True, output_loading_info=True)
        except Exception as error:  # transformers raises many kinds
            raise ValueError(f"caption.model: cannot load {folder}: {type(error).__name__}: {error}") from error
        check_loaded(folder, info)
        self.processor.size = {"shortest_edge": min(56 * 56, config.max_pixels), "longest_edge": config.max_pixels}
        self.model = self.model.requires_grad_(False).eval().to(device)
        self.pad = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        self.ends = self.model.generation_config.eos_token_id
        self.ends = set(self.ends if isinstance(self.ends, list) else [self.ends])

    def __call__(self, pictures: list[np.ndarray]) -> list[Answer]:
        answers = [Answer("", "empty", 0) for _ in pictures]
        left = list(range(len(pictures)))
        for attempt in range(1 + self.config.retries):
            if not left:
                break
            for i, (text, finished) in zip(left, self.generate([pictures[i] for i in left], attempt)):
                caption, trouble = judge(text, finished)
                answers[i] = Answer(caption, trouble or answers[i].trouble * bool(attempt), attempt + 1)
            left = [i for i in left if not answers[i].caption]
        return answers

    @torch.inference_mode()
    def generate(self, pictures: list[np.ndarray], attempt: int = 0) -> list[tuple[str, bool]]:
        """(text, whether it came to its end) for each picture."""
        inputs = self.inputs(pictures)
        if attempt:
            torch.manual_seed(attempt)
        sampling = dict(do_sample=True, temperature=0.7, top_p=0.9, repetition_penalty=1.05) if attempt else dict(do_sample=False, temperature=None, top_p=None, top_k=None)
        output = self.model.generate(**{k: v.to(self.model.device) for k, v in inputs.items()}, max_new_tokens=self.config.max_tokens, **sampling)
        new = output[:, inputs["input_ids"].shape[1]:].tolist()
        return [(self.tokenizer.decode(tokens, skip_special_tokens=True), bool(self.ends & set(tokens))) for tokens in new]

    def inputs(self, pictures: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """What the model takes, on the CPU; prompts are padded on the left."""
        visual = self.processor(images=pictures, return_tensors="pt")
        merged = (visual["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist()
        text = self.tokenizer([self.prompt(tokens) for tokens in merged], padding=True, return_tensors="pt", add_special_tokens=False)
        return {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"],
                "mm_token_type_ids": (text["input_ids"] == self.model.config.image_token_id).long(),
                "pixel_values": visual["pixel_values"].to(self.model.dtype), "image_grid_thw": visual["image_grid_thw"]}

    def prompt(self, tokens: int) -> str:
        """Qwen2.5-VL's chat with one picture of `tokens` tokens."""
        return ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                f"<|vision_start|>{self.pad * tokens}<|vision_end|>{self.config.prompt}<|im_end|>\n<|im_start|>assistant\n")


def check_folder(name: str) -> Path:
    """The model's folder, complete by its files' headers. ValueError says what is missing and how to get it."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"caption.model: {folder} does not exist; {HOW_TO_GET.format(folder=folder)}")
    try:
        kind = check_component(folder).get("model_type")
    except ValueError as error:
        raise ValueError(f"caption.model: {error}; {HOW_TO_GET.format(folder=folder)}") from None
    if kind != "qwen2_5_vl":
        raise ValueError(f"caption.model: {folder} holds a {kind}, not a qwen2_5_vl; {HOW_TO_GET.format(folder=folder)}")
    missing = [file for file in ("tokenizer.json", "preprocessor_config.json") if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"caption.model: {folder} lacks {', '.join(missing)}; {HOW_TO_GET.format(folder=folder)}")
    return folder
