"""U-ViT: sizes, conditioning, batch independence, precision, checkpointing, long skips, resizing, round trips."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from proxt2i.diffusion import VPSchedule, precondition
from proxt2i.models.uvit import (
    LAMBDA_FLOOR, PRESETS, LongSkip, UViT2DModel, attention, build_uvit, resize_position_embedding,
)

SMALL = dict(sample_size=8, in_channels=4, patch_size=2, embed_dim=32, depth=5, num_heads=4,
             text_dims=[6, 10], text_lengths=[3, 2])


def small(seed=0, **overrides):
    torch.manual_seed(seed)
    model = UViT2DModel(**{**SMALL, **overrides})
    with torch.no_grad():  # well away from initialisation, so that every path matters
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def inputs(batch=3, seed=1, **overrides):
    cfg = {**SMALL, **overrides}
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(batch, cfg["in_channels"], cfg["sample_size"], cfg["sample_size"], generator=g)
    text = [torch.randn(batch, n, d, generator=g) for n, d in zip(cfg["text_lengths"], cfg["text_dims"])]
    return y, torch.rand(batch, generator=g), 3 * torch.rand(batch, generator=g), text


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_on_the_meta_device(preset):
    with torch.device("meta"):
        model = build_uvit(preset)
    cfg = PRESETS[preset]
    assert len(model.in_blocks) == len(model.out_blocks) == cfg["depth"] // 2
    assert model.position.shape[1] == 2 + sum(cfg["text_lengths"]) + (cfg["sample_size"] // cfg["patch_size"]) ** 2


def test_sizes_of_portraits_and_h():
    with torch.device("meta"):
        portraits, huge = build_uvit("portraits"), build_uvit("H")
    assert num_parameters(portraits) == 1_543_680 + 7 * 2 * 32  # the last: QK-norm
    # 29 blocks 462.17 M, 14 long skips 37.18 M, text projections 5.91 M, t and lambda MLPs 0.72 M, positions for
    # 2 + 205 + 256 tokens 0.53 M, patch and output layers 0.15 M
    assert num_parameters(huge) == 506_660_160
    assert abs(num_parameters(huge) / 507e6 - 1) < 0.01
    assert len(huge.in_blocks) + 1 + len(huge.out_blocks) == 29
    assert huge.mid_block.attn.head_dim == 72
    assert sum(num_parameters(b) for b in [*huge.in_blocks, huge.mid_block, *huge.out_blocks]) == 499_341_312
    assert sum(num_parameters(p) for p in huge.text_embed) == 5_910_784


@pytest.mark.parametrize("overrides", [{}, {"qk_norm": True}, {"final_conv": True}, {"depth": 1}])
def test_output_shape_dtype_and_gradient_to_every_parameter(overrides):
    model = small(**overrides)
    eps = model(*inputs())
    assert eps.shape == (3, 4, 8, 8) and eps.dtype == torch.float32
    eps.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_gradient_reaches_everything_at_initialisation():
    torch.manual_seed(0)
    model = build_uvit("portraits", embed_dim=32, depth=3)
    y, t, lam, _ = inputs(**PRESETS["portraits"])
    model(y, t, lam, [torch.randn(3, 24, 96)]).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad.abs().sum() == 0]


@pytest.mark.parametrize("changed", ["y", "t", "lam", "text0", "text1"])
def test_each_input_changes_the_output(changed):
    model, (y, t, lam, text) = small().eval(), inputs()
    with torch.no_grad():
        before = model(y, t, lam, text)
        if changed == "y":
            y = y + 0.5
        elif changed == "t":
            t = 1 - t
        elif changed == "lam":
            lam = lam + 0.3
        else:
            i = int(changed[-1])
            text = [c + 1.0 * torch.randn_like(c) if j == i else c for j, c in enumerate(text)]
        assert (model(y, t, lam, text) - before).abs().max() > 1e-2


def test_a_sample_does_not_depend_on_its_batch():
    model, (y, t, lam, text) = small().eval(), inputs(batch=5)
    with torch.no_grad():
        together = model(y, t, lam, text)
        alone = torch.cat([model(y[i:i + 1], t[i:i + 1], lam[i:i + 1], [c[i:i + 1] for c in text]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_input_is_scaled_to_unit_variance():
    """eps(y, lam) sees y / sqrt(1 + lam): scaling y along with lam changes the lambda token alone."""
    model, (y, t, lam, text) = small().eval(), inputs()
    model.lam_embed.fc2.weight.data.zero_()
    with torch.no_grad():
        a = model(y * torch.sqrt(1 + lam)[:, None, None, None], t, lam, text)
        b = model(y * 2, t, torch.full_like(lam, 3.0), text)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_lambda_zero_is_finite_and_close_to_the_floor():
    model, (y, t, _, text) = small().eval(), inputs()
    with torch.no_grad():
        zero = model(y, t, torch.zeros(3), text)
        floor = model(y, t, torch.full((3,), LAMBDA_FLOOR), text)
    assert zero.isfinite().all()
    torch.testing.assert_close(zero, floor, rtol=1e-2, atol=1e-3)


def test_matches_the_plain_uvit_recurrence():
    """The published form (concatenated skips, every token through every block) gives the same numbers."""
    model, (y, t, lam, text) = small().eval(), inputs()

    def run_blocks(x):
        skips = []
        for block in model.in_blocks:
            x = block(x)
            skips.append(x)
        x = model.mid_block(x)
        for block in model.out_blocks:
            linear = block.skip
            x = torch.cat([x, skips.pop()], dim=-1) @ linear.weight.T + linear.bias
            block.skip = None
            x = block(x)
            block.skip = linear
        return x[:, model.num_condition_tokens:]

    with torch.no_grad():
        ours = model(y, t, lam, text)
        model._run_blocks = run_blocks
        torch.testing.assert_close(ours, model(y, t, lam, text), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_long_skips_are_used_and_mirrored(which):
    model, x = small().eval(), inputs()
    with torch.no_grad():
        before = model(*x)
        model.out_blocks[which].skip.weight[:, 32:] = 0  # the half that reads the skip
        assert (model(*x) - before).abs().max() > 1e-3

    seen = []
    for block in [*model.in_blocks, *model.out_blocks]:
        block.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    with torch.no_grad():
        model(*x)
    assert seen[2][0][1] is seen[1][1] and seen[3][0][1] is seen[0][1]


def test_long_skip_is_a_linear_of_the_concatenation():
    skip, (a, b) = LongSkip(8), torch.randn(2, 5, 3, 8)
    torch.testing.assert_close(skip(a, b), torch.nn.functional.linear(torch.cat([a, b], -1), skip.weight, skip.bias))


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries():
    for qk_norm, same in ((True, True), (False, False)):
        model, x = small(qk_norm=qk_norm).eval(), inputs()
        with torch.no_grad():
            before = model(*x)
            model.mid_block.attn.qkv.weight[:32] *= 7  # queries
            close = torch.allclose(model(*x), before, rtol=1e-3, atol=1e-4)
        assert close is same


def test_bfloat16_autocast_is_close_to_float32():
    model, x = small().eval(), inputs()
    with torch.no_grad():
        exact = model(*x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(*x)
        half = small().eval().bfloat16()(*x)  # whole model in bfloat16, y stays float32 outside
    for approx in (cast, half):
        assert approx.dtype == torch.float32
        assert 0 < (approx - exact).norm() / exact.norm() < 0.05


def test_attention_inputs_stay_in_low_precision(monkeypatch):
    seen = []

    def spy(qkv, **options):
        seen.append(qkv.dtype)
        return attention(qkv, **options)

    monkeypatch.setattr("proxt2i.models.uvit.attention", spy)
    for qk_norm in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            small(qk_norm=qk_norm)(*inputs())
    assert seen and set(seen) == {torch.bfloat16}


def test_gradient_checkpointing_gives_the_same_gradients_and_recomputes():
    grads, calls = [], []
    for on in (False, True):
        model = small(gradient_checkpointing=on)
        count = [0]
        model.mid_block.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
        model(*inputs()).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
        calls.append(count[0])
    assert calls == [1, 2]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_enable_gradient_checkpointing_of_diffusers_works():
    model = small()
    model.enable_gradient_checkpointing()
    assert model.gradient_checkpointing and model.is_gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.gradient_checkpointing


@pytest.mark.parametrize("autocast", [False, True])
def test_equal_blocks_share_their_compiled_code(autocast):
    """A deep network compiles as often as a shallow one: once for a block without a long skip, once for one with it
    (and again where the first block's input needs no gradient or has another dtype)."""
    def compilations(depth):
        torch._dynamo.reset()
        compiled, model = CompileCounterWithBackend("aot_eager"), small(depth=depth)
        model.compile_repeated_blocks(fullgraph=True, backend=compiled)
        for seed in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(*inputs(seed=seed)).float().square().mean()
            loss.backward()
        return compiled.frame_count

    assert 2 <= compilations(5) <= 4 and compilations(13) == compilations(5)


def test_save_and_from_pretrained_round_trip_is_bit_equal(tmp_path):
    model, x = small(qk_norm=True).eval(), inputs()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = UViT2DModel.from_pretrained(tmp_path).eval()
    assert again.config.qk_norm and list(again.config.text_dims) == [6, 10]
    with torch.no_grad():
        assert torch.equal(model(*x), again(*x))


def test_resize_position_embedding_keeps_conditions_and_interpolates_a_ramp():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    position = torch.cat([torch.full((1, 3, 2), -7.0), torch.stack([rows, columns], -1).view(1, 16, 2)], dim=1)
    out = resize_position_embedding(position, 3, (8, 8))
    assert out.shape == (1, 3 + 64, 2)
    assert torch.equal(out[:, :3], position[:, :3])
    ramp = (torch.arange(8.0) + 0.5) / 2 - 0.5  # pixel centres of the finer grid in coarse units
    grid = out[0, 3:].view(8, 8, 2)
    torch.testing.assert_close(grid[1:-1, 4, 0], ramp[1:-1])
    torch.testing.assert_close(grid[2, 1:-1, 1], ramp[1:-1])
    wide = resize_position_embedding(position, 3, (2, 8))[0, 3:].view(2, 8, 2)
    torch.testing.assert_close(wide[:, 1:-1, 1], ramp[1:-1].expand(2, -1))
    torch.testing.assert_close(wide[:, 4, 0], torch.tensor([0.5, 2.5]))
    assert resize_position_embedding(position, 3, (4, 4)) is position
    with pytest.raises(ValueError, match="num_condition_tokens"):
        resize_position_embedding(position, 2, (8, 8))


def test_resized_model_runs_trains_and_reloads_at_the_new_size(tmp_path):
    model = small().resize_(16)
    y, t, lam, text = inputs(sample_size=16)
    eps = model(y, t, lam, text)
    assert eps.shape == y.shape
    eps.sum().backward()
    assert model.position.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(UViT2DModel.from_pretrained(tmp_path)(y, t, lam, text), model(y, t, lam, text))


@pytest.mark.parametrize("height, width", [(4, 16), (10, 6), (8, 16)])
def test_other_sizes_run_and_train(height, width):
    model, (_, t, lam, text) = small(final_conv=True, betas=[0.1, 20.0]), inputs()
    y = torch.randn(3, 4, height, width)
    grid = (height // 2, width // 2)
    assert torch.equal(model._unpatchify(model._patchify(y), grid), y)
    eps = model(y, t, lam, text)
    assert eps.shape == y.shape
    eps.square().mean().backward()
    assert (model.position.grad.abs().sum(-1) > 0).all()  # every learned position has its part


def test_other_sizes_keep_rows_and_columns_apart():
    """With one position for all patches the network cannot tell them apart: rolled patches give rolled output. Learned ones break that."""
    model, (_, t, lam, text), y = small().eval(), inputs(), torch.randn(3, 4, 4, 16)
    rolled = y.roll((2, 4), (2, 3))
    with torch.no_grad():
        assert (model(rolled, t, lam, text) - model(y, t, lam, text).roll((2, 4), (2, 3))).abs().max() > 0.1
        model.position[:, model.num_condition_tokens:] = model.position[:, -1:].clone()
        torch.testing.assert_close(model(rolled, t, lam, text), model(y, t, lam, text).roll((2, 4), (2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("overrides, name", [
    ({"sample_size": 9}, "sample_size"), ({"num_heads": 5}, "num_heads"), ({"text_lengths": [3]}, "text_lengths"),
])
def test_contradicting_sizes_are_refused(overrides, name):
    with pytest.raises(ValueError, match=name):
        UViT2DModel(**{**SMALL, **overrides})


def test_wrong_inputs_are_refused():
    model, (y, t, lam, text) = small(), inputs()
    for wrong in (y[:, :, :5], y[..., :0], y[:, :3], y[0]):
        with pytest.raises(ValueError, match=r"takes \[B, 4, H, W\], H and W divisible by patch_size 2 \(8 x 8 is its own size\)"):
            model(wrong, t, lam, text)
    with pytest.raises(ValueError, match=r"text has .* takes \[\(3, 6\), \(2, 10\)\]"):
        model(y, t, lam, text[::-1])


def test_build_uvit_names_what_is_unknown():
    with pytest.raises(ValueError, match="portraits, S, B, L, H"):
        build_uvit("huge")
    with pytest.raises(ValueError, match="did you mean 'embed_dim'"):
        build_uvit("portraits", embed_dims=64)
    assert build_uvit("portraits", embed_dim=64, depth=3).config.embed_dim == 64


def test_it_learns():
    """A few steps of the real loss shape on a fixed batch bring the error well below that of predicting nothing."""
    torch.manual_seed(0)
    model = UViT2DModel(**{**SMALL, "depth": 3})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    y, t, lam, text = inputs(batch=8)
    target = y / (1 + lam).sqrt()[:, None, None, None]
    for _ in range(40):
        loss = (model(y, t, lam, text) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * target.square().mean()


def test_betas_precondition_the_output():
    """The same weights with `betas`: eps = c_skip y + c_out F, F the output without."""
    y, t, lam, text = inputs()
    plain, preconditioned = small(), small(betas=[0.1, 20.0])
    c_skip, c_out = (c[:, None, None, None] for c in precondition(t, lam, VPSchedule(0.1, 20.0)))
    torch.testing.assert_close(preconditioned(y, t, lam, text), c_skip * y + c_out * plain(y, t, lam, text))


def test_betas_survive_saving(tmp_path):
    small(betas=[0.2, 15.0]).save_pretrained(tmp_path)
    loaded = UViT2DModel.from_pretrained(tmp_path)
    assert loaded.schedule == VPSchedule(0.2, 15.0)
    assert torch.equal(loaded(*inputs()), small(betas=[0.2, 15.0])(*inputs()))
