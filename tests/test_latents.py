"""Latent shards: what is read is what the VAE made, whoever made it and however often it was killed; damage and mix-ups are found."""

import json
import os
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from runs import COLORS, BareRanks, assert_same_checkpoint, overrides, resumed_at, wait_for
from torch import nn

from proxt2i.config import load_config
from proxt2i.data import latents as latents_module
from proxt2i.data.index import index_shards
from proxt2i.data.latent_shards import LatentDataset, is_latent_folder
from proxt2i.data.latents import check_latents, describe_latents, encode_shards, main
from proxt2i.data.loader import BatchLoader
from proxt2i.data.order import flips
from proxt2i.data.shards import ShardDataset
from proxt2i.data.writing import write_samples
from proxt2i.models.bundle import load_components
from proxt2i.models.files import component_digests, weights_digest
from proxt2i.training.feed import Feed

BUCKETS = [(16, 32), (32, 32), (32, 16)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Shards of 50 pictures in three shapes, one of them not decodable."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    shapes = [(32, 32), (20, 40), (40, 22)]
    samples = [{"key": f"{i:03d}", "caption": f"a {list(COLORS)[i % 4]} square",
                "image": rng.integers(0, 256, (*shapes[i % 7 % 3], 3), dtype=np.uint8)} for i in range(50)]
    write_samples(folder, samples, shard_size=20)
    shard = bytearray((folder / "00001.tar").read_bytes())
    start = shard.index(b"IDAT", len(shard) // 2)
    shard[start + 4:start + 40] = bytes(36)
    (folder / "00001.tar").write_bytes(shard)
    return folder


@pytest.fixture(scope="module")
def parts(components):
    return load_components(components)


def encode_in(folder, pictures, components, parts, dtype="fp32", **options):
    """Fill a folder with latents, mirrored ones and embeddings of the pictures."""
    text, codec = parts
    dataset = ShardDataset(index_shards(pictures), 32, buckets=BUCKETS)
    about = describe_latents(dataset, 32, codec, component_digests(components, ["text_encoder"]), text=text, names=["text_encoder"], dtype=dtype, mirrored=True, batch_size=7)
    encode_shards(dataset, folder, about, codec, text, **options)
    return folder


@pytest.fixture(scope="module")
def finished(pictures, components, parts, tmp_path_factory):
    return encode_in(tmp_path_factory.mktemp("finished") / "latents", pictures, components, parts)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished folder of latents in fp32, to be damaged."""
    return shutil.copytree(finished, tmp_path / "latents")


@pytest.fixture
def encode(pictures, components, parts, tmp_path):
    """encode(name, ...) -> a folder of the test's, finished."""
    return lambda name="latents", **options: encode_in(tmp_path / name, pictures, components, parts, **options)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------------------------------------
# What is in it.

@pytest.mark.parametrize("dtype, tolerance, in_memory", [("fp32", 1e-5, False), ("fp16", 2e-3, True), ("bf16", 2e-2, False)])
def test_latents_are_the_vaes_of_the_image_and_of_its_mirror_image(encode, pictures, parts, dtype, tolerance, in_memory):
    text, codec = parts
    images, latents = ShardDataset(index_shards(pictures), 32, buckets=BUCKETS), LatentDataset(encode(dtype=dtype), in_memory)
    by_key = {sample["key"]: (sample, images.bucket[i]) for i, sample in enumerate(images[i] for i in range(50)) if isinstance(sample, dict)}
    assert len(latents) == len(by_key) == 49 and latents.buckets == BUCKETS and set(latents.bucket) == {0, 1, 2}
    for i in range(0, 49, 3):
        sample = latents[i]
        expected, bucket = by_key.pop(sample["key"])
        assert latents.bucket[i] == bucket and sample["caption"] == expected["caption"]
        pixels = expected["image"][None].float() / 127.5 - 1
        torch.testing.assert_close(sample["latents"].float(), codec.encode(pixels)[0], rtol=tolerance, atol=tolerance)
        mirrored = latents.read_batch(np.array([i]), np.array([True]))["latents"][0].float()
        torch.testing.assert_close(mirrored, codec.encode(pixels.flip(-1))[0], rtol=tolerance, atol=tolerance)
        assert (mirrored - sample["latents"].float().flip(-1)).abs().max() > 0.05    # mirroring the latents is something else
        torch.testing.assert_close(sample["text"][0].float(), text([sample["caption"]])[0][0], rtol=tolerance, atol=tolerance)
    bad = [json.loads(line) for line in (latents.folder / "bad_samples.jsonl").read_text().splitlines()]
    assert len(bad) == 1 and bad[0]["shard"] == "00001.tar" and "cannot be decoded" in bad[0]["reason"]


@pytest.mark.parametrize("in_memory", [False, True])
def test_batches_have_one_shape_and_flips_take_the_mirrored_latents(finished, in_memory):
    dataset = LatentDataset(finished, in_memory)
    place = dict(seed=2, images_seen=12, rank=1, world=2)
    with BatchLoader(dataset, 3, num_workers=1, flip=True, **place) as flipped, BatchLoader(dataset, 3, num_workers=0, **place) as plain:
        for _ in range(10):
            got, straight = next(flipped), next(plain)
            assert got["keys"] == straight["keys"] and got["latents"].dtype == torch.float32 and len(set(got["keys"])) > 1
            turned = flips(2, got["ids"].numpy())
            different = (got["latents"] != straight["latents"]).flatten(1).any(1).numpy()
            assert (different == turned).all() and torch.equal(got["text"][0], straight["text"][0])


def test_an_interrupted_command_and_several_ranks_leave_the_same_bytes(finished, encode, folder, tmp_path, monkeypatch):
    """kill -9 after every file operation, then go on; and two ranks at a time."""
    whole = contents(finished)
    assert [name for name in whole if name.endswith(".safetensors")] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    replace, parent = os.replace, os.getpid()
    for step in range(20):
        if (pid := os.fork()) == 0:
            left = [step % 3 + (step > 0)]

            def dying_replace(*names):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                replace(*names)

            os.replace = dying_replace
            encode("killed")
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            break
    assert os.getpid() == parent and step > 3
    assert {name: data for name, data in contents(tmp_path / "killed").items() if not name.startswith(".")} == whole

    threads = [threading.Thread(target=encode, args=("two",), kwargs=dict(rank=rank, world=2)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert contents(tmp_path / "two") == whole
    monkeypatch.setattr(latents_module, "write_latent_shard", lambda *_: pytest.fail("a finished folder is left alone"))
    assert contents(encode()) == whole


# ------------------------------------------------------------------------------------------------------------
# Damage, and mix-ups.

def flip_bit(path, where):
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))


def test_a_flipped_bit_anywhere_is_found_when_it_is_read(folder):
    path, rng = folder / "00000.safetensors", np.random.default_rng(0)
    whole = path.read_bytes()
    for where in rng.integers(0, len(whole), 60).tolist():
        flip_bit(path, where)
        dataset, found = LatentDataset(folder), 0
        try:
            for mirrored in (False, True):
                for i in range(20):
                    found += len(dataset.read_batch(np.array([i]), np.array([mirrored]))["bad"])
        except RuntimeError as error:
            assert str(path) in str(error) and "--verify" in str(error)
            found += 1
        assert found, f"bit of byte {where} of {len(whole)}"
        with pytest.raises(RuntimeError, match="SHA-256 differs"):
            LatentDataset(folder, in_memory=True)
        path.write_bytes(whole)


def test_a_damaged_sample_is_replaced_named_and_listed(folder, tmp_path):
    flip_bit(folder / "00002.safetensors", -1)                # of the last row of the last tensor
    listed = tmp_path / "bad_samples.jsonl"
    with BatchLoader(LatentDataset(folder), 7, num_workers=1, bad_list=listed, flip=True) as loader:
        for _ in range(60):
            assert "" not in next(loader)["keys"]
    (line,) = map(json.loads, listed.read_text().splitlines())
    assert line["shard"] == "00002.safetensors" and "CRC-32" in line["reason"]


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "lost", "lost note", "note of others"])
def test_verify_makes_damaged_shards_again(folder, encode, damage, caplog):
    whole, shard, note = contents(folder), folder / "00001.safetensors", folder / "00001.json"
    {"cut": lambda: os.truncate(shard, 100), "flipped bit": lambda: flip_bit(shard, 900), "lost": shard.unlink, "lost note": note.unlink,
     "note of others": lambda: note.write_bytes(note.read_bytes().replace(b'"fingerprint": "', b'"fingerprint": "0'))}[damage]()
    encode(verify=True)
    assert contents(folder) == whole and (damage.startswith("lost") or "00001.safetensors is damaged" in caplog.text)


