"""GRPO of the proximal sampler as published trainers are written (flow_grpo's above all), in plain torch: what benchmarks/grpo.py measures ours against.

The network computes ours' function with ours' weights (checked at the start). The loop keeps every state and its log density from the rollout,
computes log densities by eager operations (means over elements), reads numbers from the device at every step, groups advantages by the prompt's
text, takes one backward pass a transition, clips the gradient's norm, steps torch's AdamW and averages the weights. The reference is a frozen copy.
flow_grpo runs under accelerate, which adds work to a single process and no speed: it is left out, in this loop's favour.
"""

import copy
import io
import math

import numpy as np
import torch
from PIL import Image
from plain_trainer import PlainUViT
from torch import nn

from proxt2i.diffusion.precondition import precondition

CLIP, KL, ADVANTAGE_CLIP, EMA_DECAY = 1e-4, 0.01, 5.0, 0.995


class PlainGrpo:
    """uvit, text_encoder, codec, reward, policy: those of ours.  captions: of the run, used in order.

    batch: images of a rollout's batch and of a micro-batch.  updates: optimiser steps of a rollout, on `per_update` images each.
    apart: the two branches of guidance one after the other, and rewards read PNGs; else they are batched, and rewards read tensors.
    bf16: the network runs in autocast. Everything is on the U-ViT's device.
    """

    def __init__(self, uvit, text_encoder, codec, reward, policy, captions, *, batch, updates, per_update, group_size, apart, bf16=False, lr=1e-4):
        self.text_encoder, self.codec, self.reward, self.policy, self.captions = text_encoder, codec, reward, policy, captions
        self.batch, self.updates, self.per_update, self.group_size, self.apart = batch, updates, per_update, group_size, apart
        self.device, self.bf16 = uvit.position.device, False  # fp32 for the check below
        self.model = PlainUViT(uvit, fused=not (bf16 and self.device.type == "cpu")).to(self.device)  # the faster of the two for a plain loop
        self.schedule, self.shape = uvit.schedule, (uvit.config.in_channels, uvit.config.sample_size, uvit.config.sample_size)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.0)
        self.null_text = text_encoder([""])
        self.drawn, self.log = 0, []
        y, t, lam = (value.to(self.device) for value in (torch.randn(2, *self.shape), torch.tensor([0.5, 0.25]), torch.tensor([1.0, 0.3])))
        with torch.no_grad():
            text = text_encoder(captions[:2])
            torch.testing.assert_close(self.network(self.model, y, t, lam, text), uvit(y, t, lam, text), rtol=1e-3, atol=1e-4)
        self.bf16 = bf16

    def network(self, model, y, t, lam, text):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            eps = model(y * torch.rsqrt(1 + lam)[:, None, None, None], t, lam.log() / 10, text).float()
        c_skip, c_out = (c[:, None, None, None] for c in precondition(t, lam, self.schedule))
        return c_skip * y + c_out * eps

    def guided(self, model, i, y, text):
        plan, scale = self.policy.plan, self.policy.guidance[i]
        t, lam = (torch.full((len(y),), v, device=self.device) for v in (plan.t[i], plan.lam[i]))
        if scale == 1:
            return self.network(model, y, t, lam, text)
        null = [e.expand_as(c) for e, c in zip(self.null_text, text)]
        if self.apart:
            cond, uncond = self.network(model, y, t, lam, text), self.network(model, y, t, lam, null)
        else:
            both = [torch.cat(pair) for pair in zip(text, null)]
            cond, uncond = self.network(model, torch.cat([y, y]), torch.cat([t, t]), torch.cat([lam, lam]), both).chunk(2)
        return uncond + scale * (cond - uncond)

    def mean_of(self, model, i, y, text):
        """Of transition i; its standard deviation is b[i + 1]."""
        plan = self.policy.plan
        return plan.a[i + 1] * (y - plan.rho[i] * math.sqrt(plan.lam[i]) * self.guided(model, i, y, text))

    def log_density(self, i, y_next, mean):
        std = self.policy.plan.b[i + 1]
        log_prob = -((y_next.detach() - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
        return log_prob.mean(dim=(1, 2, 3))

    @torch.no_grad()
    def sample(self, captions):
        plan = self.policy.plan
        text = self.text_encoder(captions)
        first, second = (torch.randn(len(captions), *self.shape, device=self.device) for _ in range(2))
        y = plan.a[0] * first + plan.b[0] * second
        states, log_probs = [y], []
        for i in range(plan.num_steps - 1):
            mean = self.mean_of(self.model, i, y, text)
            y = mean + plan.b[i + 1] * torch.randn_like(mean)
            log_probs.append(self.log_density(i, y, mean))
            self.log.append(log_probs[-1].mean().item())
            states.append(y)
        i = plan.num_steps - 1
        x0 = y - plan.rho[i] * math.sqrt(plan.lam[i]) * self.guided(self.model, i, y, text)
        pictures = self.codec.decode(x0).add(1).div(2)
        if self.apart:
            pictures = torch.stack([png_round_trip(picture) for picture in pictures.cpu()]).to(self.device)
        return {"text": text, "states": states, "log_probs": log_probs, "rewards": self.reward(pictures, captions).cpu().numpy(), "captions": captions}

    def step(self):
        """A rollout and its updates."""
        groups = self.updates * self.per_update // self.group_size
        chosen = [self.captions[(self.drawn + g) % len(self.captions)] for g in range(groups)]
        self.drawn += groups
        captions = [caption for caption in chosen for _ in range(self.group_size)]
        samples = [self.sample(captions[first:first + self.batch]) for first in range(0, len(captions), self.batch)]
        rewards = np.concatenate([s["rewards"] for s in samples])
        advantages, names = np.zeros_like(rewards), np.array(captions)
        for caption in np.unique(names):
            rows = names == caption
            advantages[rows] = (rewards[rows] - rewards[rows].mean()) / (rewards[rows].std() + 1e-4)
        for s, part in zip(samples, np.split(advantages, len(samples))):
            s["advantages"] = torch.from_numpy(part).clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP).to(self.device)
        each = len(samples) // self.updates
        for u in range(self.updates):
            self.update(samples[u * each:(u + 1) * each])

    def update(self, samples):
        transitions = self.policy.num_transitions
        for s in samples:
            for i in range(transitions):
                mean = self.mean_of(self.model, i, s["states"][i], s["text"])
                log_prob = self.log_density(i, s["states"][i + 1], mean)
                with torch.no_grad():
                    mean_ref = self.mean_of(self.reference, i, s["states"][i], s["text"])
                ratio = torch.exp(log_prob - s["log_probs"][i])
                policy_loss = torch.maximum(-s["advantages"] * ratio, -s["advantages"] * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
                kl = ((mean - mean_ref) ** 2 / (2 * self.policy.plan.b[i + 1] ** 2)).mean(dim=(1, 2, 3)).mean()
                ((policy_loss + KL * kl) / (transitions * len(samples))).backward()
                approximate_kl = (0.5 * (log_prob - s["log_probs"][i]) ** 2).mean()
                self.log += [policy_loss.item(), kl.item(), approximate_kl.item(), ((ratio - 1).abs() > CLIP).float().mean().item()]
        self.log.append(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item())
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.model.parameters()):
                average.mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)


def png_round_trip(picture):
    """float [3, H, W] in [0, 1] -> the same as a reward reads it from a PNG file."""
    file = io.BytesIO()
    Image.fromarray((picture * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()).save(file, format="PNG")
    return torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()).permute(2, 0, 1).float() / 255
