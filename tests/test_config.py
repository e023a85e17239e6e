"""The typed configuration: layering, and errors that say which key, where, and what to write instead."""

from pathlib import Path

import pytest

from proxt2i.config import Config, field_names, load_config, to_yaml

PINNED = ["train.batch_size=128", "train.images=500000", "diffusion.step_counts=[4,5,6,8,10,20]"]  # defaults get tuned
CONFIGS = Path(__file__).parent.parent / "configs"


def test_layers_override_each_other(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optim:\n  lr: 3.0e-4\n  weight_decay: 0.1\ndata: {workers: 5}\n")
    config = load_config(file, [*PINNED, "optim.lr=1e-3", "sample.prompts=[a man,a woman with red hair]", "train.micro_batch=32"])
    assert config.optim.lr == 1e-3  # the command line wins over the file
    assert config.optim.weight_decay == 0.1 and config.data.workers == 5  # the file wins over the defaults
    assert config.optim.warmup_images == Config().optim.warmup_images
    assert config.sample.prompts == ["a man", "a woman with red hair"] and config.train.micro_batch == 32


def test_resolved_config_round_trips(tmp_path):
    config = load_config(overrides=["model.preset=H", "diffusion.step_counts=[4,8]", "diffusion.step_weights=[1,2.5]"])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved) == config


def test_portraits_file_is_the_default():
    assert load_config(CONFIGS / "portraits.yaml") == Config()


BELOW = {"uvit_h_512": ["uvit_h_256"], "uvit_h_256_score": ["uvit_h_256"], "uvit_h_512_score": ["uvit_h_256", "uvit_h_512"]}  # the stages under it


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith(("grpo", "site", "curation"))))
def test_every_shipped_config_of_training_is_valid(name, tmp_path):
    files = [CONFIGS / f"{stage}.yaml" for stage in [*BELOW.get(name, []), name]]
    overrides = [f"model.init_from={tmp_path}"] if "512" in name else []
    config = load_config(files, [f"data.shards={tmp_path}", *overrides], world_size=2)
    assert config.train.run_dir.endswith(name) and (config.diffusion.objective == "score") == name.endswith("score")
    assert config.data.image_size == {"2": 256, "5": 512}.get(name.removeprefix("uvit_h_")[0], 64)


def test_score_twins_differ_in_the_objective_alone(tmp_path):
    """Else a comparison of the two would compare something else."""
    stages = [CONFIGS / "uvit_h_256.yaml", CONFIGS / "uvit_h_512.yaml"]
    overrides = [f"data.shards={tmp_path}", f"model.init_from={tmp_path}", "train.run_dir=same"]
    prox, score = (load_config(files, [*overrides, *more]) for files, more in (
        (stages, ["diffusion.objective=score"]), ([*stages, CONFIGS / "uvit_h_512_score.yaml"], [])))
    assert prox == score


def test_every_field_is_explained():
    source = (Path(__file__).parent.parent / "proxt2i" / "config.py").read_text()
    for name in field_names():
        lines = [line for line in source.splitlines() if line.startswith(f"    {name.split('.')[1]}: ")]
        assert lines and ("#" in lines[0] or lines[0].endswith("[")), name


@pytest.mark.parametrize("override, parts", [
    ("optim.lrr=1", ["unknown key optim.lrr", "did you mean optim.lr?"]),
    ("optm.lr=1", ["unknown key optm.lr", "did you mean optim.lr?"]),
    ("data.batch_size=8", ["unknown key data.batch_size", "train.batch_size"]),
    ("nonsense.zzzzqqq=1", ["unknown key nonsense.zzzzqqq", "valid:", "optim.lr"]),
    ("lr=1", ["section.key=value"]),
    ("optim.lr", ["section.key=value"]),
    ("optim.lr=fast", ["optim.lr must be float", "'fast'"]),
    ("train.batch_size=1.5", ["train.batch_size must be int", "1.5"]),
    ("train.batch_size=null", ["train.batch_size must be int"]),
    ("data.cache_latents=maybe", ["data.cache_latents must be bool", "'maybe'"]),
    ("sample.prompts=3", ["sample.prompts must be List[str]"]),
    ("sample.prompts=[a, [b", ["cannot read the value"]),
    ("optim.lr=-1", ["optim.lr must be positive"]),
    ("optim.lr=nan", ["optim.lr must be positive"]),
    ("diffusion.caption_dropout=1.5", ["diffusion.caption_dropout must lie in [0, 1]"]),
    ("diffusion.objective=proxx", ["diffusion.objective must be one of prox, score"]),
    ("diffusion.plan=backward", ["diffusion.plan", "step_counts=4", "10"]),
    ("diffusion.step_weights=[1,2]", ["diffusion.step_weights", "6"]),
    ("sample.plan=hybird", ["sample.plan", "'hybrid'"]),
    ("sample.prompts=[]", ["sample.prompts"]),
    ("train.micro_batch=48", ["train.micro_batch (48)", "64"]),
    ("optim.betas=[0.9]", ["optim.betas"]),
    ("model.init_from=/no/such/folder", ["model.init_from", "/no/such/folder", "proxt2i.export"]),
    ("data.shards=/no/such/folder", ["data.shards", "/no/such/folder", "does not exist"]),
    ("model.components=/no/such/folder", ["model.components", "/no/such/folder"]),
    ("data.buckets=[64x64,48]", ["data.buckets", "'48'", "HEIGHTxWIDTH"]),
    ("data.max_aspect=0.5", ["data.max_aspect", "0.5"]),
    ("sample.size=big", ["sample.size", "'big'"]),
    ("optim.warmup_images=500000", ["optim.warmup_images", "train.images"]),
])
def test_bad_override_is_named(override, parts):
    with pytest.raises(ValueError) as error:
        load_config(overrides=[*PINNED, override], world_size=2)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("text, parts", [
    ("optim:\n  lrr: 1\n", ["unknown key optim.lrr", "did you mean optim.lr?"]),
    ("optimm:\n  lr: 1\n", ["unknown key optimm", "did you mean optim?"]),
    ("optim:\n  lr: [1]\n", ["optim.lr must be float"]),
    ("optim: 3\n", ["section optim"]),
    ("- optim\n", ["sections"]),
    ("optim: {lr: [}\n", ["not valid YAML"]),
])
def test_bad_file_is_named(text, parts, tmp_path):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        load_config(file)
    for part in [str(file), *parts]:
        assert part in str(error.value)


def test_missing_file_is_named():
    with pytest.raises(ValueError, match="/no/such.yaml does not exist"):
        load_config("/no/such.yaml")


def test_batch_must_divide_over_the_ranks():
    load_config(overrides=["train.batch_size=129"], world_size=3)
    with pytest.raises(ValueError, match=r"train.batch_size \(129\) must be divisible .* ranks \(2\); the nearest is 128"):
        load_config(overrides=["train.batch_size=129"], world_size=2)
