"""Scores the cases with the public packages' own classes and functions, and writes golden.json. Run by `make rewards-check` in its own venv.

    hpsv2 1.2.0          hpsv2.img_score.score, with a tiny CLIP in place of ViT-H-14
    image-reward 1.5     ImageReward.score, CLIPScore.inference_rank, AestheticScore.inference_rank, with tiny towers
    transformers 4.40    PickScore's model card: CLIPModel and CLIPProcessor, with a tiny CLIPModel
"""

import io
import json
import shutil
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import cases  # noqa: E402

SEED = 7


def import_torchvision():
    """A torchvision without its compiled operators (a CUDA build beside a CPU torch) still has the transforms that are all we need."""
    real = torch.library.register_fake
    torch.library.register_fake = lambda name, *a, **k: (lambda f: f) if name.startswith("torchvision::") else real(name, *a, **k)
    try:
        import torchvision  # noqa: F401
    finally:
        torch.library.register_fake = real


def import_hpsv2():
    """hpsv2's wheel lacks the BPE file that it reads when imported; open_clip's has the same."""
    import importlib.util

    target = Path(importlib.util.find_spec("hpsv2").origin).parent / "src" / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
    if not target.exists():
        shutil.copy(Path(importlib.util.find_spec("open_clip").origin).parent / target.name, target)
    from hpsv2 import img_score

    return img_score


def import_image_reward():
    """The package's modules without its __init__, which imports a trainer (diffusers, datasets)."""
    import importlib.util

    folder = Path(importlib.util.find_spec("ImageReward").origin).parent
    package = types.ModuleType("ImageReward")
    package.__path__ = [str(folder)]
    sys.modules["ImageReward"] = package
    from ImageReward import ImageReward
    from ImageReward.models import AestheticScore, CLIPScore

    return ImageReward, sys.modules["ImageReward.models.CLIPScore"], sys.modules["ImageReward.models.AestheticScore"]


def pil(batch):
    return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in batch]


def load(module, seed):
    module.load_state_dict(cases.weights(cases.shapes(module), seed), strict=False)
    return module.eval()


def over_all(function):
    """function(PIL image, prompt) -> score; a list per size of pictures."""
    with torch.no_grad():
        return [[float(function(image, prompt)) for image, prompt in zip(pil(batch), cases.PROMPTS)] for batch in cases.pictures()]


def hpsv2(work):
    img_score = import_hpsv2()
    from hpsv2.src.open_clip import model, tokenizer, transform

    full = [tokenizer.tokenize([prompt])[0].tolist() for prompt in TEXTS]
    c = cases.CLIP
    tiny = model.CLIP(32, dict(layers=c["vision_layers"], width=c["vision_width"], head_width=32, patch_size=c["patch_size"], image_size=c["image_size"]),
                      dict(context_length=77, vocab_size=len(cases.clip_vocabulary()), width=c["text_width"], heads=c["text_heads"], layers=c["text_layers"]), output_dict=True)
    load(tiny, SEED)
    torch.save({"state_dict": tiny.state_dict()}, work / "hps.pt")
    tokenizer._tokenizer = tokenizer.SimpleTokenizer(str(cases.write_bpe(work / "bpe.txt.gz")))
    img_score.model_dict.update(model=tiny, preprocess_val=transform.image_transform(c["image_size"], is_train=False, resize_longest_max=True))
    scores = over_all(lambda image, prompt: img_score.score(image, prompt, cp=str(work / "hps.pt"))[0])
    return {"package": f"hpsv2 {version('hpsv2')}", "heads": [c["text_heads"], 2], "shapes": cases.shapes(tiny), "scores": scores}, full


TEXTS = ["a photo of a cat", "An ASTRONAUT   riding a horse, on Mars!!", "fish &amp; chips &lt;3", "it's 1,234.5 o'clock; we'll see", "naïve café — déjà vu", "日本の城", "\tline\nbreak\t", "x" * 300 + " end", "photo " * 100, ""]


