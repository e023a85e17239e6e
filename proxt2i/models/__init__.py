"""U-ViT, frozen text encoders, VAE, and the model folder that holds them."""

from .bundle import Bundle, Settings, load_bundle, load_components, load_uvit, save_bundle
from .text import TextEncoder
from .uvit import PRESETS, UViT2DModel, build_uvit, resize_position_embedding
from .vae import LatentCodec, PixelSpace, load_codec

__all__ = ["PRESETS", "Bundle", "LatentCodec", "PixelSpace", "Settings", "TextEncoder", "UViT2DModel", "build_uvit",
           "load_bundle", "load_codec", "load_components", "load_uvit", "resize_position_embedding", "save_bundle"]
