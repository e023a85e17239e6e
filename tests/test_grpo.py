"""GRPO on a tiny model: what an update is made of, that it does not depend on how it is cut up, and that a killed run continues to the bit."""

import signal
import sys

import pytest
import torch
from grpo_runs import make

from proxt2i.data.prompts import load_prompts
from proxt2i.grpo_config import load_config
from proxt2i.models.bundle import load_settings, load_uvit
from proxt2i.rewards import RewardSettings
from proxt2i.training.advantage import Spread, advantages, coarse, group_spread, surrogate
from proxt2i.training.guard import Evaluation, Guard, attribute_entropy
from runs import ROOT, BareRanks, assert_same_checkpoint, become_rank, overrides, resumed_at, rows, wait_for
from tiny_run import weights


def run_grpo_rank(rank, ranks, port, arguments, log):
    become_rank(rank, ranks, port, log)
    from proxt2i.grpo import main

    sys.exit(main(arguments))


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def test_advantages_are_relative_to_the_group_and_scale_free():
    one, two = RewardSettings("jpeg_compressibility"), RewardSettings("portraits", weight=2.0)
    r = torch.tensor([1.0, 2.0, 3.0, 10.0, 30.0, 50.0])
    a, flat = advantages({"jpeg_compressibility": r, "portraits": 100 * r.flip(0)}, [one], 3, 5.0)
    assert flat == 0
    torch.testing.assert_close(a, torch.tensor([-1.2247, 0.0, 1.2247] * 2), atol=1e-3, rtol=0)
    both, _ = advantages({"jpeg_compressibility": r, "portraits": 100 * r.flip(0)}, [one, two], 3, 5.0)
    torch.testing.assert_close(both, -a, atol=1e-3, rtol=0)  # a - 2 a, in whatever units
    assert advantages({"jpeg_compressibility": r}, [one], 3, 1.0)[0].abs().max() == 1.0


def test_groups_without_differences_give_exactly_nothing_and_are_counted():
    r = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.2, 0.3])
    a, flat = advantages({"jpeg_compressibility": r}, [RewardSettings("jpeg_compressibility")], 3, 5.0)
    assert flat == 1 and torch.equal(a[:3], torch.zeros(3)) and a[3:].abs().max() > 1
    assert advantages({"a": r, "b": r.flip(0)}, [RewardSettings("http", url="http://x/a"), RewardSettings("http", url="http://x/b", weight=0.0)], 3, 5.0)[1] == 1


@pytest.mark.parametrize("elements", [1, 100, 65_536])
def test_the_surrogate_is_the_policy_gradient_inside_the_trust_region_and_flat_outside(elements):
    log_ratio = torch.tensor([0.0, 0.4, -0.4, 2.0, -2.0, 2.0, -2.0, 2.0], requires_grad=True)
    advantage = torch.tensor([1.5, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 0.0])
    value, outside = surrogate(log_ratio, advantage, clip=0.5, elements=elements)
    assert outside.tolist() == [False, False, False, True, True, False, False, False]
    gradient, = torch.autograd.grad(value.sum(), log_ratio)
    expected = advantage * (log_ratio / elements).exp()
    torch.testing.assert_close(gradient, torch.where(outside, 0.0, expected).detach())