def test_a_missing_rank_is_named_and_an_unfinished_folder_is_no_data(encode, tmp_path):
    with pytest.raises(RuntimeError, match="waited.*00001.safetensors, which rank 1 makes"):
        encode(rank=0, world=2, wait_s=0.2)
    assert is_latent_folder(tmp_path / "latents")
    with pytest.raises(ValueError, match="not finished.*same arguments again"):
        LatentDataset(tmp_path / "latents")


def test_other_latents_in_the_folder_and_values_beyond_the_dtype_are_refused(folder, encode, parts):
    with pytest.raises(ValueError, match="holds latents made otherwise .dtype: fp32 there, fp16 here.: choose another folder"):
        encode(dtype="fp16")
    parts[1].scale, scale = 1e7, parts[1].scale
    try:
        with pytest.raises(ValueError, match="00000.tar, sample .* not finite in fp16: use bf16 or fp32"):
            encode("large", dtype="fp16")
    finally:
        parts[1].scale = scale


def test_latents_of_other_components_or_sizes_are_refused(finished, components):
    dataset, digests = LatentDataset(finished), component_digests(components, ["text_encoder"])
    check_latents(dataset, 32, None, True, digests)
    for arguments, message in [
            ((64, None, False, digests), "for data.image_size=32, the run asks for 64"),
            ((32, [(32, 32)], False, digests), "in the buckets 16x32, 32x32, 32x16, not those of data.buckets"),
            ((32, None, False, {**digests, "vae": "0" * 64}), "another VAE .SHA-256 .* than model.components has .000000000000"),
            ((32, None, False, {**digests, "text_encoder": "1" * 64}), "another text_encoder"),
            ((32, None, False, {"vae": digests["vae"]}), "another text_encoder .* .none")]:
        with pytest.raises(ValueError, match=message):
            check_latents(dataset, *arguments)
    dataset.about["mirrored"] = False
    with pytest.raises(ValueError, match="encode with --flip"):
        check_latents(dataset, 32, None, True, digests)


