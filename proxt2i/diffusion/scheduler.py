"""Proximal sampling as a scheduler of diffusers: for our networks, and for pretrained score, v and flow networks of others.

    pipe.scheduler = ProximalScheduler.from_config(pipe.scheduler.config)

The state between two calls is what the network was trained to see: a diffusion sample x of the timestep that the scheduler reports
(docs/any-model.md). Pictures of our own models come from `proxt2i.pipeline`, whose loop is `proximal.trajectory`.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..ops import prox_step, step_row
from ..ops.prox_step import COEFFICIENTS
from .networks import LARGEST_SIGMA, FlowSchedule, TableSchedule, network_rows
from .plan import PLANS, Plan, check_name, make_plan, relaxed_plan
from .schedule import VPSchedule

PREDICTIONS = ("prox", "epsilon", "v_prediction", "flow_prediction")
_OWN = ("plan", "num_steps", "guidance_scale", "guidance_below", "beta_min", "beta_max", "objective")
_TABLE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
_FLOW = ("num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len",
         "shift_terminal", "time_shift_type")


@dataclass
class ProximalSchedulerOutput(BaseOutput):
    """prev_sample: the network's next input before `scale_model_input`, or after the last step the image; the sample's shape and dtype."""

    prev_sample: Tensor


class ProximalScheduler(SchedulerMixin, ConfigMixin):
    """Proximal steps for diffusers.

    Args:
        plan: relaxed, hybrid, backward, variance_preserving or ode (docs/mathematics.md); flow networks: relaxed.
        num_steps, guidance_scale, guidance_below: what `ProxT2IPipeline` does unless told otherwise.
        beta_min, beta_max, grid, objective: of our own networks (prediction_type "prox"): `models.Settings`.
        eta, extrapolation: of the plan relaxed: fresh noise (0: none) and memory of the last two clean images (0: none).
        prediction_type: what the network predicts: prox (ours), epsilon, v_prediction, flow_prediction.
        num_train_timesteps ... rescale_betas_zero_snr: the discrete diffusion of an epsilon or v network, as in DDPMScheduler.
        shift ... time_shift_type: the sigmas of a flow network, as in FlowMatchEulerDiscreteScheduler.

    Raises ValueError for a combination that cannot be sampled.
    """

    order = 1
    _compatibles: list[str] = []

    @register_to_config
    def __init__(self, plan: str = "relaxed", num_steps: int = 8, guidance_scale: float = 1.5, beta_min: float = 0.1, beta_max: float = 20.0,
                 grid: str = "uniform", guidance_below: float = 0.35, objective: str = "prox", eta: float = 1.0, extrapolation: float = 1.0,
                 prediction_type: str = "prox", num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
                 beta_schedule: str = "linear", trained_betas: list[float] | None = None, rescale_betas_zero_snr: bool = False,
                 shift: float = 1.0, use_dynamic_shifting: bool = False, base_shift: float = 0.5, max_shift: float = 1.15,
                 base_image_seq_len: int = 256, max_image_seq_len: int = 4096, shift_terminal: float | None = None,
                 time_shift_type: str = "exponential"):
        check_name("plan", plan, PLANS)
        check_name("prediction_type", prediction_type, PREDICTIONS)
        check_name("objective", objective, ("prox", "score"))
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: must be between 0 (no fresh noise) and 1")
        if prediction_type == "flow_prediction" and plan != "relaxed":
            raise ValueError(f"plan {plan!r} does not serve flow networks, whose diffusion ends in pure noise (an infinite gamma): use 'relaxed'")
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError("rescale_betas_zero_snr=True with prediction_type='epsilon': at the last timestep such a network says nothing of the image; "
                             "only v_prediction networks are trained for it")
        if rescale_betas_zero_snr and plan != "relaxed":
            raise ValueError(f"plan {plan!r} has an infinite gamma with rescale_betas_zero_snr=True: use 'relaxed'")
        self.schedule = self._make_schedule()
        # an own network that was trained as a score network is asked as one
        self.prediction = "epsilon" if prediction_type == "prox" and objective == "score" else prediction_type
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._begin_index: int | None = None
        self._step_index: int | None = None

    @classmethod
    def from_config(cls, config, return_unused_kwargs: bool = False, **kwargs):
        """From a configuration of its own, or of any diffusers scheduler of a variance-preserving or flow-matching model.

        The other scheduler's way of choosing timesteps (timestep_spacing, Karras sigmas, ...) is not taken over, its noise schedule and
        prediction type are; eta is 0 then (docs/any-model.md). kwargs override. ValueError for what cannot be taken over.
        """
        public = {key for key in config if not key.startswith("_")}
        if public and not public & set(_OWN):
            config = adopt({**config, **{key: value for key, value in kwargs.items() if key in public}})
            kwargs = {key: value for key, value in kwargs.items() if key not in public or key in config}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    # ---- steps ----------------------------------------------------------------------------------

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, *, timesteps: list[int] | None = None,
                      sigmas: list[float] | None = None, mu: float | None = None) -> None:
        """Makes the table of `num_inference_steps` steps (default: config.num_steps); `timesteps`: what to report to the network.

        timesteps: own falling ones, for epsilon and v networks with the plan relaxed. sigmas, mu: of flow networks, as in
        FlowMatchEulerDiscreteScheduler, which computes them. Default: T - 1 and down in equal parts ("trailing"), as pure noise is
        the last timestep's distribution and no other's. Raises ValueError for a step count or a plan that does not work.
        """
        if num_inference_steps is None and timesteps is None and sigmas is None:
            num_inference_steps = self.config.num_steps
        if num_inference_steps is not None and num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
        self.plan, times = self._make_plan(num_inference_steps, timesteps, sigmas, mu)
        self.num_inference_steps = self.plan.num_steps
        rows = [step_row(**row) for row in network_rows(self.plan, times, self.prediction, self.schedule)]  # type: ignore[arg-type]
        self._rows = torch.tensor(rows, dtype=torch.float64, device=device)
        self._noisy, self._memory = ([row[COEFFICIENTS.index(name)] != 0 for row in rows] for name in ("b", "memory"))
        reported = [self.schedule.timestep(t) for t in times]
        whole = isinstance(self.schedule, TableSchedule) and all(abs(t - round(t)) < 1e-6 for t in reported)
        self.timesteps = torch.tensor([round(t) for t in reported] if whole else reported, dtype=torch.int64 if whole else torch.float32, device=device)
        # of a first input that is noise alone: a x_N + b z, both standard normal
        self.init_noise_sigma = math.sqrt((self.plan.a[0] ** 2 + self.plan.b[0] ** 2) / (1 + self.plan.lam[0]))
        self._begin_index = self._step_index = self._seeds = self._clean = None

    @property
    def queries(self) -> list[tuple[float, float]]:
        """(t, lam) of each step: what a network of ours is asked."""
        return list(zip(self.plan.t, self.plan.lam))

    def scale_model_input(self, sample: Tensor, timestep=None) -> Tensor:
        """The network's input. Networks of others see the state itself, ours sqrt(1 + lam) times it."""
        if self.prediction != "prox":
            return sample
        return sample * math.sqrt(1 + self.plan.lam[self._index(timestep)])

    def step(self, model_output: Tensor, timestep, sample: Tensor, generator=None, variance_noise: Tensor | None = None,
             return_dict: bool = True) -> ProximalSchedulerOutput | tuple[Tensor]:
        """The state of the next step, or after the last the image, from the network's (guided) output at `timestep`.

        sample: the state. Fresh noise: `variance_noise` if given, else drawn with `generator` (one, or one an image), else a function
        of the image's own first state, so that pipelines which pass no generator repeat their pictures all the same.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        i = self._step_index = self._index(timestep)
        state = sample if sample.dtype == torch.float64 else sample.float()
        row = self._rows[i]
        if row.device != sample.device:
            self._rows = self._rows.to(sample.device)
            row = self._rows[i]
        if self._seeds is None:
            self._seeds = seeds_of(state)
        noise = variance_noise
        if noise is None and generator is not None and self._noisy[i]:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=state.dtype)
        later = i + 1 < self.num_inference_steps and self._memory[i + 1]
        _, state, self._clean = prox_step(state, model_output, None, row, clean=self._clean if self._memory[i] else None, noise=noise,
                                          seeds=self._seeds, want_x=False, want_clean=later)
        self._step_index = i + 1
        state = state.to(sample.dtype)  # type: ignore[union-attr]  # it was wanted
        return ProximalSchedulerOutput(prev_sample=state) if return_dict else (state,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Images at the noise of `timesteps` (one, or one an image), as the network sees them: [B, ...] -> [B, ...]."""
        times = [self.schedule.time(t) for t in timesteps.reshape(-1).tolist()]
        like = dict(dtype=original_samples.dtype, device=original_samples.device)
        signal, size = (torch.tensor([math.sqrt(part(t)) * self.schedule.size(t) for t in times], **like).reshape(-1, *[1] * (noise.dim() - 1))
                        for part in (self.schedule.alpha, self.schedule.one_minus_alpha))
        return signal * original_samples + size * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """add_noise under the name and order of the flow-matching schedulers."""
        return self.add_noise(sample, noise, timestep)

    def set_begin_index(self, begin_index: int = 0) -> None:
        self._begin_index = begin_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        return self._step_index

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ---- inside ---------------------------------------------------------------------------------

    def _index(self, timestep) -> int:
        if self._step_index is not None:
            if self._step_index >= len(self.timesteps):
                raise ValueError(f"all {self.num_inference_steps} steps are done: call set_timesteps before another picture")
            return self._step_index
        if self._begin_index is not None:
            return self._begin_index
        distances = (self.timesteps.double() - float(timestep)).abs()
        index = int(distances.argmin())
        if distances[index] > 1e-3:
            raise ValueError(f"timestep {float(timestep):g} is none of this scheduler's: {self.timesteps.tolist()}")
        return index

    def _make_schedule(self):
        config = self.config
        if config.prediction_type == "prox":
            return VPSchedule(config.beta_min, config.beta_max)
        if config.prediction_type == "flow_prediction":
            return FlowSchedule(config.num_train_timesteps)
        return TableSchedule(DDPMScheduler(**{key: config[key] for key in _TABLE}).alphas_cumprod.double().tolist())

    def _make_plan(self, num_steps, timesteps, sigmas, mu) -> tuple[Plan, list[float]]:
        """The plan, and the time of the noise that each query has."""
        config, schedule = self.config, self.schedule
        if config.prediction_type == "flow_prediction":
            flow = FlowMatchEulerDiscreteScheduler(**{key: config[key] for key in _FLOW})
            if timesteps is not None:
                raise ValueError("flow networks take sigmas (before the shift) or num_inference_steps, not timesteps")
            sigmas = [1 - i / num_steps for i in range(num_steps)] if sigmas is None else sigmas
            flow.set_timesteps(sigmas=sigmas, mu=mu if config.use_dynamic_shifting else None)
            times = [min(sigma, LARGEST_SIGMA) for sigma in flow.sigmas[:-1].double().tolist()]
        elif config.prediction_type == "prox" or config.plan != "relaxed":
            if timesteps is not None or sigmas is not None:
                raise ValueError("own timesteps need plan='relaxed' and a network that predicts epsilon or v; the other plans follow from num_inference_steps")
            plan = make_plan(config.plan, num_steps, schedule, config.grid, eta=config.eta, extrapolation=config.extrapolation)
            return plan, plan.tau
        else:
            if sigmas is not None:
                raise ValueError("sigmas are for flow networks; give timesteps or num_inference_steps")
            total = schedule.num_timesteps
            if timesteps is None:
                if num_steps > total:
                    raise ValueError(f"num_inference_steps={num_steps}: must be at most the {total} timesteps of training")
                timesteps = [round(total * (1 - i / num_steps)) - 1 for i in range(num_steps)]
            elif not all(0 <= t < total for t in timesteps):
                raise ValueError(f"timesteps {list(timesteps)}: must lie between 0 and {total - 1}")
            times = [schedule.time(t) for t in timesteps]
        if not all(s > t for s, t in zip(times, times[1:])):
            raise ValueError(f"timesteps and sigmas must fall strictly, got {times}")
        return relaxed_plan([schedule.alpha(t) for t in times], schedule, config.eta, config.extrapolation), times


