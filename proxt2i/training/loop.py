"""The training loop: batches in, checkpoints, statistics and a model folder out. Progress is counted in images."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict
from pathlib import Path

import torch

from proxt2i.config import Config, ModelConfig
from proxt2i.data.buckets import parse_size
from proxt2i.models.bundle import EMBEDDED, load_uvit
from proxt2i.models.uvit import PRESETS, UViT2DModel, build_uvit
from proxt2i.training import distributed
from proxt2i.training.distributed import Ranks, StopFlag
from proxt2i.training.export import export
from proxt2i.training.feed import Batch, Feed, check_sizes
from proxt2i.training.meter import Meter
from proxt2i.training.objective import Objective
from proxt2i.training.preview import settings_of
from proxt2i.training.run import Run
from proxt2i.training.state import SavedState


def train(config: Config, deepspeed_json: dict, resume: str | None = None) -> int:
    """Run training on this rank. Returns 0 when finished, or the number of the signal that interrupted it.

    resume: None (the run folder must hold no checkpoints), "auto" (its newest intact checkpoint, or a fresh start when
    it has none), or a checkpoint folder. Raises ValueError for input that cannot work, before training starts.
    """
    ranks = distributed.start(config.train.threads)
    received = Trainer(config, deepspeed_json, resume, ranks).run()
    distributed.stop()
    return received


class Trainer(Run):
    """One rank of a run. Weights under training, averaged weights, optimizer, data and reports, and how they are saved."""

    def __init__(self, config: Config, deepspeed_json: dict, resume: str | None, ranks: Ranks):
        super().__init__(config, resume, ranks)
        self.batch_size = config.train.batch_size
        per_rank = self.batch_size // ranks.world_size
        self.micro_batch = config.train.micro_batch or per_rank
        self.feed = Feed(config.data, Path(config.model.components or EMBEDDED), ranks, per_rank, patch_size=patch_size_of(config.model),
                         seed=config.train.seed, run_dir=self.run_dir, dtype=self.dtype)
        self.batch: Batch | None = None  # of the next step, fetched ahead
        self.objective = Objective(config.diffusion, config.train.seed)
        self.uvit = self._build_uvit()
        saved = SavedState(self.checkpoint.folder) if self.checkpoint else None
        if saved:
            saved.load_weights(self.uvit)
            check_same_network(self.uvit, self.checkpoint.state["network"], str(self.checkpoint.folder))
        elif config.model.init_from:
            warm_start(self.uvit, Path(config.model.init_from))
        self.start_engine(deepspeed_json, config.train, saved)
        num_params = sum(p.numel() for p in self.uvit.parameters())
        self._say(f"{num_params / 1e6:.2f} M parameters, {ranks.world_size} rank(s) on {ranks.device.type}, "
                  f"{torch.get_num_threads()} CPU thread(s) each, {'bf16 autocast' if self.bf16 else 'fp32'}")
        self.open_run_folder()

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        self.feed.open(self.images_seen, self._say)
        self.meter = Meter(self.objective.pairs.bucket_names, self.uvit.config, self.ranks, self.config.train.peak_tflops)
        received = self.loop_and_save()
        self.feed.close()
        if not received:
            self._finish()
        if self.ranks.is_first:
            self.tracker.close()
        return received

    def _loop(self, stop: StopFlag) -> int:
        train, sample_every = self.config.train, self.config.sample.every
        received = 0
        while self.images_seen < train.images and not received:
            self.step()
            received = stop.reduced()
            if self._crossed(train.log_every):
                self._log()
            with self._paused():
                if sample_every and self._crossed(sample_every):
                    self._sample()
                if self._crossed(train.checkpoint_every):
                    self.save()
        return received

    def step(self) -> None:
        """One optimiser step on `batch_size` images."""
        self._begin_step()
        batch = self.batch or self._next_batch()
        self.batch = None
        parts = list(batch.micro_batches(self.micro_batch))
        for number, part in enumerate(parts, 1):
            example = self.objective.example(part.latents, part.positions)
            text = self.objective.drop_captions(part.text, self.feed.null_text, part.positions)
            eps = self.engine(example.y, example.t, example.lam, text)
            losses = self.objective.loss(eps, example, self.images_seen)
            self.engine.backward((losses * example.weight).mean())
            self.meter.add_losses(losses.detach(), example.bucket)
            if number == len(parts) and self.images_seen + self.batch_size < self.config.train.images:
                self.batch = self._next_batch()  # now a GPU has work for a while; the optimiser's step will wait for the gradient's norm
            self.engine.step()
        self.images_seen += self.batch_size
        self.meter.add_images(batch.latents)
        self._end_step(self.batch_size, self.batch_size)

    def _next_batch(self) -> Batch:
        with self.meter.waits_for_data():
            return self.feed.next()

    def _crossed(self, every: int) -> bool:
        """Whether the last step passed a multiple of `every` images, or ended the run."""
        return self._passed(every, self.batch_size)

    @contextlib.contextmanager
    def _paused(self):
        """Time that is not training: kept out of images/s."""
        start = time.perf_counter()
        yield
        self.meter.paused_seconds += time.perf_counter() - start

    # -- what it leaves behind ----------------------------------------------------------------------------------------

    def _log(self) -> None:
        row = self.meter.summary()
        bad_samples = self.feed.count_bad_samples()
        if self.ranks.is_first:
            self.tracker.log({"images": self.images_seen, "lr": self._learning_rate(), "bad_steps": self.spikes.skipped,
                              "bad_samples": bad_samples, **row})

    def _sample(self) -> None:
        self._draw_grid(self.feed.text, self.feed.codec, settings_of(self.config), self.feed.components, self.config.sample.size)

    def _own_state(self) -> dict:
        return {"settings": asdict(settings_of(self.config)), "components": str(self.feed.components)}

    def _finish(self) -> None:
        """Export the averaged weights, just saved, with the frozen components as a model folder."""
        if self.ranks.is_first:
            export(self.saved, self.run_dir / "model")
            self._say(f"finished {self.images_seen:,} images; model: {self.run_dir / 'model'}")

    # -- set-up -------------------------------------------------------------------------------------------------------

    def _build_uvit(self) -> UViT2DModel:
        """The network, the same on every rank."""
        torch.manual_seed(self.config.train.seed)
        codec, text = self.feed.codec, self.feed.text
        return uvit_of(self.config, codec.channels, codec.factor, text.dims, text.lengths).to(self.ranks.device)


def uvit_of(config: Config, channels: int, factor: int, text_dims: list[int], text_lengths: list[int]) -> UViT2DModel:
    """The network of a run, freshly initialised: sized by the config, the codec (its channels, and pixels per latent) and the
    text encoders. Raises ValueError where they do not fit each other."""
    settings = {key: value for key, value in asdict(config.model).items() if value is not None and key not in ("preset", "components", "init_from")}
    if config.diffusion.precondition:
        settings["betas"] = [config.diffusion.beta_min, config.diffusion.beta_max]
    multiple = factor * patch_size_of(config.model)
    if config.data.image_size % multiple:
        raise ValueError(f"data.image_size ({config.data.image_size}) must be a multiple of {multiple}: pixels per latent times model.patch_size")
    if config.sample.size:
        check_sizes([parse_size(config.sample.size)], multiple)
    return build_uvit(config.model.preset, sample_size=config.data.image_size // factor, in_channels=channels, text_dims=text_dims,
                      text_lengths=text_lengths, **settings)


def patch_size_of(model: ModelConfig) -> int:
    return model.patch_size or PRESETS.get(model.preset, {}).get("patch_size", 1)


def check_same_network(uvit: UViT2DModel, saved: dict, source: str) -> None:
    """ValueError if `saved` describes another network: some weights would load (another number of heads, another
    preconditioning), and mean something else."""
    for key, value in uvit.config.items():
        if not key.startswith("_") and key != "gradient_checkpointing" and saved.get(key) != value:
            name = "preconditioning for (beta_min, beta_max)" if key == "betas" else key
            raise ValueError(f"{source} was trained with {name} = {saved.get(key)}, this run asks for {value}: keep the model and "
                             "diffusion settings as they were")


def warm_start(uvit: UViT2DModel, folder: Path) -> None:
    """Fill `uvit` with the weights of a model folder; positions are interpolated when it was made for another image size."""
    source = load_uvit(folder / "uvit" if (folder / "uvit").is_dir() else folder, next(uvit.parameters()).device)
    if source.config.sample_size != uvit.config.sample_size:
        source.resize_(uvit.config.sample_size)
    check_same_network(uvit, dict(source.config), f"model.init_from: {folder}")
    uvit.load_state_dict(source.state_dict())
