"""A model folder as a pipeline of diffusers. It draws what `python -m proxt2i.sample` draws, bit for bit, through the same loop."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from .diffusion import CudaGraphs
from .diffusion.scheduler import ProximalScheduler
from .images import to_pil, to_uint8
from .models.bundle import EMBEDDED, Bundle, Settings, check_fit, find_components, load_components, write_card
from .models.text import TextEncoder
from .models.uvit import UViT2DModel
from .models.vae import LatentCodec, PixelSpace
from .pipeline import guidance_of, latent_size, plan_of, sample_latents

OUTPUT_TYPES = ("pil", "pt", "np", "latent")


class ProxT2IPipeline(DiffusionPipeline):
    """Text to image with a learned proximal operator.

    Args:
        uvit: the network.  scheduler: a ProximalScheduler; its config says how the model is sampled unless told otherwise.
        text_encoder, tokenizer (and _2): CLIPTextModel or T5EncoderModel with its tokenizer.  vae: None for a model of pixels.
        Without text encoders and VAE, those embedded in the package are used.

    Raises ValueError for components that do not fit each other.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->uvit->vae"
    _optional_components = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(self, uvit: UViT2DModel, scheduler: ProximalScheduler, text_encoder=None, tokenizer=None, text_encoder_2=None,
                 tokenizer_2=None, vae: AutoencoderKL | None = None):
        super().__init__()
        for name, encoder, its_tokenizer in (("", text_encoder, tokenizer), ("_2", text_encoder_2, tokenizer_2)):
            if (encoder is None) != (its_tokenizer is None):
                missing, present = ("text_encoder", "tokenizer") if encoder is None else ("tokenizer", "text_encoder")
                raise ValueError(f"{present}{name} is given but {missing}{name} is missing: the two belong together")
        if text_encoder is None:
            if vae is not None or text_encoder_2 is not None:
                raise ValueError("text_encoder and tokenizer are missing; only without any text encoder and VAE are the embedded ones used")
            text, codec = load_components(EMBEDDED)
            (text_encoder,), (tokenizer,), vae = text.encoders, text.tokenizers, codec.vae
        if not isinstance(scheduler, ProximalScheduler) or scheduler.config.prediction_type != "prox":
            raise ValueError(f"the scheduler is a {type(scheduler).__name__}; the U-ViT of this pipeline needs a ProximalScheduler with "
                             "prediction_type='prox'")
        for encoder in (text_encoder, text_encoder_2):
            if encoder is not None:
                encoder.to(uvit.dtype)  # transformers loads what the file holds
        self.register_modules(uvit=uvit, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer,
                              text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, vae=vae)
        self._network: CudaGraphs | None = None
        bundle = self.bundle
        check_fit(bundle.uvit, bundle.text, bundle.codec, "this pipeline")
        self._interrupt = False

    @property
    def bundle(self) -> Bundle:
        """The components as `proxt2i.pipeline` takes them."""
        pairs = [pair for pair in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)) if pair[1] is not None]
        text = TextEncoder(*map(list, zip(*pairs)))
        codec = PixelSpace() if self.vae is None else LatentCodec(self.vae)
        if not isinstance(self.scheduler, ProximalScheduler):
            raise ValueError(f"the scheduler is a {type(self.scheduler).__name__}; the U-ViT of this pipeline answers a ProximalScheduler only")
        settings = Settings(**{field.name: self.scheduler.config[field.name] for field in fields(Settings)})
        return Bundle(self.uvit.requires_grad_(False).eval(), text, codec, settings, network=self._network)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As DiffusionPipeline's. ValueError, before weights are read, when a component that a local folder lists is missing."""
        if Path(pretrained_model_name_or_path).is_dir():
            find_components(Path(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """As DiffusionPipeline's, in the layout that `models.load_bundle` reads too; weights as safetensors."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        bundle = self.bundle
        write_card(Path(save_directory), bundle.uvit, bundle.settings)
        super().save_pretrained(str(save_directory), **kwargs)

    def enable_cuda_graphs(self) -> None:
        """Replay all steps of the sampler at once (with a callback: the network of each) instead of launching them kernel by kernel: faster for
        small batches on a GPU, the same elsewhere. For many calls of the same sizes; see diffusion.CudaGraphs."""
        self._network = CudaGraphs(self.uvit)

    def disable_cuda_graphs(self) -> None:
        self._network = None

    def enable_vae_slicing(self) -> None:
        """Decode one picture after the other: less memory."""
        self._vae().enable_slicing()

    def disable_vae_slicing(self) -> None:
        self._vae().disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode overlapping tiles: large pictures in less memory, with pixels that differ a little where tiles meet."""
        self._vae().enable_tiling()

    def disable_vae_tiling(self) -> None:
        self._vae().disable_tiling()

    def _vae(self) -> AutoencoderKL:
        if self.vae is None:
            raise ValueError("this model draws pixels and has no VAE to slice or tile")
        return self.vae

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in callback_on_step_end to stop at that step."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_below: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: int | list[int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draws num_images_per_prompt pictures of each prompt, one prompt's together, all in one batch.

        Args:
            negative_prompt: what guidance leads away from instead of the empty caption; one, or one a prompt.
            num_inference_steps, guidance_scale, guidance_below: default: the scheduler's config. Guidance is batched with the prompt and
                applies to steps whose noise is that of a time up to guidance_below (1: all, 0: the last).
            height, width: in pixels; default: the model's own.
            seeds: one a picture, or one number s: image i of every prompt then has s + i, as in `python -m proxt2i.sample`. A picture's
                noise is a function of its seed alone.
            generator: draws the seeds that are not given; one, or one a picture.
            output_type: pil, pt (float32 [B, 3, H, W] in [0, 1]), np ([B, H, W, 3]) or latent (as the U-ViT sees them).
            callback_on_step_end: called as callback(pipe, step, tau, {"latents": x}) with the prox's result x after every step; it is for
                looking (and for `pipe._interrupt = True`), the latents cannot be replaced.

        Returns ImagePipelineOutput with `images`. Raises ValueError for input that does not fit, before anything is drawn.
        """
        bundle = self.bundle
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise ValueError("prompt must be a string that is not empty, or a list of such")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt={num_images_per_prompt}: must be at least 1")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type {output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}")
        if tuple(callback_on_step_end_tensor_inputs) != ("latents",):
            raise ValueError("callback_on_step_end_tensor_inputs: only 'latents' can be asked for")
        own = latent_size(bundle)
        size = (height or own[0] * bundle.codec.factor, width or own[1] * bundle.codec.factor)
        latent_size(bundle, size)
        steps = plan_of(bundle.settings, num_inference_steps)
        guidance_scale, guidance_below = guidance_of(bundle.settings, guidance_scale, guidance_below)
        negatives = self._negatives(negative_prompt, prompts, num_images_per_prompt)
        seeds = self._seeds(seeds, generator, len(prompts), num_images_per_prompt)
        bundle.text.warn_unheard([*prompts, *(negatives or ())])

        self._interrupt = False
        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        with self.progress_bar(total=steps.num_steps) as bar:
            latents, = sample_latents(
                bundle, prompts, seeds, negative_prompts=negatives, num_steps=steps.num_steps, guidance_scale=guidance_scale,
                guidance_below=guidance_below, size=size, batch_size=len(prompts), device=self._execution_device, after_step=lambda i: bar.update(i + 1 - bar.n),
                callback=None if callback_on_step_end is None else self._callback(callback_on_step_end, steps.tau),
            )  # fmt: skip
        images = latents if output_type == "latent" else self._finish(bundle.codec.decode(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _callback(self, function: Callable, tau: list[float]) -> Callable[[int, Tensor, Tensor], bool]:
        def callback(i: int, y: Tensor, x: Tensor) -> bool:
            returned = function(self, i, tau[i], {"latents": x}) or {}
            if returned.get("latents", x) is not x:
                raise ValueError("callback_on_step_end returned other latents; those of proximal steps cannot be replaced")
            return not self._interrupt

        return callback

    @staticmethod
    def _negatives(negative_prompt, prompts: list[str], copies: int) -> list[str] | None:
        if negative_prompt is None:
            return None
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one a prompt")
        return [n for n in negatives for _ in range(copies)]

    @staticmethod
    def _seeds(seeds, generator, num_prompts: int, copies: int) -> list[int]:
        count = num_prompts * copies
        if seeds is not None:
            if generator is not None:
                raise ValueError("seeds and generator are both given: choose one")
            seeds = [seeds + i for i in range(copies)] * num_prompts if isinstance(seeds, int) else list(seeds)
            if len(seeds) != count:
                raise ValueError(f"{len(seeds)} seeds for {count} pictures: give one number, or one a picture")
            return seeds
        generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * count
        if len(generators) != count:
            raise ValueError(f"{len(generators)} generators for {count} pictures: give one, or one a picture")
        return [torch.randint(2**63 - 1, (1,), generator=g, device=g.device if g is not None else "cpu").item() for g in generators]

    @staticmethod
    def _finish(images: Tensor, output_type: str):
        """Decoded pictures, [-1, 1], in the form that was asked for."""
        if output_type == "pil":
            return [to_pil(image) for image in to_uint8(images).cpu()]
        images = (images / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.cpu().permute(0, 2, 3, 1).numpy()
