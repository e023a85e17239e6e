"""GRPO (group-relative policy optimisation) of a few-step sampler: rollouts in, checkpoints, statistics and a model folder out.

A run is a sequence of rollouts. Each draws `rollout.updates` x `groups_per_update` groups of `group_size` images with the weights as they are
(training.rollouts), and then takes `updates` optimiser steps, each on its own groups. Every random number is a function of
(seed, images seen), so a resumed run needs no generator state.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from proxt2i import config as pretraining
from proxt2i.config_files import to_yaml
from proxt2i.data.prompts import Prompts, load_prompts
from proxt2i.diffusion import VPSchedule, guidance_scales, guided_output, make_plan, make_policy, score_plan
from proxt2i.diffusion.policy import Policy, compare
from proxt2i.diffusion.score import SCORE_SAMPLERS
from proxt2i.embedded import SHIPPED_MODEL
from proxt2i.grpo_config import GrpoConfig, images_per_update, micro_batch_of
from proxt2i.models.bundle import Bundle, Settings, check_fit, find_components, load_components, load_settings, load_uvit
from proxt2i.models.text import cut_captions, text_sizes
from proxt2i.training import distributed, engine as engines
from proxt2i.training.advantage import surrogate
from proxt2i.training.checkpoint import CheckpointStore, replace_text
from proxt2i.training.distributed import Ranks, StopFlag
from proxt2i.training.ema import EMA
from proxt2i.training.export import export, network_of
from proxt2i.training.feed import Feed
from proxt2i.training.grpo_eval import Evaluator
from proxt2i.training.grpo_meter import GrpoMeter
from proxt2i.training.guard import Guard
from proxt2i.training.objective import Objective
from proxt2i.training.preview import draw_grid
from proxt2i.training.rollouts import Experience, Roller
from proxt2i.training.spikes import SpikeGuard
from proxt2i.training.state import SavedState, write_rank
from proxt2i.training.tracking import Tracker


def train(config: GrpoConfig, deepspeed_json: dict, resume: str | None = None) -> int:
    """Run on this rank. Returns 0 when finished, or the number of the signal that interrupted it. `resume`: as training.loop.train."""
    ranks = distributed.start(config.train.threads)
    received = GrpoTrainer(config, deepspeed_json, resume, ranks).run()
    distributed.stop()
    return received


class GrpoTrainer:
    """One rank of a run: the policy under training, its frozen reference, and what surrounds them."""

    def __init__(self, config: GrpoConfig, deepspeed_json: dict, resume: str | None, ranks: Ranks):
        self.config, self.ranks, train = config, ranks, config.train
        self.run_dir = Path(train.run_dir)
        self.initial = Path(config.model.init_from or SHIPPED_MODEL)
        self.components = Path(config.model.components or find_components(self.initial))
        self.prompts = read_prompts(config, self.components)
        initial_settings = load_settings(self.initial)
        self.policy = policy_of(config, initial_settings)
        self.settings = exported_settings(config, initial_settings)
        self.store = CheckpointStore(self.run_dir, ranks, train.keep_checkpoints)
        checkpoint = self.store.choose(resume, asdict(config), self._say)
        self.images_seen = checkpoint.images_seen if checkpoint else 0
        self.saved, self.saved_at = checkpoint.folder if checkpoint else None, self.images_seen
        self.spikes = SpikeGuard(config.optim.spike, **(checkpoint.state["spikes"] if checkpoint else {}))
        self.guard, self.kl = Guard(config.guard.min_diversity), config.policy.kl
        if checkpoint:
            self.guard.load(checkpoint.state["guard"])
            self.kl = checkpoint.state["kl"] if config.guard.alarm == "raise_kl" else config.policy.kl
            self.store.protected = self.guard.best
        self.alarm = ""
        self.fingerprint = _fingerprint(self.initial)
        if checkpoint and checkpoint.state["initial"] != self.fingerprint:
            raise ValueError(f"{checkpoint.folder} began from other weights than those in {self.initial}: set model.init_from to the model that "
                             "the run started from, which is its reference")

        on_gpu = ranks.device.type == "cuda"
        self.bf16 = train.precision == "bf16" or (train.precision == "auto" and on_gpu)
        self.text, self.codec = load_components(self.components, ranks.device, torch.bfloat16 if self.bf16 else torch.float32)
        self.uvit = load_uvit(self.initial / "uvit", ranks.device)
        check_fit(self.uvit, self.text, self.codec, self.components)
        self.reference = None
        if config.policy.kl:
            self.reference = engines.Autocast(load_uvit(self.initial / "uvit", ranks.device).requires_grad_(False).eval(), self.bf16)
        saved = SavedState(checkpoint.folder) if checkpoint else None
        if saved:
            saved.load_weights(self.uvit)
        self.uvit.gradient_checkpointing = config.model.gradient_checkpointing
        shape = (self.uvit.config.in_channels, self.uvit.config.sample_size, self.uvit.config.sample_size)
        self.roller = Roller(config, self.settings, self.policy, self.prompts, self.text, self.codec, shape, ranks)

        num_params = sum(p.numel() for p in self.uvit.parameters())
        self.per_update, self.micro_batch = images_per_update(config), micro_batch_of(config, ranks.world_size)
        self.passes = len(self._steps(0)) + bool(config.policy.data_weight)  # of the network over an image in an update
        engine_batches = pretraining.TrainConfig(batch_size=self.per_update * self.passes, micro_batch=self.micro_batch, compile=train.compile)
        filled = engines.fill_deepspeed_json(deepspeed_json, engine_batches, config.optim, ranks.world_size, num_params, on_gpu)
        if train.compile:
            self.uvit.compile_blocks()
        self.engine, self.partition = engines.initialize(engines.Autocast(self.uvit, self.bf16), filled, config.optim)
        self.optimizer = self.engine.optimizer.optimizer
        self.optimizer.skip = lambda: self.spikes.refuses(self._grad_norm())
        self.ema = EMA(self.partition.flat, config.optim.ema_half_life, config.optim.ema_ramp)
        if saved:
            saved.load_training(self.partition, self.ema, self.optimizer)
        self.feed = self.objective = None
        if config.policy.data_weight:
            self.feed = Feed(config.data, self.components, ranks, self.roller.per_rank, patch_size=self.uvit.config.patch_size, seed=train.seed,
                             run_dir=self.run_dir, dtype=torch.bfloat16 if self.bf16 else torch.float32)
            self.objective = Objective(data_objective(config, initial_settings), train.seed)
        self.meter = GrpoMeter(ranks)
        self.evaluate = Evaluator(config, self.roller) if config.guard.every else None
        self._say(f"{num_params / 1e6:.2f} M parameters, {ranks.world_size} rank(s) on {ranks.device.type}, {len(self.prompts):,} prompts, "
                  f"a rollout is {self.roller.images:,} images in {config.rollout.updates} update(s), micro-batches of {self.micro_batch}")
        if ranks.is_first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            replace_text(self.run_dir / "config.yaml", to_yaml(config))
            replace_text(self.run_dir / "deepspeed.json", json.dumps(filled, indent=2))
            self.tracker = Tracker(self.run_dir, config, self.images_seen)

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        if self.feed:
            self.feed.open(self.images_seen, self._say)
        with StopFlag(self.ranks) as stop:
            received = self._loop(stop)
            if self.saved_at != self.images_seen:
                self.save()
            if received:  # said before another signal can end the process
                self._say(f"interrupted by signal {received} after {self.images_seen:,} images, all saved; continue with --resume")
        self.roller.scorer.close()
        if self.feed:
            self.feed.close()
        if self.ranks.is_first and not received:
            restored = self.alarm and self.config.guard.alarm == "restore" and self.guard.best
            source = self.store.folder / self.guard.best if restored else self.saved
            export(source, self.run_dir / "model")
            of = f", the weights of {source.name}" if restored else ""
            self._say(f"finished {self.images_seen:,} images; model: {self.run_dir / 'model'}{of}")
        if self.ranks.is_first:
            self.tracker.close()
        return received

    def _loop(self, stop: StopFlag) -> int:
        train, sample_every, received = self.config.train, self.config.sample.every, 0
        with self.meter.timed("paused"):
            if self.evaluate and self.guard.start is None:
                self._look()
        while self.images_seen < train.images and not received and not self._ended():
            steps = self._steps(self.images_seen // self.roller.images)
            with self.meter.timed("rollout"):
                experience = self.roller.draw(self.engine.module, self.images_seen, steps, lambda: stop.reduced() != 0)
            if experience is None:  # nothing was trained on it yet
                return stop.reduced()
            with self.meter.timed("train"):
                self.learn(experience)
            received = stop.reduced()
            with self.meter.timed("paused"):
                if self.evaluate and self._crossed(self.config.guard.every):
                    self._look()
            if self._crossed(train.log_every):
                self._log()
            with self.meter.timed("paused"):
                if sample_every and self._crossed(sample_every):
                    self._sample()
                if self._crossed(train.checkpoint_every) and self.saved_at != self.images_seen:
                    self.save()
        return received

    def _ended(self) -> bool:
        return bool(self.alarm) and self.config.guard.alarm in ("stop", "restore")

    def _look(self) -> None:
        """Let the guard compare the policy with the start, and do what an alarm asks for. Collective; every rank comes to the same."""
        now = self.evaluate(self.engine.module)
        self.alarm = self.guard.judge(now)
        how = self.config.guard
        if self.alarm:
            self._say(f"ALARM at {self.images_seen:,} images: {self.alarm}; guard.alarm={how.alarm}")
            if how.alarm == "raise_kl":
                self.kl *= how.kl_factor
                self._say(f"  the weight of the KL divergence is {self.kl:g} from now on")
        elif how.alarm == "restore" and self.guard.gain(now) > self.guard.best_gain:
            self.guard.best, self.guard.best_gain = f"step-{self.images_seen:09d}", self.guard.gain(now)
            self.store.protected = self.guard.best
            self.save()

    def learn(self, experience: Experience) -> None:
        """Take the updates of a rollout: `inner_epochs` passes over its images."""
        updates, epochs = self.config.rollout.updates, self.config.policy.inner_epochs
        rows = [range(u * self.roller.per_rank, (u + 1) * self.roller.per_rank) for u in range(updates)]
        # The network's outputs before the first update, in the shapes of the updates. The first update finds them itself.
        old = {(part.start, i): self._old_output(experience, i, part) for u in range(1, updates) for part in self._parts(rows[u]) for i in experience.states}
        for epoch in range(epochs):
            for u in range(updates):
                self._update(experience, rows[u], old, keep=epochs > 1 and epoch == u == 0)
                if epoch == 0:
                    self.images_seen += self.per_update
                self._after_update(self.per_update if epoch == 0 else 0)
        self.meter.add_rollout(experience)

    def _update(self, experience: Experience, rows: range, old: dict, keep: bool) -> None:
        """One optimiser step on the images `rows`. keep: note the network's outputs in `old`."""
        how = self.config.policy
        self._norm = None
        engines.set_learning_rate(self.engine, self.config.optim, self._learning_rate())
        for part in self._parts(rows):
            eps_fn, advantage = self._eps_fn(self.engine, experience, part), experience.advantage[part]
            for i in experience.states:
                state, seeds = self._state(experience, i, part), experience.seeds[part]
                reference = None if self.reference is None else guided_output(self._eps_fn(self.reference, experience, part), self.policy, i, state)
                log_ratio, kl, eps = compare(eps_fn, self.policy, i, state, seeds, eps_old=old.get((part.start, i)), eps_ref=reference)
                if keep:
                    old[part.start, i] = eps
                value, outside = surrogate(log_ratio, advantage, how.clip, eps[0].numel())
                # DeepSpeed takes the mean over all passes: this makes it the mean over transitions, plus that over the data
                self.engine.backward((self.kl * kl - value).mean() * (self.passes / len(experience.states)))
                self.engine.step()
                self.meter.add_transition(value, log_ratio, kl, outside)
        for batch in self.feed.next().micro_batches(self.micro_batch) if self.feed else ():
            example = self.objective.example(batch.latents, batch.positions)
            text = self.objective.drop_captions(batch.text, self.roller.null_text, batch.positions)
            losses = self.objective.loss(self.engine(example.y, example.t, example.lam, text), example, self.images_seen) * example.weight
            self.engine.backward(losses.mean() * (how.data_weight * self.passes))
            self.engine.step()
            self.meter.add_data(losses)

    def _after_update(self, new_images: int) -> None:
        norm = self._grad_norm()  # infinite when DeepSpeed has skipped the step; the same on every rank
        bad = self.spikes.judge(norm)
        if bad:
            self._say(f"{bad} at {self.images_seen:,} images: step skipped ({self.spikes.skipped} so far)")
            if self.spikes.in_a_row >= self.config.train.max_bad_steps:
                raise ValueError(f"{self.spikes.in_a_row} steps in a row had to be skipped, the last for a {bad}: lower optim.lr, or "
                                 f"continue from an older checkpoint in {self.store.folder} with --resume PATH")
        else:
            self.meter.grad_norms.append(norm)
            self.ema.update(self.images_seen, self.per_update)
        if self.ranks.is_first:
            self.tracker.advance(new_images)

    def _parts(self, rows: range):
        """Micro-batches of a rank's images, as slices."""
        return [slice(start, start + self.micro_batch) for start in range(rows.start, rows.stop, self.micro_batch)]

    def _eps_fn(self, network, experience: Experience, part: slice):
        return self.roller.eps_fn(network, [t[experience.row[part]] for t in experience.text])

    def _old_output(self, experience: Experience, i: int, part: slice) -> torch.Tensor:
        if i in experience.eps:
            return experience.eps[i][part].to(self.ranks.device)
        return guided_output(self._eps_fn(self.engine.module, experience, part), self.policy, i, self._state(experience, i, part))

    def _state(self, experience: Experience, i: int, part: slice) -> torch.Tensor:
        return experience.states[i][part].to(self.ranks.device)

    def _steps(self, rollout: int) -> tuple[int, ...]:
        """The transitions that rollout number `rollout` trains: all that policy.steps names, or a window of them that moves on by one."""
        steps = self.config.policy.steps
        steps = sorted(steps) if steps is not None else list(range(self.policy.num_transitions))
        window = self.config.policy.window or len(steps)
        first = rollout % (len(steps) - window + 1)
        return tuple(steps[first:first + window])

    def _grad_norm(self) -> float:
        """Of this update, known once DeepSpeed has summed the gradients; read from the device once."""
        if self._norm is None:
            self._norm = float(self.engine.optimizer._global_grad_norm)
        return self._norm

    def _learning_rate(self) -> float:
        return engines.learning_rate(self.config.optim, self.images_seen, self.config.train.images)

    def _crossed(self, every: int) -> bool:
        """Whether the last rollout passed a multiple of `every` images, or ended the run."""
        return (self.images_seen // every != (self.images_seen - self.roller.images) // every
                or self.images_seen >= self.config.train.images)

    # -- what it leaves behind ----------------------------------------------------------------------------------------

    def _log(self) -> None:
        row = self.meter.summary()
        if self.ranks.is_first:
            rewards = "  ".join(f"{key.split('/')[1]} {value:.4f}" for key, value in row.items() if key.startswith("reward/"))
            self.tracker.log({"images": self.images_seen, "lr": self._learning_rate(), "bad_steps": self.spikes.skipped, "alarms": self.guard.alarms,
                              **row, **self.guard.last_row},
                             brief=f"{rewards}  kl {row['kl']:.3f}  clipped {row['clip_fraction']:.0%}  grad {row['grad_norm']:.3f}")

    def _sample(self) -> None:
        """Draw the sample grid with the averaged weights, on rank 0. Collective."""
        averages = self.partition.gather(self.ema.averages)
        if self.ranks.is_first:
            uvit = network_of(self.uvit.config, averages).to(self.ranks.device)
            with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.bf16):
                bundle = Bundle(uvit, self.text, self.codec, self.settings, self.components)
                self.tracker.grid(self.images_seen, draw_grid(bundle, self.config.sample))

    def save(self) -> None:
        """Write a checkpoint. Collective."""
        state = {"images_seen": self.images_seen, "world_size": self.ranks.world_size, "spikes": self.spikes.state(),
                 "guard": self.guard.state(), "kl": self.kl, "initial": self.fingerprint,
                 "config": asdict(self.config), "network": dict(self.uvit.config), "settings": asdict(self.settings),
                 "components": str(self.components)}
        self.saved = self.store.save(state, lambda folder: write_rank(folder, self.partition, self.ema, self.optimizer))
        self.saved_at = self.images_seen

    def _say(self, message: str) -> None:
        if self.ranks.is_first:
            print(message, flush=True)