def image_reward(work):
    ir, clip_score, aesthetic_score = import_image_reward()
    import clip
    from ImageReward.models.BLIP import blip_pretrain
    from ImageReward.models.BLIP.vit import VisionTransformer
    from transformers import BertTokenizer

    vision, text = cases.BLIP_VISION, cases.BLIP_TEXT
    tokenizer = BertTokenizer.from_pretrained(cases.write_bert_tokenizer(work / "bert"))
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    blip_pretrain.init_tokenizer = lambda: tokenizer
    blip_pretrain.create_vit = lambda *a, **k: (VisionTransformer(img_size=vision["image_size"], patch_size=vision["patch_size"], embed_dim=vision["hidden_size"],
                                                                  depth=vision["num_hidden_layers"], num_heads=vision["num_attention_heads"]), vision["hidden_size"])
    med = text | dict(vocab_size=len(tokenizer), hidden_act="gelu", layer_norm_eps=1e-12, pad_token_id=0, type_vocab_size=2, add_cross_attention=True)
    (work / "med.json").write_text(json.dumps(med))
    ir.MLP, real_mlp = lambda size: real_mlp(text["hidden_size"]), ir.MLP
    model = ir.ImageReward(med_config=str(work / "med.json"))
    model.preprocess = ir._transform(vision["image_size"])
    load(model, SEED + 1)
    results = {"imagereward": {"package": f"image-reward {version('image-reward')}", "text_config": text | {"vocab_size": len(tokenizer)}, "shapes": cases.shapes(model),
                               "scores": over_all(lambda image, prompt: model.score(prompt, image))}}

    clip.clip._tokenizer = clip.simple_tokenizer.SimpleTokenizer(str(cases.write_bpe(work / "bpe.txt.gz")))
    c, vocabulary = cases.CLIP, len(cases.clip_vocabulary())
    for name, module, kind, width in (("clipscore", clip_score, "CLIPScore", 32), ("aesthetic", aesthetic_score, "AestheticScore", 768)):
        tiny = load(clip.model.CLIP(width, c["image_size"], c["vision_layers"], c["vision_width"], c["patch_size"], 77, vocabulary, c["text_width"], c["text_heads"],
                                    c["text_layers"]), SEED + 2)
        module.clip.load = lambda *a, tiny=tiny, **k: (tiny, clip.clip._transform(c["image_size"]))
        scorer = getattr(module, kind)(download_root=None, device="cpu").eval()
        head = {}
        if name == "aesthetic":
            load(scorer.mlp, SEED + 3)
            head = {"head_shapes": cases.shapes(scorer.mlp)}

        def file(image):
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            return buffer

        results[name] = {"package": f"image-reward {version('image-reward')}, clip-anytorch {version('clip-anytorch')}", "heads": [c["text_heads"], c["vision_heads"]],
                         "shapes": cases.shapes(tiny), **head, "scores": over_all(lambda image, prompt: scorer.score(prompt, file(image)))}
    return results


def pickscore(work):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    tokenizer = CLIPTokenizerFast.from_pretrained(cases.write_clip_tokenizer(work / "clip"))
    c, size = cases.CLIP, cases.CLIP["image_size"]
    text = dict(vocab_size=len(tokenizer), hidden_size=c["text_width"], intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu",
                bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1, pad_token_id=len(tokenizer) - 1)
    vision = dict(hidden_size=c["vision_width"], intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=size, patch_size=c["patch_size"], hidden_act="gelu")
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    model = load(CLIPModel(config), SEED + 4)
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}), tokenizer)

    def score(image, prompt):  # the model card's code
        image_inputs = processor(images=[image], padding=True, truncation=True, max_length=77, return_tensors="pt")
        text_inputs = processor(text=prompt, padding=True, truncation=True, max_length=77, return_tensors="pt")
        image_embs = model.get_image_features(**image_inputs)
        image_embs = image_embs / torch.norm(image_embs, dim=-1, keepdim=True)
        text_embs = model.get_text_features(**text_inputs)
        text_embs = text_embs / torch.norm(text_embs, dim=-1, keepdim=True)
        return (model.logit_scale.exp() * (text_embs @ image_embs.T)[0])[0]

    return {"package": f"transformers {version('transformers')}", "text_config": text, "vision_config": vision, "projection_dim": 32, "shapes": cases.shapes(model),
            "scores": over_all(score)}


def main():
    out = Path(sys.argv[1])
    import_torchvision()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        hps, full = hpsv2(work)
        results = {"seed": SEED, "versions": {n: version(n) for n in ("torch", "torchvision", "timm", "pillow")}, "hpsv2": hps, **image_reward(work), "pickscore": pickscore(work)}
    out.write_text(json.dumps(results, sort_keys=True).replace('"shapes": {', '"shapes": {\n  ').replace("], ", "],\n  ") + "\n")
    tokens = out.with_name(out.stem + "-tokens.json")
    tokens.write_text(json.dumps({"texts": TEXTS, "tokens": full}) + "\n")
    print(f"wrote {out} and {tokens}")


if __name__ == "__main__":
    main()
