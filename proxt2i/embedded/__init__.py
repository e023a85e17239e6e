"""The embedded default: tiny components trained on portraits by the scripts in this folder and shipped in `assets/`.

    python -m proxt2i.embedded.train_vae      # AutoencoderKL, 16 channels, 8x
    python -m proxt2i.embedded.train_clip     # CLIPModel: the text encoder, and the retrieval figures
    python -m proxt2i.embedded.train_clip_vision  # its vision tower further: what pickscore_contrast asks, also of pictures with errors
    python -m proxt2i.embedded.train_judge    # attribute classifier, the independent judge of the evaluation
    python -m proxt2i.embedded.build          # these in order, then the U-ViT that `proxt2i.sample` uses
"""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"

# Seeds of disjoint portrait sets. Training of the U-ViT and of every component draws below HELD_OUT.
TRAIN_SEED = 0
HELD_OUT_SEED = 100_000_000

# The model that `python -m proxt2i.sample` uses when none is named: uvit/ and scheduler/, with the components above.
SHIPPED_MODEL = ASSETS / "portraits"