def read_prompts(config: GrpoConfig, components: Path) -> Prompts:
    """The run's prompts. ValueError for prompts that the text encoder would cut: images would be rewarded for words that the network never sees."""
    how = config.prompts
    prompts = load_prompts(how.source, how.num, how.seed, how.complete)
    cut = [text for text, is_cut in zip(prompts.texts, cut_captions(components, prompts.texts)) if is_cut]
    if cut:
        raise ValueError(f"prompts.source: {len(cut)} of {len(prompts)} prompts are longer than the text encoder's {max(text_sizes(components)[1])} tokens "
                         f"and would be cut, the first: {cut[0]!r}; shorten them")
    return prompts


def policy_of(config: GrpoConfig, initial: Settings) -> Policy:
    """The sampler that rollouts use. ValueError, with the fix, for one without densities."""
    how, schedule = config.rollout, VPSchedule(initial.beta_min, initial.beta_max)
    if how.plan in SCORE_SAMPLERS:
        if initial.objective != "score":
            raise ValueError(f"rollout.plan={how.plan} is for score networks; the model was trained as {initial.objective}: use relaxed or hybrid")
        plan = score_plan(how.plan, how.steps, schedule, initial.grid)
        times = plan.t
    else:
        plan = make_plan(how.plan, how.steps, schedule, initial.grid, extrapolation=0)
        times = plan.tau
    return make_policy(plan, guidance_scales(times, how.guidance, how.guidance_below))


def data_objective(config: GrpoConfig, initial: Settings) -> pretraining.DiffusionConfig:
    """Of proximal matching on data, at the network's queries in a rollout, the last one among them."""
    how = config.rollout
    plan = "hybrid" if how.plan in (*SCORE_SAMPLERS, "relaxed") else how.plan  # relaxed has the same queries
    return pretraining.DiffusionConfig(objective=initial.objective, plan=plan, step_counts=[how.steps], snr_power=0.0,
                                       grid=initial.grid, beta_min=initial.beta_min, beta_max=initial.beta_max)


def exported_settings(config: GrpoConfig, initial: Settings) -> Settings:
    """How the trained model is to be sampled: as it was trained (a score sampler's name means nothing to the pipeline: then as before)."""
    how = config.rollout
    if how.plan in SCORE_SAMPLERS:
        return initial
    return replace(initial, plan=how.plan, num_steps=how.steps, guidance_scale=how.guidance, guidance_below=how.guidance_below, extrapolation=0.0)


def _fingerprint(folder: Path) -> str:
    """SHA-256 of a model folder's network."""
    digest = hashlib.sha256()
    with open(folder / "uvit" / "diffusion_pytorch_model.safetensors", "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
