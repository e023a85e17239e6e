"""ProximalScheduler: steps in closed form, the schedulers of diffusers that it contains, pipelines of others, configurations."""

import math
from itertools import pairwise

import foreign
import pytest
import torch
from diffusers import (
    DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler,
    StableDiffusionImg2ImgPipeline, UniPCMultistepScheduler,
)
from foreign import SCALED_LINEAR

from proxt2i import ProximalScheduler
from proxt2i.diffusion import VPSchedule, make_plan, precondition, trajectory
from proxt2i.ops import philox_normal

MEANS, STDS, WEIGHTS = (-1.2, 0.7), (0.15, 0.25), (0.3, 0.7)  # of a mixture on the line


def posterior(x, signal, noise, means, stds, weights):
    """E[x_0 | x] for x = signal x_0 + noise e and x_0 from a mixture of Gaussians."""
    means, stds, weights = (torch.tensor(v, dtype=x.dtype).reshape(-1, *[1] * x.dim()) for v in (means, stds, weights))
    variance = (signal * stds) ** 2 + noise**2
    share = torch.softmax(weights.log() - variance.log() / 2 - (x - signal * means) ** 2 / (2 * variance), dim=0)
    return (share * (means + signal * stds**2 / variance * (x - signal * means))).sum(0)


def network(scheduler, means=MEANS, stds=STDS, weights=WEIGHTS):
    """The perfect network of the scheduler's prediction type for x_0 from a mixture of Gaussians."""
    kind = scheduler.config.prediction_type

    def predict(x, timestep):
        if kind == "flow_prediction":
            noise = float(timestep) / scheduler.config.num_train_timesteps
            signal = 1 - noise
        else:
            alpha = scheduler.schedule.alpha(scheduler.schedule.time(float(timestep)))
            signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
        clean = posterior(x, signal, noise, means, stds, weights)
        e = (x - signal * clean) / noise
        return {"epsilon": e, "v_prediction": signal * e - noise * clean, "flow_prediction": e - clean}[kind]

    return predict


def run(scheduler, predict, x, noises=None, **steps):
    """The image, and the states on the way to it."""
    scheduler.set_timesteps(**steps)
    states = [x * scheduler.init_noise_sigma]
    for i, t in enumerate(scheduler.timesteps):
        noise = None if noises is None else noises[i]
        states.append(scheduler.step(predict(scheduler.scale_model_input(states[-1], t), t), t, states[-1], variance_noise=noise).prev_sample)
    return states[-1], states


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sd(**config):
    return DDIMScheduler(**{**SCALED_LINEAR, "clip_sample": False, **config}).config


