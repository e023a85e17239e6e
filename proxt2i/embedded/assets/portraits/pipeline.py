"""DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True) finds its class here; needs the package proxt2i."""

from proxt2i.pipeline_diffusers import ProxT2IPipeline

__all__ = ["ProxT2IPipeline"]