def test_digests_follow_the_files_and_not_the_precision(components, tmp_path):
    before = component_digests(components, ["text_encoder"])
    assert set(before) == {"vae", "text_encoder"} and component_digests(tmp_path, ["text_encoder"]) == {"vae": "pixels"}
    copy = shutil.copytree(components, tmp_path / "copy")
    assert component_digests(copy, ["text_encoder"]) == before
    (copy / "tokenizer" / "tokenizer.json").write_text("{}")
    after = component_digests(copy, ["text_encoder"])
    assert after["vae"] == before["vae"] and after["text_encoder"] != before["text_encoder"]


def test_weights_digest_looks_into_attributes():
    class Holder:
        def __init__(self, seed=0, shift=0.0):
            torch.manual_seed(seed)
            self.vae, self.shift, self.device = nn.Linear(2, 2), shift, "cpu"
    digests = {weights_digest(h) for h in (Holder(), Holder(1), Holder(shift=0.5))}
    assert len(digests) == 3 and weights_digest(Holder()) in digests


# ------------------------------------------------------------------------------------------------------------
# The command, and training from what it makes.

def test_the_command(pictures, components, tmp_path, capsys):
    out = tmp_path / "out"
    command = [str(pictures), str(out), "--components", str(components), "--image-size", "32", "--multiple", "16", "--max-aspect", "2"]
    assert main([*command, "--text", "all", "--text-tokens", "text_encoder=2", "--workers", "0", "--dtype", "bf16"]) == 0
    output = capsys.readouterr().out
    assert "50 samples in 3 shards" in output and "3 sizes: 16x64" not in output and "49 latents (bf16) in 3 shards, with embeddings of text_encoder" in output
    assert LatentDataset(out)[0]["text"][0].shape == (2, 16)
    for extra, message in [(["--text", "t5"], "--text t5:"), (["--text", "all", "--text-tokens", "text_encoder=9"], "--text-tokens text_encoder=9"),
                           (["--max-bad", "0"], "made otherwise"), (["--buckets", "30x32"], "multiples of 16")]:
        assert main([*command, *extra]) == 2 and message in capsys.readouterr().err