def flow(**config):
    return FlowMatchEulerDiscreteScheduler(shift=3.0, **config).config


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("plan, num_steps", [("hybrid", 4), ("backward", 30), ("variance_preserving", 4), ("ode", 4)])
def test_a_step_is_the_prox_in_closed_form(plan, num_steps, prediction):
    """Gaussian data: prox_{-lam ln p_t}(y) = (V y + lam m) / (V + lam) with m = sqrt(alpha_t) mu, V = alpha_t s^2 + 1 - alpha_t."""
    mu, s = 0.8, 0.4
    scheduler = ProximalScheduler.from_config(sd(prediction_type=prediction), plan=plan)
    predict = network(scheduler, (mu,), (s,), (1.0,))
    noises = [normal(2, 3, 4, 4, seed=i) for i in range(num_steps)]
    image, states = run(scheduler, predict, normal(2, 3, 4, 4, seed=100), noises, num_inference_steps=num_steps)
    table, schedule = scheduler.plan, scheduler.schedule
    assert table == make_plan(plan, num_steps, schedule) and len(states) == num_steps + 1
    for i, (t, lam) in enumerate(scheduler.queries):
        alpha = schedule.alpha(t)
        variance, y = alpha * s**2 + 1 - alpha, states[i] * math.sqrt(1 + lam)
        prox = (variance * y + lam * math.sqrt(alpha) * mu) / (variance + lam)
        if i + 1 < num_steps:
            prox = (table.a[i + 1] * prox + table.b[i + 1] * noises[i]) / math.sqrt(1 + table.lam[i + 1])
        torch.testing.assert_close(states[i + 1], prox, rtol=1e-6, atol=1e-6)
        # what is reported is the timestep whose noise y / sqrt(1 + lam) has in training
        reported = schedule.alpha(schedule.time(scheduler.timesteps[i].item()))
        assert reported == pytest.approx(alpha / (1 + lam), rel=1e-4)
    torch.testing.assert_close(image, states[-1])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_posterior_mean_prox_of_a_mixture(prediction):
    """E[x_t | y], computed another way: on a grid of x_t."""
    scheduler = ProximalScheduler.from_config(sd(prediction_type=prediction), plan="hybrid")
    x = normal(64, 1)
    noises = [torch.zeros_like(x)] * 6
    _, states = run(scheduler, network(scheduler), x, noises, num_inference_steps=6)
    points = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    for i, (t, lam) in enumerate(scheduler.queries):
        alpha = scheduler.schedule.alpha(t)
        density = sum(w / math.sqrt(v) * torch.exp(-(points - math.sqrt(alpha) * m) ** 2 / (2 * v))
                      for w, m, v in zip(WEIGHTS, MEANS, (alpha * s**2 + 1 - alpha for s in STDS)))
        y = states[i] * math.sqrt(1 + lam)
        weights = density * torch.exp(-(y - points) ** 2 / (2 * lam))
        mean = (weights * points).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        following = (1.0, 0.0) if i == 5 else (scheduler.plan.a[i + 1], scheduler.plan.lam[i + 1])
        torch.testing.assert_close(states[i + 1], following[0] * mean / math.sqrt(1 + following[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta, extrapolation, kind", [(0.0, 0.0, "dpmsolver++"), (0.0, 1.0, "dpmsolver++"), (1.0, 0.0, "sde-dpmsolver++"), (1.0, 1.0, "sde-dpmsolver++")])
def test_members_of_the_relaxed_family_are_schedulers_of_diffusers(prediction, eta, extrapolation, kind):
    config = sd(prediction_type=prediction)
    ours = ProximalScheduler.from_config(config, eta=eta, extrapolation=extrapolation)
    theirs = DPMSolverMultistepScheduler.from_config(config, algorithm_type=kind, solver_order=1 + int(extrapolation), final_sigmas_type="zero",
                                                     timestep_spacing="trailing")
    theirs.set_timesteps(6)
    predict, noises, x = network(ours), [normal(8, 16, seed=i).float() for i in range(6)], normal(8, 16, seed=9).float()
    image, _ = run(ours, predict, x, noises, num_inference_steps=6)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    for t, noise in zip(theirs.timesteps, noises):
        x = theirs.step(predict(x, t), t, x, variance_noise=noise).prev_sample
    torch.testing.assert_close(image, x, rtol=2e-4, atol=2e-4)


def test_without_noise_and_memory_a_flow_network_is_stepped_as_by_euler():
    ours, theirs = ProximalScheduler.from_config(flow(), eta=0.0, extrapolation=0.0), FlowMatchEulerDiscreteScheduler.from_config(flow())
    theirs.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.4, 0.2])
    predict, x = network(ours), normal(8, 16).float()
    image, _ = run(ours, predict, x, num_inference_steps=5)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    for t in theirs.timesteps:
        x = theirs.step(predict(x, t), t, x).prev_sample
    torch.testing.assert_close(image, x, rtol=1e-5, atol=1e-5)


CASES = [sd(), sd(prediction_type="v_prediction"), sd(prediction_type="v_prediction", rescale_betas_zero_snr=True), flow()]


@pytest.mark.parametrize("config", CASES, ids=["epsilon", "v", "zero-snr v", "flow"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_state_is_always_a_training_sample_of_the_reported_timestep(config, eta):
    """For x_0 = c: signal c + noise e, with the signal and noise of that timestep."""
    c, scheduler = 1.3, ProximalScheduler.from_config(config, eta=eta)
    image, states = run(scheduler, network(scheduler, (c,), (1e-5,), (1.0,)), normal(8, 25_000), num_inference_steps=5)
    start = scheduler.add_noise(torch.ones(1), torch.zeros(1), scheduler.timesteps[:1]).item()  # of signal: what x_N, pure noise, lacks
    for t, state in zip(scheduler.timesteps, states):
        signal, noise = (scheduler.add_noise(*one, t.reshape(1)).item() for one in ((torch.ones(1), torch.zeros(1)), (torch.zeros(1), torch.ones(1))))
        assert state.mean().item() == pytest.approx(signal * c, abs=c * start + 0.015)
        assert state.std().item() == pytest.approx(noise if signal > start else 1.0, rel=0.01)
    torch.testing.assert_close(image, torch.full_like(image, c), rtol=0, atol=2e-3)


def wasserstein(x, num=200_001):
    """W1 to the mixture, by quantiles."""
    points = torch.linspace(-3, 3, num, dtype=torch.float64)
    cdf = sum(w * torch.special.ndtr((points - m) / s) for w, m, s in zip(WEIGHTS, MEANS, STDS))
    sorted_x = x.flatten().sort().values
    exact = points[torch.searchsorted(cdf, (torch.arange(len(sorted_x), dtype=torch.float64) + 0.5) / len(sorted_x)).clamp(max=num - 1)]
    return (sorted_x - exact).abs().mean().item()


@pytest.mark.parametrize("config", CASES, ids=["epsilon", "v", "zero-snr v", "flow"])
@pytest.mark.parametrize("plan", ["relaxed", "hybrid"])
def test_samples_approach_the_mixture(config, plan):
    if plan == "hybrid" and (config.get("rescale_betas_zero_snr") or "shift" in config):
        pytest.skip("refused, see below")
    scheduler = ProximalScheduler.from_config(config, plan=plan)
    distances = [wasserstein(run(scheduler, network(scheduler), normal(4, 5_000), num_inference_steps=n)[0]) for n in (5, 20, 80)]
    assert distances[0] > distances[1] > distances[2] and distances[1] < 0.09 and distances[2] < 0.045


def test_our_own_networks_steps_are_the_samplers():
    """scheduler.step against proximal.trajectory with the same draws."""
    def eps_fn(y, t, lam, guidance_scale=1.0):
        return torch.sin(y + t.reshape(-1, 1, 1) * 3) * 0.7 + 0.1 * lam.reshape(-1, 1, 1), None

    for plan in ("relaxed", "hybrid"):
        table = make_plan(plan, 5)
        steps = list(trajectory(eps_fn, table, (4, 4), range(3)))
        scheduler = ProximalScheduler(plan=plan)
        scheduler.set_timesteps(5)
        assert scheduler.timesteps.tolist() == pytest.approx(table.tau)
        state = steps[0][1] / math.sqrt(1 + table.lam[0])
        for i, (t, (_, y, _)) in enumerate(zip(scheduler.timesteps, steps)):
            torch.testing.assert_close(scheduler.scale_model_input(state, t), y, rtol=1e-5, atol=1e-5)
            query = [torch.full((3,), v) for v in scheduler.queries[i]]
            state = scheduler.step(eps_fn(y, *query)[0], t, state, variance_noise=philox_normal(torch.arange(3), i + 2, (4, 4))).prev_sample
        torch.testing.assert_close(state, steps[-1][2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [foreign.stable_diffusion, lambda: foreign.stable_diffusion("v_prediction"), foreign.stable_diffusion_xl,
                                  foreign.stable_diffusion_3, foreign.flux], ids=["SD1", "SD2", "SDXL", "SD3", "Flux"])
def test_it_drops_into_pipelines_of_diffusers(make):
    torch.manual_seed(0)
    pipe, inputs = make()
    pipe.set_progress_bar_config(disable=True)
    flows = isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    pipe.scheduler = ProximalScheduler.from_config(pipe.scheduler.config, eta=1.0)
    asked = []
    network = pipe.transformer if flows else pipe.unet
    network.register_forward_pre_hook(lambda module, args, kwargs: asked.append((kwargs["timestep"] if flows else args[1]).flatten()[0].item()), with_kwargs=True)

    def draw(seed, **more):
        generator = torch.Generator().manual_seed(seed)
        return pipe(**inputs, num_inference_steps=4, generator=generator, output_type="latent", **more).images

    first = draw(0)
    assert first.isfinite().all() and asked == pytest.approx([t / (1000 if "Flux" in type(pipe).__name__ else 1) for t in pipe.scheduler.timesteps.tolist()])
    assert torch.equal(draw(0), first) and not torch.allclose(draw(1), first)
    assert pipe(**inputs, num_inference_steps=2, output_type="np").images.shape == (2, 16, 16, 3)

    # one step with neither noise nor memory is what their own scheduler's first-order step to the clean image gives
    start = torch.randn_like(first)
    ours = pipe(**inputs, num_inference_steps=1, latents=start, output_type="latent").images
    if flows:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        theirs = pipe(**inputs, sigmas=[1.0], latents=start, output_type="latent").images
    else:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)
        theirs = pipe(**inputs, num_inference_steps=1, latents=start, output_type="latent").images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.std().item())


def test_from_a_picture_that_is_half_noised():
    torch.manual_seed(0)
    pipe, inputs = foreign.stable_diffusion()
    pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = ProximalScheduler.from_config(pipe.scheduler.config)
    embeds = {key: inputs[key] for key in ("prompt_embeds", "negative_prompt_embeds")}
    options = dict(image=torch.rand(2, 3, 16, 16), output_type="latent", num_inference_steps=6)
    seen = []
    drawn = pipe(**embeds, **options, strength=0.5, callback_on_step_end=lambda pipe, i, t, latents: seen.append(t.item()) or {}).images
    assert drawn.isfinite().all() and seen == pipe.scheduler.timesteps[3:].tolist()
    assert pipe.scheduler.step_index == 6


def test_without_a_generator_a_pictures_noise_is_its_own():
    """SD3 and Flux pass none: noise is a function of the picture's first state, whatever else is in the batch."""
    scheduler = ProximalScheduler.from_config(flow(), eta=1.0)
    predict, x = network(scheduler), normal(3, 64).float()
    together, _ = run(scheduler, predict, x, num_inference_steps=4)
    torch.randn(5)
    assert torch.equal(run(scheduler, predict, x, num_inference_steps=4)[0], together)
    torch.testing.assert_close(run(scheduler, predict, x[1:2], num_inference_steps=4)[0], together[1:2])
    closer = x.clone()
    closer[0, 0] += 1e-6  # another picture
    changed, _ = run(scheduler, predict, closer, num_inference_steps=4)
    assert (changed[0] - together[0]).abs().mean() > 0.01 and torch.equal(changed[1:], together[1:])


def test_generators_draw_the_noise_and_half_precision_is_kept():
    scheduler = ProximalScheduler.from_config(sd(), eta=1.0)
    scheduler.set_timesteps(4)
    x, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)

    def step(seeds, dtype=torch.float32):
        scheduler.set_timesteps(4)
        return scheduler.step(output.to(dtype), scheduler.timesteps[0], x.to(dtype), generator=[torch.Generator().manual_seed(s) for s in seeds], return_dict=False)[0]

    assert torch.equal(step([1, 2])[0], step([1, 3])[0]) and not torch.equal(step([1, 2])[1], step([1, 3])[1])
    half = step([1, 2], torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), step([1, 2]), rtol=0.05, atol=0.05)


