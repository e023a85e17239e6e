"""The gradient of differentiable rewards, and of variety: each against finite differences and against what it scores, and through the last call of a policy."""

import pytest
import torch
from grpo_runs import make, overrides

from proxt2i.data.portraits import make_arrays
from proxt2i.diffusion import make_plan, make_policy, rollout, score_plan
from proxt2i.diffusion.policy import last_call
from proxt2i.rewards import DIFFERENTIABLE, REWARDS, RewardError, RewardSettings, load_reward, score, score_differentiably
from proxt2i.rewards.preprocess import quantise
from proxt2i.training.advantage import reward_scales

PRESENT = [RewardSettings("pickscore", path="portraits"), RewardSettings("portraits")]


@pytest.fixture(scope="module")
def portraits():
    images, captions, metadata = make_arrays(100_000_900, 6)
    return torch.from_numpy(images).float() / 255, captions, metadata


def tiny_clip_rewards():
    """One of each class that is made of a CLIP, random, its pictures of 28 pixels."""
    from transformers import CLIPConfig, CLIPModel

    from proxt2i.embedded import ASSETS
    from proxt2i.rewards.aesthetic import Aesthetic, linear_head
    from proxt2i.rewards.clip import load_clip_tokenizer
    from proxt2i.rewards.clipscore import ClipScore
    from proxt2i.rewards.hpsv2 import HPSv2

    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = load_clip_tokenizer(ASSETS / "tokenizer")
    config = CLIPConfig(text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
                        vision_config={**tower, "image_size": 28, "patch_size": 14}, projection_dim=16)
    clip = CLIPModel(config).requires_grad_(False).eval()
    rewards = {"clipscore": ClipScore(clip, tokenizer), "hpsv2": HPSv2(clip, tokenizer), "aesthetic": Aesthetic(clip, linear_head(16))}
    for name, reward in rewards.items():
        reward.name, reward.batch_size = name, 32
    return rewards


def check_gradient(reward, images, captions, metadata, tolerance):
    """Along its own direction, where nothing is lost in rounding, a central difference of the float path; and the float path agrees with the scores."""
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))  # no ties where pooling takes a maximum
    images = (0.1 + 0.8 * images + 0.05 * noise).requires_grad_()
    values = score_differentiably(reward, images, captions, metadata)
    assert values.shape == (len(images),)
    gradient, = torch.autograd.grad(values.sum(), images)
    direction = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    step = 0.004
    with torch.no_grad():
        up, down = (score_differentiably(reward, images + sign * step * direction, captions, metadata) for sign in (1, -1))
    torch.testing.assert_close((up - down) / (2 * step), (gradient * direction).flatten(1).sum(1), rtol=0.05, atol=1e-4)
    rounded = quantise(images.detach()).float() / 255
    scores = score([reward], rounded, captions, metadata)[reward.name]
    torch.testing.assert_close(score_differentiably(reward, rounded, captions, metadata).detach(), scores, **tolerance)


@pytest.mark.parametrize("name", ["pickscore", "pickscore_contrast"])
def test_pickscores_gradient(name, portraits):
    check_gradient(load_reward(RewardSettings(name, path="portraits")), *portraits, tolerance=dict(rtol=1e-4, atol=2e-4))


def test_the_judges_gradient_is_that_of_the_share_it_expects(portraits):
    images, captions, metadata = portraits
    reward = load_reward(PRESENT[1])
    check_gradient(reward, images, captions, metadata, tolerance=dict(rtol=0, atol=0.15))  # a share of right answers against their probabilities
    asked_wrongly = [metadata[-1]] + metadata[:-1]
    assert (score_differentiably(reward, images, captions, metadata) > score_differentiably(reward, images, captions, asked_wrongly) + 0.1).all()
    assert not any(p.requires_grad for p in reward.judge.model.parameters())


@pytest.mark.parametrize("name", ["clipscore", "hpsv2", "aesthetic"])
def test_gradients_of_rewards_made_of_a_clip(name, portraits):
    images, captions, metadata = portraits
    check_gradient(tiny_clip_rewards()[name], images, captions, metadata, tolerance=dict(rtol=0.02, atol=0.02))  # Pillow's resizing against torch's


def test_the_list_of_differentiable_rewards_is_right(portraits):
    import importlib
    import inspect

    for name, module in REWARDS.items():
        classes = [c for c in vars(importlib.import_module(f"proxt2i.rewards.{module}")).values() if inspect.isclass(c) and c.__module__.endswith(module)]
        assert any(hasattr(c, "differentiable") for c in classes) == (name in DIFFERENTIABLE)
    with pytest.raises(RewardError, match="reward jpeg_compressibility is not differentiable"):
        score_differentiably(load_reward(RewardSettings("jpeg_compressibility")), *portraits)


