"""What every run of training has, be it pretraining (training.loop) or GRPO (training.grpo): the engine around the network under training, averaged
weights, checkpoints, skipped steps, the stop flag and the reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from proxt2i.config import TrainConfig
from proxt2i.config_files import to_yaml
from proxt2i.models.bundle import Bundle, Settings
from proxt2i.models.uvit import UViT2DModel
from proxt2i.training import engine as engines
from proxt2i.training.checkpoint import CheckpointStore, replace_text
from proxt2i.training.distributed import Ranks, StopFlag, gather_objects
from proxt2i.training.ema import EMA
from proxt2i.training.export import network_of
from proxt2i.training.preview import draw_grid
from proxt2i.training.spikes import SpikeGuard
from proxt2i.training.state import SavedState, write_rank
from proxt2i.training.tracking import Tracker


class Run:
    """One rank of a run. A subclass sets `uvit`, calls `start_engine`, sets `meter`, and has `_loop(stop)` and `_own_state()`.

    images_seen: so far.  saved: the newest checkpoint's folder, which holds the state after `saved_at` images.  checkpoint: the one that it began from.
    """

    def __init__(self, config, resume: str | None, ranks: Ranks):
        self.config, self.ranks, train = config, ranks, config.train
        self.run_dir = Path(train.run_dir)
        self.store = CheckpointStore(self.run_dir, ranks, train.keep_checkpoints)
        self.checkpoint = self.store.choose(resume, asdict(config), self._say)
        self.images_seen = self.checkpoint.images_seen if self.checkpoint else 0
        self.saved, self.saved_at = self.checkpoint.folder if self.checkpoint else None, self.images_seen
        spikes = {}
        if self.checkpoint:  # older checkpoints of pretraining call it "guard"
            spikes = self.checkpoint.state.get("spikes") or self.checkpoint.state["guard"]
        self.spikes = SpikeGuard(config.optim.spike, **spikes)
        self.bf16 = all(gather_objects(engines.runs_in_bf16(train.precision, ranks.device)))  # alike on all ranks
        if self.checkpoint and self.checkpoint.state.get("bf16", self.bf16) != self.bf16:
            self._say(f"changed: {self.checkpoint.folder} was trained in {'fp32' if self.bf16 else 'bf16'}, this run goes on in {'bf16' if self.bf16 else 'fp32'}, "
                      "not to the same bits; train.precision chooses")

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen text encoders, the VAE's encoding, and the network's autocast."""
        return torch.bfloat16 if self.bf16 else torch.float32

    def start_engine(self, deepspeed_json: dict, batches: TrainConfig, saved: SavedState | None) -> None:
        """Wrap `self.uvit`, its weights in place, for training; optimizer state and averages are those of `saved`. Collective.

        batches: batch_size, micro_batch and compile, as DeepSpeed is to see them.
        """
        optim, ranks = self.config.optim, self.ranks
        num_params = sum(p.numel() for p in self.uvit.parameters() if p.requires_grad)
        self.deepspeed_json = engines.fill_deepspeed_json(deepspeed_json, batches, optim, ranks.world_size, num_params, ranks.device.type == "cuda")
        if batches.compile:
            self.uvit.compile_repeated_blocks(fullgraph=True)
        self.engine, self.partition = engines.initialize(engines.Autocast(self.uvit, self.bf16), self.deepspeed_json, optim)
        self.optimizer = self.engine.optimizer.optimizer
        self.optimizer.skip = lambda: self.spikes.refuses(self._grad_norm())
        self.ema = EMA(self.partition.flat, optim.ema_half_life, optim.ema_ramp)
        if saved:
            saved.load_training(self.partition, self.ema, self.optimizer)

    def open_run_folder(self) -> None:
        """Rank 0's: the resolved settings, and the tracker."""
        if self.ranks.is_first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            replace_text(self.run_dir / "config.yaml", to_yaml(self.config))
            replace_text(self.run_dir / "deepspeed.json", json.dumps(self.deepspeed_json, indent=2))
            self.tracker = Tracker(self.run_dir, self.config, self.images_seen)

    def loop_and_save(self) -> int:
        """`_loop` to its end or to a signal, whose number is returned (else 0); then everything is saved."""
        with StopFlag(self.ranks) as stop:
            received = self._loop(stop)
            if self.saved_at != self.images_seen:
                self.save()
            if received:  # said before another signal can end the process
                self._say(f"interrupted by signal {received} after {self.images_seen:,} images, all saved; continue with --resume")
        return received

    # -- a step -------------------------------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        self._norm = None
        engines.set_learning_rate(self.engine, self.config.optim, self._learning_rate())

    def _end_step(self, batch_size: int, new_images: int) -> None:
        """After the optimiser's step on `batch_size` images, `new_images` of them seen for the first time and counted: average, or say what was wrong."""
        norm = self._grad_norm()  # infinite when DeepSpeed has skipped the step; the same on every rank
        bad = self.spikes.judge(norm)
        if bad:
            self._say(f"{bad} at {self.images_seen:,} images: step skipped ({self.spikes.skipped} so far)")
            if self.spikes.in_a_row >= self.config.train.max_bad_steps:
                raise ValueError(f"{self.spikes.in_a_row} steps in a row had to be skipped, the last for a {bad}: lower optim.lr, or "
                                 f"continue from an older checkpoint in {self.store.folder} with --resume PATH")
        else:
            self.meter.grad_norms.append(norm)
            self.ema.update(self.images_seen, batch_size)
        if self.ranks.is_first:
            self.tracker.advance(new_images)

    def _grad_norm(self) -> float:
        """Of this step, known once DeepSpeed has summed the gradients; read from the device once, though every parameter group asks."""
        if self._norm is None:
            self._norm = float(self.engine.optimizer._global_grad_norm)
        return self._norm

    def _learning_rate(self) -> float:
        return engines.learning_rate(self.config.optim, self.images_seen, self.config.train.images)

    def _passed(self, every: int, images: int) -> bool:
        """Whether the last `images` images passed a multiple of `every`, or ended the run."""
        return self.images_seen // every != (self.images_seen - images) // every or self.images_seen >= self.config.train.images

    # -- what it leaves behind ----------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint. Collective."""
        state = {"images_seen": self.images_seen, "world_size": self.ranks.world_size, "spikes": self.spikes.state(), "bf16": self.bf16,
                 "config": asdict(self.config), "network": dict(self.uvit.config), **self._own_state()}
        self.saved = self.store.save(state, lambda folder: write_rank(folder, self.partition, self.ema, self.optimizer))
        self.saved_at = self.images_seen

    def _averaged(self, weights: Mapping[str, Tensor]) -> UViT2DModel:
        """The network of averaged weights that all ranks have gathered, on the CPU."""
        return network_of(self.uvit.config, weights)

    def _draw_grid(self, text, codec, settings: Settings, components: Path, size: str | None = None) -> None:
        """Draw the sample grid with the averaged weights, on rank 0. Collective."""
        averages = self.partition.gather(self.ema.averages)
        if self.ranks.is_first:
            uvit = self._averaged(averages).to(self.ranks.device)
            with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.bf16):
                self.tracker.grid(self.images_seen, draw_grid(Bundle(uvit, text, codec, settings, components), self.config.sample, size))

    def _say(self, message: str) -> None:
        if self.ranks.is_first:
            print(message, flush=True)