def test_a_configuration_survives_its_file_and_the_way_back(tmp_path):
    for config, more in ((sd(prediction_type="v_prediction"), dict(plan="hybrid")), (flow(), dict(eta=0.5)), (None, dict(plan="ode", beta_max=12.0))):
        scheduler = ProximalScheduler(**more) if config is None else ProximalScheduler.from_config(config, **more)
        scheduler.save_pretrained(tmp_path)
        loaded = ProximalScheduler.from_pretrained(tmp_path)
        public = [{key: value for key, value in dict(s.config).items() if not key.startswith("_")} for s in (scheduler, loaded)]
        assert public[0] == public[1]
        loaded.set_timesteps(6), scheduler.set_timesteps(6)
        assert torch.equal(loaded.timesteps, scheduler.timesteps) and torch.equal(loaded._rows, scheduler._rows)
    again = DDIMScheduler.from_config(ProximalScheduler.from_config(sd(prediction_type="v_prediction")).config)
    torch.testing.assert_close(again.alphas_cumprod, DDIMScheduler(**SCALED_LINEAR).alphas_cumprod)
    assert again.config.prediction_type == "v_prediction"
    betas = [0.001, 0.01, 0.1]
    assert ProximalScheduler.from_config(DDPMScheduler(trained_betas=betas, num_train_timesteps=3, clip_sample=False).config).schedule.alpha(1.0) == pytest.approx(0.999 * 0.99 * 0.9)