def test_scales_are_those_of_the_run_not_of_a_group():
    r = torch.tensor([1.0, 3.0, 5.0, 5.0])
    one, two, off = RewardSettings("portraits", weight=2.0), RewardSettings("pickscore"), RewardSettings("clipscore", weight=0.0)
    scales = reward_scales({"portraits": r, "pickscore": torch.ones(4), "clipscore": r}, [one, two, off], 2)
    assert scales == {"portraits": pytest.approx(2.0 / 0.5**0.5), "pickscore": 0.0}


@pytest.mark.parametrize("plan", [make_plan("relaxed", 4, extrapolation=0), make_plan("hybrid", 3), score_plan("ddpm", 4)], ids=lambda plan: plan.name)
def test_the_last_call_is_what_the_rollout_ended_with(plan):
    def eps_fn(y, t, lam, scale):
        return torch.tanh(y) + t[:, None], None if scale == 1 else 0.5 * y

    policy = make_policy(plan, [1.0] * (plan.num_steps - 1) + [1.5])
    drawn = rollout(eps_fn, policy, (5,), [1, 2, 3], steps=[0], keep_last=True)
    assert sorted(drawn.states) == [0, plan.num_steps - 1]
    torch.testing.assert_close(last_call(eps_fn, policy, drawn.states[plan.num_steps - 1]), drawn.x0)


def trained_on_gradient_alone(grpo, ranks, portraits_model, reward_gradient=1.0, **changes):
    settings = grpo | {"model.init_from": portraits_model, "prompts.source": "portraits", "prompts.num": 4, "rewards.train": "[{name: pickscore, path: portraits}]"}
    return make(settings, ranks, guard__every=0, policy__reward_gradient=reward_gradient, policy__advantage_clip=1e-9, policy__kl=0, train__images=96, **changes)


@pytest.fixture(scope="module")
def portraits_model(tmp_path_factory):
    """A random tiny U-ViT with the embedded parts."""
    from proxt2i.embedded import ASSETS
    from proxt2i.models.bundle import Bundle, load_components, save_bundle
    from proxt2i.models.uvit import build_uvit

    text, codec = load_components(ASSETS)
    torch.manual_seed(1)
    uvit = build_uvit("portraits", embed_dim=32, depth=3, num_heads=2, text_dims=text.dims, text_lengths=text.lengths, betas=[0.1, 20.0])
    folder = tmp_path_factory.mktemp("portraits") / "model"
    save_bundle(folder, Bundle(uvit, text, codec, source=ASSETS), with_components=False)
    return folder


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)], ids=["reward", "variety", "both"])
def test_the_gradient_through_the_last_call_is_a_finite_difference(weights, grpo, ranks, portraits_model):
    """Of the objective in the weights: y_1 held, through network, guidance, VAE and reward."""
    trainer = trained_on_gradient_alone(grpo, ranks, portraits_model, weights[0], policy__variety=weights[1])
    experience = trainer.roller.draw(trainer.engine.module, 0, trainer._steps(0))
    part, weight = slice(0, 8), trainer.uvit.out.weight
    trainer.engine, engine = trainer.engine.module, trainer.engine  # plain autograd
    gradient, = torch.autograd.grad(trainer._last_call(experience, part).mean(), weight)
    direction, step = gradient / gradient.norm(), 0.004
    ends = []
    with torch.no_grad():
        for sign in (1, -1):
            weight += sign * step * direction
            ends.append(trainer._last_call(experience, part).mean())
            weight -= sign * step * direction
    assert ((ends[0] - ends[1]) / (2 * step)).item() == pytest.approx(gradient.norm().item(), rel=0.05)
    trainer.engine = engine


def test_it_raises_the_reward(grpo, ranks, portraits_model):
    """Of the same prompts and noise, drawn and scored before and after; advantages are cut to nothing, so that nothing else trains."""
    trainer = trained_on_gradient_alone(grpo, ranks, portraits_model, optim__eps=1e-8, optim__lr=1e-2)

    def draw():
        return trainer.roller.draw(trainer.engine.module, 0, trainer._steps(0))

    before = draw()
    for _ in range(2):
        trainer.learn(draw())
    gains = draw().scores["pickscore"] - before.scores["pickscore"]
    assert gains.mean() > 0.5 and (gains > 0).float().mean() > 0.8


def test_variety_draws_a_prompts_pictures_apart(grpo, ranks, portraits_model):
    """No reward's gradient, and advantages cut to nothing."""
    trainer = trained_on_gradient_alone(grpo, ranks, portraits_model, 0.0, policy__variety=1.0, optim__eps=1e-8, optim__lr=1e-2)

    def draw():
        return trainer.roller.draw(trainer.engine.module, 0, trainer._steps(0))

    before = draw()
    for _ in range(2):
        trainer.learn(draw())
    assert (draw().group_spread.variance > 1.2 * before.group_spread.variance).all()


def test_rewards_without_a_gradient_are_refused_by_name(grpo, capsys):
    from proxt2i.grpo import main

    assert main(["--dry-run", *overrides(grpo), "policy.reward_gradient=1"]) == 2
    assert "rewards.train[0] (jpeg_compressibility) has no gradient, which policy.reward_gradient needs" in capsys.readouterr().err
