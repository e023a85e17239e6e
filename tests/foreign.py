"""Tiny random pipelines of diffusers' own classes, without text encoders: they are called with embeddings."""

import torch
from diffusers import (
    AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, PNDMScheduler,
    SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel,
)

SCALED_LINEAR = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def _vae(channels):
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2,
                         up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=0.1, scaling_factor=0.5)


def _unet(**more):
    return UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                                cross_attention_dim=12, attention_head_dim=4, **more)


def stable_diffusion(prediction_type="epsilon"):
    """SD 1.x's (PNDM, epsilon) or 2.x's (DDIM, v) scheduler."""
    if prediction_type == "epsilon":
        scheduler = PNDMScheduler(**SCALED_LINEAR, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    else:
        scheduler = DDIMScheduler(**SCALED_LINEAR, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipe = StableDiffusionPipeline(vae=_vae(4), text_encoder=None, tokenizer=None, unet=_unet(), scheduler=scheduler, safety_checker=None,
                                   feature_extractor=None, requires_safety_checker=False)
    return pipe, dict(prompt_embeds=torch.randn(2, 5, 12), negative_prompt_embeds=torch.randn(2, 5, 12), height=16, width=16)


def stable_diffusion_xl():
    unet = _unet(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=8 + 6 * 4)
    scheduler = EulerDiscreteScheduler(**SCALED_LINEAR, timestep_spacing="leading", steps_offset=1)
    pipe = StableDiffusionXLPipeline(vae=_vae(4), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet,
                                     scheduler=scheduler, add_watermarker=False)
    embeds = {f"{name}prompt_embeds": torch.randn(2, 5, 12) for name in ("", "negative_")}
    pooled = {f"{name}pooled_prompt_embeds": torch.randn(2, 8) for name in ("", "negative_")}
    return pipe, dict(**embeds, **pooled, height=16, width=16)


def stable_diffusion_3():
    transformer = SD3Transformer2DModel(sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
                                        caption_projection_dim=16, joint_attention_dim=12, pooled_projection_dim=8, out_channels=4)
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_vae(4), text_encoder=None,
                                    tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None)
    embeds = {f"{name}prompt_embeds": torch.randn(2, 5, 12) for name in ("", "negative_")}
    pooled = {f"{name}pooled_prompt_embeds": torch.randn(2, 8) for name in ("", "negative_")}
    return pipe, dict(**embeds, **pooled, height=16, width=16)


def flux():
    transformer = FluxTransformer2DModel(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                                         joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipe = FluxPipeline(scheduler=scheduler, vae=_vae(1), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer)
    return pipe, dict(prompt_embeds=torch.randn(2, 5, 12), pooled_prompt_embeds=torch.randn(2, 8), height=16, width=16)