def test_defaults_of_another_scheduler_are_its_defaults():
    """A diffusers config lists which of its values were defaults; they must not turn into ours."""
    scheduler = ProximalScheduler.from_config(EulerDiscreteScheduler().config)
    assert scheduler.config.prediction_type == "epsilon" and scheduler.config.beta_schedule == "linear"
    flows = ProximalScheduler.from_config(UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0).config)
    assert flows.config.prediction_type == "flow_prediction" and flows.config.shift == 5.0


@pytest.mark.parametrize("make, message", [
    (lambda: ProximalScheduler.from_config(sd(rescale_betas_zero_snr=True)), "rescale_betas_zero_snr=True with prediction_type='epsilon'"),
    (lambda: ProximalScheduler.from_config(sd(rescale_betas_zero_snr=True, prediction_type="v_prediction"), plan="hybrid"), "infinite gamma"),
    (lambda: ProximalScheduler.from_config(flow(), plan="hybrid"), "does not serve flow networks"),
    (lambda: ProximalScheduler.from_config(sd(prediction_type="sample")), "prediction_type='sample'"),
    (lambda: ProximalScheduler.from_config(DDIMScheduler().config), "from_config\\(config, clip_sample=False\\)"),
    (lambda: ProximalScheduler.from_config(sd(thresholding=True)), "thresholding=True"),
    (lambda: ProximalScheduler.from_config(DDPMScheduler(variance_type="learned_range", clip_sample=False).config), "variance_type='learned_range'"),
    (lambda: ProximalScheduler.from_config(LCMScheduler().config), "consistency"),
    (lambda: ProximalScheduler.from_config(EDMEulerScheduler().config), "not a scheduler of a variance-preserving"),
    (lambda: ProximalScheduler.from_config(FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config), "invert_sigmas=True"),
    (lambda: ProximalScheduler(plan="hybird"), "did you mean 'hybrid'"),
    (lambda: ProximalScheduler(prediction_type="eps"), "unknown prediction_type 'eps'"),
    (lambda: ProximalScheduler(eta=2.0), "eta=2.0"),
    (lambda: ProximalScheduler.from_config(sd()).set_timesteps(0), "num_inference_steps=0"),
    (lambda: ProximalScheduler.from_config(sd()).set_timesteps(1001), "the 1000 timesteps"),
    (lambda: ProximalScheduler.from_config(sd(), plan="backward").set_timesteps(3), "gamma_k < 2"),
    (lambda: ProximalScheduler.from_config(sd()).set_timesteps(timesteps=[10, 20]), "fall strictly"),
    (lambda: ProximalScheduler.from_config(sd()).set_timesteps(timesteps=[1000, 20]), "between 0 and 999"),
    (lambda: ProximalScheduler.from_config(sd(), plan="hybrid").set_timesteps(timesteps=[20, 10]), "need plan='relaxed'"),
    (lambda: ProximalScheduler.from_config(sd()).step(torch.zeros(1, 1), 3, torch.zeros(1, 1)), "call set_timesteps before step"),
])
def test_what_cannot_be_sampled_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_step_too_many_or_at_another_timestep_is_refused():
    scheduler, x = ProximalScheduler.from_config(sd()), torch.zeros(1, 2)
    scheduler.set_timesteps(timesteps=[900, 300])
    assert scheduler.timesteps.tolist() == [900, 300]
    with pytest.raises(ValueError, match="timestep 500 is none of this scheduler's"):
        scheduler.step(x, 500, x)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(ValueError, match="all 2 steps are done"):
        scheduler.step(x, 300, x)


