"""GRPO (group-relative policy optimisation) of a few-step sampler: rollouts in, checkpoints, statistics and a model folder out.

A run is a sequence of rollouts. Each draws `rollout.updates` x `groups_per_update` groups of `group_size` images with the weights as they are
(training.rollouts), and then takes `updates` optimiser steps, each on its own groups. Every random number is a function of
(seed, images seen), so a resumed run needs no generator state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch

from proxt2i import config as pretraining
from proxt2i.data.prompts import Prompts, load_prompts
from proxt2i.diffusion import VPSchedule, guidance_scales, guided_output, make_plan, make_policy, score_plan
from proxt2i.diffusion.policy import Policy, compare, last_call
from proxt2i.diffusion.score import SCORE_SAMPLERS
from proxt2i.embedded import SHIPPED_MODEL
from proxt2i.grpo_config import GrpoConfig, images_per_update, micro_batch_of, trains_last_call
from proxt2i.models.bundle import WEIGHTS_FILE, Settings, check_fit, find_components, load_components, load_settings, load_uvit
from proxt2i.models.files import file_digest
from proxt2i.models.flops import forward_flops
from proxt2i.models.text import cut_captions, text_sizes
from proxt2i.models.uvit import UViT2DModel
from proxt2i.rewards import score_differentiably
from proxt2i.training import distributed, engine as engines
from proxt2i.training.advantage import coarse, surrogate
from proxt2i.training.checkpoint import Checkpoint
from proxt2i.training.distributed import Ranks, StopFlag
from proxt2i.training.export import export
from proxt2i.training.feed import Feed
from proxt2i.training.grpo_eval import Evaluator
from proxt2i.training.grpo_meter import GrpoMeter, passes_per_image
from proxt2i.training.guard import Guard
from proxt2i.training.lora import Lora, add_adapters, adapters_off, merge
from proxt2i.training.objective import Objective
from proxt2i.training.rollouts import Experience, Roller
from proxt2i.training.run import Run
from proxt2i.training.state import SavedState


def train(config: GrpoConfig, deepspeed_json: dict, resume: str | None = None) -> int:
    """Run on this rank. Returns 0 when finished, or the number of the signal that interrupted it. `resume`: as training.loop.train."""
    ranks = distributed.start(config.train.threads)
    received = GrpoTrainer(config, deepspeed_json, resume, ranks).run()
    distributed.stop()
    return received


class GrpoTrainer(Run):
    """One rank of a run: the policy under training, its frozen reference, and what surrounds them."""

    def __init__(self, config: GrpoConfig, deepspeed_json: dict, resume: str | None, ranks: Ranks):
        train = config.train
        self.initial = Path(config.model.init_from or SHIPPED_MODEL)
        self.components = Path(config.model.components or find_components(self.initial))
        self.prompts = read_prompts(config, self.components)
        initial_settings = load_settings(self.initial)
        self.policy = policy_of(config, initial_settings)
        self.settings = exported_settings(config, initial_settings)
        super().__init__(config, resume, ranks)
        self.guard, self.kl, self.alarm = Guard(config.guard.min_diversity), config.policy.kl, ""
        self.fingerprint = file_digest(self.initial / "uvit" / WEIGHTS_FILE)
        if self.checkpoint:
            self._go_on_from(self.checkpoint)

        self.text, self.codec = load_components(self.components, ranks.device, self.dtype)
        self.uvit = load_uvit(self.initial / "uvit", ranks.device)
        check_fit(self.uvit, self.text, self.codec, self.components)
        self.lora, self.reference = lora_of(config), None  # the reference of adapters is the network without them
        if config.policy.kl and not self.lora:
            self.reference = engines.Autocast(load_uvit(self.initial / "uvit", ranks.device).requires_grad_(False).eval(), self.bf16)
        num_params = sum(p.numel() for p in self.uvit.parameters())
        if self.lora:
            add_adapters(self.uvit, self.lora, train.seed)
        saved = SavedState(self.checkpoint.folder) if self.checkpoint else None
        if saved:
            saved.load_weights(self.uvit, trained=True)
        self.uvit.gradient_checkpointing = config.model.gradient_checkpointing
        shape = (self.uvit.config.in_channels, self.uvit.config.sample_size, self.uvit.config.sample_size)
        self.roller = Roller(config, self.settings, self.policy, self.prompts, self.text, self.codec, shape, ranks, self.dtype)

        self.per_update, self.micro_batch = images_per_update(config), micro_batch_of(config, ranks.world_size)
        self.passes = len(self._steps(0)) + trains_last_call(config) + bool(config.policy.data_weight)  # of the network over an image in an update
        batches = pretraining.TrainConfig(batch_size=self.per_update * self.passes, micro_batch=self.micro_batch, compile=train.compile)
        self.start_engine(deepspeed_json, batches, saved)
        self.feed = self.objective = None
        if config.policy.data_weight:
            self.feed = Feed(config.data, self.components, ranks, self.roller.per_rank, patch_size=self.uvit.config.patch_size, seed=train.seed,
                             run_dir=self.run_dir, dtype=self.dtype)
            self.objective = Objective(data_objective(config, initial_settings), train.seed)
        flops = forward_flops(self.uvit.config) * sum(passes_per_image(config, self.policy))
        self.meter = GrpoMeter(ranks, flops, train.peak_tflops)
        self.evaluate = Evaluator(config, self.roller) if config.guard.every else None
        adapters = f" and {sum(s.numel() for s in self.partition.shapes.values()) / 1e6:.2f} M of adapters, which alone are trained" if self.lora else ""
        self._say(f"{num_params / 1e6:.2f} M parameters{adapters}, {ranks.world_size} rank(s) on {ranks.device.type}, {'bf16 autocast' if self.bf16 else 'fp32'}, {len(self.prompts):,} prompts, "
                  f"a rollout is {self.roller.images:,} images in {config.rollout.updates} update(s), micro-batches of {self.micro_batch}")
        self.open_run_folder()

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        """Of a checkpoint, what is this trainer's alone. ValueError where it belongs to another run."""
        self.guard.load(checkpoint.state["guard"])
        self.kl = checkpoint.state["kl"] if self.config.guard.alarm == "raise_kl" else self.config.policy.kl
        self.store.protected = self.guard.best
        if checkpoint.state["initial"] != self.fingerprint:
            raise ValueError(f"{checkpoint.folder} began from other weights than those in {self.initial}: set model.init_from to the model that "
                             "the run started from, which is its reference")
        own = _lora_state(lora_of(self.config))
        if checkpoint.state.get("lora") != own:
            raise ValueError(f"{checkpoint.folder} was written with LoRA {checkpoint.state.get('lora') or 'off'}, this run asks for {own or 'off'}: keep "
                             "policy.lora_rank and policy.lora_alpha as they were")

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        if self.feed:
            self.feed.open(self.images_seen, self._say)
        received = self.loop_and_save()
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
                self._end_step(self.per_update, self.per_update if epoch == 0 else 0)
        self.meter.add_rollout(experience)

    def _update(self, experience: Experience, rows: range, old: dict, keep: bool) -> None:
        """One optimiser step on the images `rows`. keep: note the network's outputs in `old`."""
        how = self.config.policy
        self._begin_step()
        for part in self._parts(rows):
            eps_fn, advantage = self._eps_fn(self.engine, experience, part), experience.advantage[part]
            for i in experience.states:
                state, seeds = self._state(experience, i, part), experience.seeds[part]
                log_ratio, kl, eps = compare(eps_fn, self.policy, i, state, seeds, eps_old=old.get((part.start, i)),
                                             eps_ref=self._reference_output(experience, i, part, state))
                if keep:
                    old[part.start, i] = eps
                value, outside = surrogate(log_ratio, advantage, how.clip, eps[0].numel())
                # DeepSpeed takes the mean over all passes: this makes it the mean over transitions, plus that over the data
                self.engine.backward((self.kl * kl - value).mean() * (self.passes / len(experience.states)))
                self.engine.step()
                self.meter.add_transition(value, log_ratio, kl, outside)
            if experience.last is not None:
                self.engine.backward(self._last_call(experience, part).mean() * -self.passes)
                self.engine.step()
        for batch in self.feed.next().micro_batches(self.micro_batch) if self.feed else ():
            example = self.objective.example(batch.latents, batch.positions)
            text = self.objective.drop_captions(batch.text, self.roller.null_text, batch.positions)
            losses = self.objective.loss(self.engine(example.y, example.t, example.lam, text), example, self.images_seen) * example.weight
            self.engine.backward(losses.mean() * (how.data_weight * self.passes))
            self.engine.step()
            self.meter.add_data(losses)

    def _last_call(self, experience: Experience, part: slice) -> torch.Tensor:
        """What x_0 = f(y_1) is to maximise, in units of an advantage, with gradients through the VAE and the last call, [B]: y_1 stays as it was drawn."""
        how, total = self.config.policy, 0.0
        x0 = last_call(self._eps_fn(self.engine, experience, part), self.policy, experience.last[part].to(self.ranks.device))
        pictures = self.roller.pictures(x0)
        for reward in self.roller.scorer.rewards:
            if how.reward_gradient and reward.name in experience.reward_scale:
                values = score_differentiably(reward, pictures, experience.prompts[part], experience.metadata[part])
                self.meter.add_last_call(reward.name, values)
                total = total + how.reward_gradient * experience.reward_scale[reward.name] * values
        if how.variety:
            total = total + how.variety * experience.group_spread.of(part, self.ranks.device).apart(coarse(pictures))
        return total

    def _parts(self, rows: range):
        """Micro-batches of a rank's images, as slices."""
        return [slice(start, start + self.micro_batch) for start in range(rows.start, rows.stop, self.micro_batch)]

    def _eps_fn(self, network, experience: Experience, part: slice):
        return self.roller.eps_fn(network, [t[experience.row[part]] for t in experience.text])

    def _reference_output(self, experience: Experience, i: int, part: slice, state: torch.Tensor) -> torch.Tensor | None:
        if not self.config.policy.kl:
            return None
        if self.lora:
            with adapters_off(self.uvit):
                return guided_output(self._eps_fn(self.engine.module, experience, part), self.policy, i, state)
        return guided_output(self._eps_fn(self.reference, experience, part), self.policy, i, state)

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

    def _crossed(self, every: int) -> bool:
        """Whether the last rollout passed a multiple of `every` images, or ended the run."""
        return self._passed(every, self.roller.images)

    # -- what it leaves behind ----------------------------------------------------------------------------------------

    def _log(self) -> None:
        row = self.meter.summary()
        if self.ranks.is_first:
            rewards = "  ".join(f"{key.split('/')[1]} {value:.4f}" for key, value in row.items() if key.startswith("reward/"))
            self.tracker.log({"images": self.images_seen, "lr": self._learning_rate(), "bad_steps": self.spikes.skipped, "alarms": self.guard.alarms,
                              **row, **self.guard.last_row},
                             brief=f"{rewards}  kl {row['kl']:.3f}  clipped {row['clip_fraction']:.0%}  grad {row['grad_norm']:.3f}")

    def _sample(self) -> None:
        self._draw_grid(self.text, self.codec, self.settings, self.components)

    def _averaged(self, weights: Mapping[str, torch.Tensor]) -> UViT2DModel:
        if not self.lora:
            return super()._averaged(weights)
        return merge(load_uvit(self.initial / "uvit").requires_grad_(False).eval(), self.lora, weights)

    def _own_state(self) -> dict:
        return {"guard": self.guard.state(), "kl": self.kl, "initial": self.fingerprint, "settings": asdict(self.settings),
                "components": str(self.components), "lora": _lora_state(self.lora), "base": str(self.initial.resolve())}


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


def lora_of(config: GrpoConfig) -> Lora | None:
    how = config.policy
    return Lora(how.lora_rank, how.lora_alpha if how.lora_alpha is not None else float(how.lora_rank)) if how.lora_rank else None


def _lora_state(lora: Lora | None) -> dict | None:
    return lora and asdict(lora)