def test_batches_from_latents_are_those_from_images(components, shards, settings, ranks, tmp_path):
    """Flips included; one of two text encoders is stored, cut at three tokens, and the other one runs."""
    from transformers import CLIPTextConfig, CLIPTextModel

    both = shutil.copytree(components, tmp_path / "both")
    shutil.copytree(both / "tokenizer", both / "tokenizer_2")
    torch.manual_seed(1)
    CLIPTextModel(CLIPTextConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 max_position_embeddings=4, pad_token_id=0, bos_token_id=2, eos_token_id=3)).save_pretrained(both / "text_encoder_2")
    assert main([str(shards), str(tmp_path / "out"), "--components", str(both), "--image-size", "32", "--flip", "--dtype", "fp32",
                 "--text", "text_encoder_2", "--text-tokens", "text_encoder_2=3"]) == 0
    common = dict(model__components=both, data__flip="true", data__workers=0)
    feeds = []
    for change in (dict(data__shards=tmp_path / "out"), dict(data__cache_latents="false"), dict(data__cache_dir=tmp_path / "cache")):
        data = load_config(None, overrides(settings, **common, **change)).data
        feeds.append(Feed(data, both, ranks, 16, patch_size=2, seed=0, run_dir=tmp_path))
        feeds[-1].open(32, print)
    for _ in range(10):
        stored, direct, cached = (feed.next() for feed in feeds)
        for other, tolerance in ((direct, 1e-4), (cached, 1e-2)):             # the cache is fp16
            assert torch.equal(other.positions, stored.positions)
            torch.testing.assert_close(stored.latents, other.latents, rtol=tolerance, atol=tolerance)
            for one, two in zip(stored.text, other.text, strict=True):
                torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
        assert [t.shape for t in stored.text] == [(16, 4, 16), (16, 4, 8)] and not torch.equal(stored.latents[0], stored.latents[1])


def test_two_ranks_train_from_bucketed_latents_and_resume_bit_equal(encode, settings, tmp_path):
    latents, broken, straight = encode("made", dtype="fp16"), tmp_path / "run", tmp_path / "straight"
    common = dict(data__shards=latents, data__flip="true", data__workers=0, train__images=256, sample__every=0, sample__size="32x16")
    unbroken = BareRanks(*overrides(settings, **common, train__run_dir=straight), log=tmp_path / "unbroken")
    run = BareRanks(*overrides(settings, **common), log=tmp_path / "killed")
    assert wait_for((broken / "checkpoints" / "latest").exists, run), run.output
    run.signal(signal.SIGKILL)
    run.wait()
    assert not (broken / "model").exists(), "killed too late"
    resumed = BareRanks("--resume", *overrides(settings, **common), log=tmp_path / "resumed")
    assert resumed.wait() == [0, 0], resumed.output
    assert unbroken.wait() == [0, 0], unbroken.output
    assert resumed_at(resumed.output) >= 64
    assert "49 latents (fp16, mirrored ones too) in 3 shards, with embeddings of text_encoder; 1 bad samples were left out" in unbroken.output
    assert "3 sizes: 16x32 (" in unbroken.output
    assert_same_checkpoint(straight / "checkpoints" / "step-000000256", broken / "checkpoints" / "step-000000256")