def test_gamma_of_whole_timesteps_is_the_chains():
    scheduler = ProximalScheduler.from_config(sd(), plan="hybrid")
    betas = DDPMScheduler(**SCALED_LINEAR).betas.double()
    schedule = scheduler.schedule
    for low, high in pairwise((0, 1, 100, 250, 1000)):
        assert schedule.beta_integral(low / 1000, high / 1000) == pytest.approx(-torch.log1p(-betas[low:high]).sum().item(), rel=1e-4)
    assert schedule.alpha(0.0) == 1 and schedule.t_of_alpha(schedule.alpha(0.3217)) == pytest.approx(0.3217)
    assert VPSchedule().tau(0.5, 0.0) == pytest.approx(0.5)


def test_preconditioned_score_and_prox_networks_ask_their_blocks_for_the_same():
    """So `model.init_from` a score network starts from the right function of the input (docs/any-model.md)."""
    schedule, t, lam = VPSchedule(), torch.tensor([0.0, 0.3, 0.75], dtype=torch.float64), torch.tensor([0.6, 1.5, 4.4], dtype=torch.float64)
    x, blocks = torch.randn(2, 3, dtype=torch.float64)
    skip, out = precondition(t, lam)
    score_skip, score_out = precondition(schedule.tau(t, lam), torch.zeros_like(lam))
    of_all_noise = (lam / (schedule.one_minus_alpha(t) + lam)).sqrt()
    torch.testing.assert_close(skip * (1 + lam).sqrt() * x + out * blocks, of_all_noise * (score_skip * x + score_out * blocks))
