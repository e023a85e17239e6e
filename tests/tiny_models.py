"""Random models of a few thousand parameters with the classes and files of the real ones, for the stages of a curation."""

from pathlib import Path

import torch
from safetensors.torch import save_file


def write_qwen(folder: Path, seed=0) -> Path:
    """A Qwen2.5-VL with a tokenizer of single characters. What it writes is noise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(letters + special)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", additional_special_tokens=special)
    fast.save_pretrained(folder)
    ids = {token: fast.convert_tokens_to_ids(token) for token in special}
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}, bos_token_id=ids["<|endoftext|>"],
                         eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]),
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, patch_size=14, window_size=56, fullatt_block_indexes=[1]),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(bos_token_id=ids["<|endoftext|>"], eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"],
                                               do_sample=True, temperature=1e-6, repetition_penalty=1.05)  # as the real one ships
    model.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=2, merge_size=2).save_pretrained(folder)
    return folder


def write_aesthetic(folder: Path, seed=0) -> Path:
    """CLIP and the predictor's head, as the reward `aesthetic` wants them. Its scores spread around 5."""
    from transformers import CLIPConfig, CLIPModel

    from proxt2i.rewards.aesthetic import HEADS, linear_head

    torch.manual_seed(seed)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = CLIPConfig(text_config={**tower, "vocab_size": 64, "max_position_embeddings": 16}, vision_config={**tower, "image_size": 28, "patch_size": 14}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    head = linear_head(16)
    head[-1].weight.mul_(60)
    save_file({f"layers.{name}": tensor for name, tensor in head.state_dict().items()}, folder / HEADS[0])
    return folder


def teach(captioner, pictures, captions, steps=90) -> None:
    """Make a tiny captioner say `captions` of `pictures`."""
    model, tokenizer = captioner.model.requires_grad_(True).train(), captioner.tokenizer
    prompt = captioner.inputs(pictures)
    answer = tokenizer([caption + "<|im_end|>" for caption in captions], padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
    ids = torch.cat([prompt.pop("input_ids"), answer["input_ids"]], 1)
    prompt["attention_mask"] = torch.cat([prompt["attention_mask"], answer["attention_mask"]], 1)
    prompt["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(answer["input_ids"])], 1)
    labels = ids.masked_fill(prompt["attention_mask"] == 0, -100)
    labels[:, : -answer["input_ids"].shape[1]] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=labels, **prompt).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False).eval()