def adopt(config: dict) -> dict:
    """Another diffusers scheduler's configuration as ProximalScheduler's. ValueError for what has no proximal form."""
    name = config.get("_class_name", "this scheduler")

    def refuse(setting: str, reason: str):
        raise ValueError(f"{name} with {setting}: {reason}")

    if config.get("invert_sigmas"):
        refuse("invert_sigmas=True", "sigmas that count signal instead of noise are not supported")
    if config.get("thresholding") or config.get("clip_sample"):
        setting = "thresholding" if config.get("thresholding") else "clip_sample"
        refuse(f"{setting}=True", f"proximal steps do not clip; from_config(config, {setting}=False) samples without it")
    if "original_inference_steps" in config or "LCM" in name:
        raise ValueError(f"{name}: a consistency-distilled network jumps along the flow and is no posterior mean; keep its own scheduler")
    if config.get("snr_shift_scale", 1.0) != 1.0:
        refuse(f"snr_shift_scale={config['snr_shift_scale']}", "shifted noise schedules of CogVideoX are not supported")
    if config.get("variance_type") in ("learned", "learned_range"):
        refuse(f"variance_type={config['variance_type']!r}", "networks that also predict a variance are not supported")
    if config.get("use_flow_sigmas") or ("shift" in config and "beta_schedule" not in config):
        taken = {key: config[key] for key in _FLOW if key in config} | {"prediction_type": "flow_prediction", "eta": 0.0}
        if config.get("use_flow_sigmas"):
            taken["shift"] = config.get("flow_shift", 1.0)
        return taken
    if "beta_schedule" not in config or "prediction_type" not in config:
        raise ValueError(f"{name} is not a scheduler of a variance-preserving (beta_schedule, prediction_type) or flow-matching model; "
                         "proximal steps are defined for those")
    if config["prediction_type"] not in PREDICTIONS[1:]:
        refuse(f"prediction_type={config['prediction_type']!r}", f"networks that predict {', '.join(PREDICTIONS[1:])} are supported")
    betas = config.get("trained_betas")
    taken = {key: config[key] for key in (*_TABLE, "prediction_type") if key in config}
    return taken | {"eta": 0.0, "trained_betas": None if betas is None else [float(beta) for beta in betas]}


def seeds_of(state: Tensor) -> Tensor:
    """A seed an image out of the bits of its state [B, ...]: int64 [B], without waiting for the device."""
    bits = state.float().contiguous().view(torch.int32).flatten(1).to(torch.int64)
    weights = torch.arange(1, 2 * bits.shape[1], 2, device=bits.device) * 0x9E3779B97F4A7C1  # odd multiples, modulo 2^64
    return ((bits + 1) * weights).sum(1)