def test_held_apart_is_the_gradient_of_the_log_of_a_groups_spread():
    looks = torch.randn(12, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    variance = looks.reshape(3, 4, -1).var(1, correction=0).sum(1)
    expected, = torch.autograd.grad(4 / 2 * variance.log().sum(), looks)
    spread = group_spread(looks.detach(), 4)
    gradient, = torch.autograd.grad(spread.apart(looks).sum(), looks)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(spread.apart(looks).reshape(3, 4).sum(1), torch.full((3,), 2.0, dtype=torch.float64))
    part = spread.of(slice(5, 7), torch.device("cpu"))  # an image needs nothing of the others
    torch.testing.assert_close(part.apart(looks[5:7]), spread.apart(looks)[5:7])


def test_a_group_of_the_same_picture_stays_where_it_is():
    same = torch.full((4, 192), 0.3).requires_grad_()
    gradient, = torch.autograd.grad(group_spread(same.detach(), 4).apart(same).sum(), same)
    assert not gradient.any()
    assert isinstance(group_spread(coarse(torch.rand(4, 3, 20, 30)), 2), Spread)  # any size of picture


# -- the trainer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_update_of_a_rollout_has_ratio_one_exactly(grpo, ranks, precision):
    """And the second, on other images of the same rollout, has not: its old outputs are those of before the first."""
    trainer = make(grpo, ranks, train__micro_batch=2, rollout__batch=5, train__precision=precision)
    steps = trainer._steps(0)
    seen, add = [], trainer.meter.add_transition
    trainer.meter.add_transition = lambda value, log_ratio, kl, outside: seen.append((log_ratio.detach(), kl.detach())) or add(value, log_ratio, kl, outside)
    for _ in range(2):
        trainer.learn(trainer.roller.draw(trainer.engine.module, trainer.images_seen, steps))
    log_ratios, kls = (torch.stack(v).reshape(2, 2, -1) for v in zip(*seen))  # [rollout, update, ...]
    assert len(seen) == 2 * 2 * 4 * 2  # rollouts, updates, micro-batches, transitions
    assert torch.equal(log_ratios[:, 0], torch.zeros_like(log_ratios[:, 0])) and log_ratios[:, 1].abs().min() > 0
    assert torch.equal(kls[0, 0], torch.zeros_like(kls[0, 0])) and kls[1].min() > 0  # of the reference: the initial weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_outputs_kept_from_the_rollout_are_those_that_an_update_would_compute(grpo, ranks, precision):
    """To the bit, where the batches are the same; where they are not, none are kept."""
    trainer = make(grpo, ranks, train__micro_batch=4, rollout__batch=4, train__precision=precision)
    experience = trainer.roller.draw(trainer.engine.module, 0, trainer._steps(0))
    for i in experience.states:
        for part in trainer._parts(range(16)):
            kept, experience.eps = experience.eps, {}
            assert torch.equal(kept[i][part], trainer._old_output(experience, i, part))
            experience.eps = kept
    assert experience.eps.keys() == experience.states.keys()
    assert not make(grpo, ranks, train__micro_batch=4, rollout__batch=8).roller.draw(trainer.engine.module, 0, trainer._steps(0)).eps


def test_inner_epochs_compare_with_the_weights_of_the_rollout(grpo, ranks):
    trainer = make(grpo, ranks, policy__inner_epochs=2, rollout__updates=1)
    seen, add = [], trainer.meter.add_transition
    trainer.meter.add_transition = lambda value, log_ratio, kl, outside: seen.append(log_ratio.detach()) or add(value, log_ratio, kl, outside)
    trainer.learn(trainer.roller.draw(trainer.engine.module, 0, trainer._steps(0)))
    first, second = torch.stack(seen).chunk(2)
    assert torch.equal(first, torch.zeros_like(first)) and second.abs().min() > 0 and trainer.images_seen == 8


@pytest.fixture
def data(shards, components):
    return dict(data__shards=shards, data__image_size=32, data__cache_dir=components / "latents")


@pytest.mark.parametrize("micro_batch, data_weight", [(1, 0.0), (4, 1.0)])
def test_the_micro_batch_changes_the_update_by_rounding_alone(grpo, ranks, tmp_path, data, micro_batch, data_weight):
    ends = []
    for size in (8, micro_batch):
        trainer = make(grpo, ranks, **data, policy__data_weight=data_weight, policy__variety=0.5, train__micro_batch=size, train__run_dir=tmp_path / str(size), train__images=16,
                       optim__name="muon", optim__muon_lr=1e-2)
        before = weights_of(trainer)
        trainer.run()
        ends.append(weights_of(trainer))
    moved = max((ends[0][name] - before[name]).abs().max().item() for name in before)
    apart = max((ends[0][name] - ends[1][name]).abs().max().item() for name in ends[0])
    assert moved > 1e-3 and apart < 2e-3 * moved


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.uvit.named_parameters()}


COLLAPSE = dict(optim__lr=2e-2, optim__eps=1e-8, policy__kl=0, rollout__group_size=16, rollout__groups_per_update=3, rollout__updates=1, train__images=480,
                train__log_every=48, train__checkpoint_every=10**6, guard__every=240, guard__prompts=3)


def test_the_reward_rises(grpo, ranks):
    """Small JPEGs: flat pictures, all the same. What the run reports says so."""
    make(grpo, ranks, **COLLAPSE).run()
    reported = rows(grpo["train.run_dir"])
    rewards = [row["reward/jpeg_compressibility"] for row in reported]
    assert min(rewards[-3:]) > max(rewards[:3]) and reported[-1]["images"] == 480
    row = reported[-1]
    assert 0 <= row["clip_fraction"] <= 1 and 0.5 < row["rollout_share"] + row["train_share"] <= 1.001 and row["spread"] > 0 and row["flat_groups"] == 0
    assert row["diversity/pictures"] < 0.5 * reported[4]["diversity/pictures"] and row["eval/jpeg_compressibility"] > reported[4]["eval/jpeg_compressibility"]


def test_the_exported_model_is_sampled_as_it_was_trained(grpo, ranks, tmp_path):
    make(grpo, ranks, rollout__plan="variance_preserving", train__peak_tflops=2, train__tensorboard="true").run()
    settings = load_settings(tmp_path / "run" / "model")
    assert (settings.plan, settings.num_steps, settings.guidance_scale, settings.extrapolation) == ("variance_preserving", 3, 2.0, 0.0)
    averages = weights(tmp_path / "run", 96, "ema")
    for name, p in load_uvit(tmp_path / "run" / "model" / "uvit").named_parameters():
        assert torch.equal(p.flatten(), averages[name])
    from proxt2i.report import main

    assert main([str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "reward: jpeg_compressibility" in page and "GRPO" in page and "rollout.group_size" in page
    assert "shares of the time" in page and "scoring, beside the drawing" in page and "MFU" in page


def test_rows_say_where_the_time_goes_and_what_was_computed(grpo, ranks):
    """A reward that sleeps: what it takes is reported, and what of it drawing the next pictures does not hide."""
    import time

    from proxt2i.models.flops import forward_flops

    trainer = make(grpo, ranks, rollout__batch=8, train__images=16, train__peak_tflops=2, guard__every=0)
    reward = trainer.roller.scorer.rewards[0]

    class Slow:
        name, batch_size = reward.name, reward.batch_size

        def __call__(self, *arguments):
            time.sleep(0.15)
            return reward(*arguments)

    trainer.roller.scorer.rewards[0] = Slow()
    trainer.run()
    (row,) = rows(grpo["train.run_dir"])
    seconds = 16 / row["images_per_s"]
    assert row["reward_share"] * seconds > 2 * 0.15 and 0.15 < row["reward_wait"] * seconds <= row["reward_share"] * seconds
    assert row["reward_wait"] < row["rollout_share"] < row["rollout_share"] + row["train_share"] <= 1.001
    costs = [1 if scale == 1 else 2 for scale in trainer.policy.guidance]
    passes = sum(costs) + 4 * sum(costs[:2])
    assert row["tflops_per_s"] == pytest.approx(passes * forward_flops(trainer.uvit.config) * row["images_per_s"] / 1e12)
    assert row["mfu"] == pytest.approx(row["tflops_per_s"] / 2)


def test_a_window_of_transitions_moves_on(grpo, ranks):
    trainer = make(grpo, ranks, rollout__steps=5, policy__window=2)
    assert [trainer._steps(i) for i in range(4)] == [(0, 1), (1, 2), (2, 3), (0, 1)]
    trainer.learn(trainer.roller.draw(trainer.engine.module, 0, trainer._steps(1)))
    assert make(grpo, ranks, rollout__steps=5, policy__steps="[0,3]")._steps(7) == (0, 3)


def test_matching_on_data_holds_the_whole_network(grpo, ranks, data):
    make(grpo, ranks, **data, guard__every=0, policy__data_weight=100.0, rollout__groups_per_update=4, optim__lr=1e-2, train__images=320).run()
    losses = [row["data_loss"] for row in rows(grpo["train.run_dir"])]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


# -- the guard --------------------------------------------------------------------------------------------------------


def test_the_guard_fires_when_diversity_collapses_and_stops_the_run(grpo, ranks, capsys):
    make(grpo, ranks, **COLLAPSE | dict(train__images=4800), guard__alarm="stop").run()
    said = capsys.readouterr().out
    assert "diversity of pictures is down to" in said and "guard.alarm=stop" in said and "panel" not in said
    assert rows(grpo["train.run_dir"])[-1]["images"] <= 480


def test_the_guard_fires_when_the_panel_falls_and_restores_the_best_weights(grpo, ranks, tmp_path, capsys):
    """The panel wants the opposite of what is trained: the best weights are the first."""
    make(grpo, ranks, **COLLAPSE, guard__alarm="restore", guard__min_diversity=0, rewards__panel="[{name: jpeg_incompressibility}]").run()
    assert "jpeg_compressibility rose while jpeg_incompressibility of the panel fell" in capsys.readouterr().out
    initial = dict(load_uvit(grpo["model.init_from"] / "uvit").named_parameters())
    for name, p in load_uvit(tmp_path / "run" / "model" / "uvit").named_parameters():
        assert torch.equal(p, initial[name])


def test_an_alarm_can_raise_the_weight_of_the_divergence_and_it_stays_raised(grpo, ranks):
    changes = COLLAPSE | dict(policy__kl=0.01, guard__alarm="raise_kl")
    trainer = make(grpo, ranks, **changes)
    trainer.run()
    assert trainer.kl > 0.01 and make(grpo, ranks, resume="auto", **changes).kl == trainer.kl


def test_the_guard_judges_paired_differences():
    start = Evaluation({"a": [1.0, 2.0, 3.0, 4.0]}, {"p": [1.0, 2.0, 3.0, 4.0]}, {"pictures": 1.0})

    def verdict(trained, panel, diversity):
        guard = Guard(min_diversity=0.8)
        assert guard.judge(start) == ""
        return guard.judge(Evaluation({"a": trained}, {"p": panel}, {"pictures": diversity}))

    up, down, same = [1.2, 2.3, 3.2, 4.3], [0.8, 1.7, 2.8, 3.7], [1.1, 1.9, 3.1, 3.9]
    assert verdict(up, up, 1.0) == verdict(up, same, 0.9) == verdict(down, down, 1.0) == ""
    assert "a rose while p of the panel fell by 0.25" in verdict(up, down, 1.0)
    assert "diversity of pictures is down to 70%" in verdict(same, same, 0.7)


def test_the_entropy_of_what_prompts_leave_open():
    predicted, stated = torch.tensor([[0, 1], [0, 2], [1, 1], [1, 1]]), torch.tensor([[True, False], [True, False], [True, True], [True, True]])
    assert attribute_entropy(predicted, stated, 2) == pytest.approx([0.6931], abs=1e-4)  # two values once each; the second prompt leaves nothing open


# -- many ranks, kills ------------------------------------------------------------------------------------------------


def test_two_ranks_agree_with_one_and_killed_and_resumed_they_are_the_same_to_the_bit(grpo, ranks, tmp_path):
    """Every group lies across both ranks. The real script: unbroken, killed -9 after a checkpoint, resumed."""
    shape = dict(rollout__group_size=8, rollout__groups_per_update=1, policy__inner_epochs=2, policy__variety=0.3, train__images=160, train__keep_checkpoints=9,
                 rewards__train="[{name: pickscore, path: portraits}]")  # without steps: by rounding alone a JPEG can become a byte longer, and advantages others
    two = tmp_path / "two"
    run = BareRanks(*overrides(grpo, **shape, train__run_dir=two), program=run_grpo_rank, log=tmp_path / "log")
    assert run.wait() == [0, 0], run.output
    make(grpo, ranks, **shape | dict(train__images=32)).run()
    one, other = weights(tmp_path / "run", 32), weights(two, 32)
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-5
    reward = "reward/pickscore"
    assert [row[reward] for row in rows(tmp_path / "run")] == pytest.approx([row[reward] for row in rows(two)[:2]], rel=1e-4)

    broken = tmp_path / "broken"
    arguments = overrides(grpo, **shape, train__run_dir=broken)
    run = BareRanks(*arguments, program=run_grpo_rank, log=tmp_path / "killed")
    assert wait_for((broken / "checkpoints" / "latest").exists, run), run.output
    run.signal(signal.SIGKILL)
    run.wait()
    assert not (broken / "model").exists(), run.output
    run = BareRanks("--resume", *arguments, program=run_grpo_rank, log=tmp_path / "resumed")
    assert run.wait() == [0, 0], run.output
    assert 0 < resumed_at(run.output) < 160
    assert_same_checkpoint(broken / "checkpoints" / "step-000000160", two / "checkpoints" / "step-000000160")


def test_resuming_from_another_reference_is_refused(grpo, ranks, model, tmp_path):
    import shutil

    make(grpo, ranks, train__images=32).run()
    other = shutil.copytree(model, tmp_path / "other")
    net = load_uvit(other / "uvit")
    with torch.no_grad():
        net.out.bias.add_(1)
    net.save_pretrained(other / "uvit")
    with pytest.raises(ValueError, match="began from other weights"):
        make(grpo, ranks, resume="auto", model__init_from=other)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("grpo*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    assert load_config(path, world_size=2).train.run_dir.startswith("runs/")


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_every_prompt_comes_once_in_each_pass_wherever_one_begins(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "p{i}", "metadata": {{"n": {i}}}}}\n' for i in range(7)))
    prompts = load_prompts(str(tmp_path / "prompts.jsonl"), 0, 0, False)
    assert prompts.texts[3] == "p3" and prompts.metadata[3] == {"n": 3}
    order = prompts.order(5, 0, 21).tolist()
    assert all(sorted(order[i:i + 7]) == list(range(7)) for i in (0, 7, 14)) and order[:7] != order[7:14]
    assert prompts.order(5, 4, 9).tolist() == order[4:13] and prompts.order(6, 0, 21).tolist() != order


def test_portraits_prompts_carry_what_they_state():
    prompts = load_prompts("portraits", 5, 0, True)
    assert len(set(prompts.texts)) == 5 and all(set(m["stated"]) == set(m["attributes"]) for m in prompts.metadata)
    assert prompts.texts == load_prompts("portraits", 5, 0, True).texts != load_prompts("portraits", 5, 1, True).texts


# -- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, message", [
    ("rollout.group_size=1", "at least 2"),
    ("rollout.steps=1", "at least 2"),
    ("rollout.plan=ode", "no noise"),
    ("rollout.plan=ddpm", "score networks"),
    ("rewards.train=[{name: pikscore}]", "did you mean pickscore"),
    ("rewards.train=[]", "must be a list of rewards"),
    ("policy.steps=[2]", "transitions 0 to 1"),
    ("policy.window=3", "policy.window"),
    ("train.micro_batch=3", "must divide"),
    ("prompts.source=nowhere.txt", "nowhere.txt"),
    ("policy.klip=1", "did you mean policy.clip"),
])
def test_wrong_settings_are_refused_before_any_work(grpo, change, message, capsys):
    from proxt2i.grpo import main

    assert main(["--dry-run", *overrides(grpo), change]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name, text, message", [
    ("empty.txt", "\n \n", "holds no prompts"),
    ("long.txt", "a red square\na red square on a blue square on a green square\n", "1 of 2 prompts are longer than the text encoder's 4 tokens"),
    ("bad.jsonl", '{"prompt": "a red square"}\n{"promt": "a"}\n', "bad.jsonl, line 2"),
])
def test_wrong_prompts_are_refused_before_any_work(grpo, tmp_path, name, text, message, capsys):
    from proxt2i.grpo import main

    (tmp_path / name).write_text(text)
    assert main(["--dry-run", *overrides(grpo), f"prompts.source={tmp_path / name}"]) == 2
    assert message in capsys.readouterr().err
