"""Evaluation with prompts: the files it reads, what it writes, what it goes on from after a kill, and what it refuses."""

import csv
import hashlib
import json
import os
import shutil
import signal
import sys
import tarfile

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from runs import BareRanks, become_rank, wait_for

from proxt2i import evaluate
from proxt2i.embedded import ASSETS, SHIPPED_MODEL
from proxt2i.embedded.judge import Judge, frechet_distance
from proxt2i.evaluation import draw, frechet, results, statistics
from proxt2i.evaluation.features import features_of, reference_of
from proxt2i.evaluation.prompts import read_prompts
from proxt2i.evaluation.work import labels
from proxt2i.images import save_png, to_pil
from proxt2i.models.bundle import Bundle, Settings, load_bundle, load_components, save_bundle
from proxt2i.models.uvit import UViT2DModel
from proxt2i.pipeline import generate
from proxt2i.rewards import RewardSettings, load_reward, score

PROMPTS = [
    {"prompt": "a smiling woman with long red hair and glasses", "category": "women", "seed": 11},
    {"prompt": "a man with a beanie", "category": "men", "negative_prompt": "glasses"},
    {"prompt": "a lady with a brimmed hat", "category": "women"},
    {"prompt": "a serious man with short black hair", "category": "men"},
    {"prompt": "a surprised lady with blond hair in a bun", "category": "women"},
]
REWARDS = ["--rewards", "pickscore,portraits", "--set", "pickscore.path=portraits"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    return path


@pytest.fixture(scope="module")
def squares_model(components, tmp_path_factory):
    """A model folder of its own text encoder, of 4 tokens, and VAE: 32-pixel pictures that show nothing."""
    torch.manual_seed(0)
    uvit = UViT2DModel(sample_size=4, in_channels=2, patch_size=2, embed_dim=16, depth=1, num_heads=2, text_dims=[16], text_lengths=[4])
    text, codec = load_components(components)
    path = tmp_path_factory.mktemp("squares") / "run" / "model"
    save_bundle(path, Bundle(uvit, text, codec, Settings(), components))
    return path


def arguments(prompts_file, out, *more):
    return ["--prompts", str(prompts_file), "--out", str(out), "--batch-size", "2", "--steps", "2,3", "--guidance", "2", "--latency-runs", "0", *map(str, more)]


@pytest.fixture(scope="module")
def evaluated(prompts_file, tmp_path_factory):
    """A whole evaluation in one process, undisturbed, with times."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    torch.set_num_threads(1)
    assert evaluate.main([*arguments(prompts_file, out, *REWARDS), "--latency-runs", "1"]) == 0
    return out


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -- prompt files -----------------------------------------------------------------------------------------------------


def test_one_prompt_a_line_jsonl_csv_and_tsv(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa red car\n\n  a blue car \n", encoding="utf-8")
    found = read_prompts(tmp_path / "a.txt")
    assert [(p.text, p.where, p.seed) for p in found.prompts] == [("a red car", "line 1", None), ("a blue car", "line 3", None)]
    (tmp_path / "a.csv").write_text('Prompt,Seed,Negative Prompt,Category,id\n"a car, red",5,snow,cars,x1\na tree,,,,x2\n')
    (tmp_path / "a.tsv").write_text("prompt\tseed\tnegative_prompt\tcategory\na car, red\t5\tsnow\tcars\na tree\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a car, red", "seed": 5, "negative_prompt": "snow", "category": "cars"}\n\n{"prompt": "a tree"}\n')
    of_csv, of_tsv, of_jsonl = (read_prompts(tmp_path / f"a.{kind}") for kind in ("csv", "tsv", "jsonl"))
    assert of_csv.digest() == of_tsv.digest() == of_jsonl.digest() and of_csv.ignored == ("id",) and of_csv.sha256 != of_tsv.sha256
    assert [(p.text, p.seed, p.negative, p.category) for p in of_csv.prompts] == [("a car, red", 5, "snow", "cars"), ("a tree", None, "", None)]
    assert [(p.prompt, p.image, p.seed) for p in of_csv.pictures(100, 2)] == [(0, 0, 5), (0, 1, 6), (1, 0, 102), (1, 1, 103)]
    assert len(read_prompts(tmp_path / "a.csv", 1).prompts) == 1


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.txt", "\n \n", "holds no prompt"),
    ("a.txt", "a cat\na dog\na cat\n", "line 3 repeats line 1 ('a cat'): remove it, or give both a seed"),
    ("a.jsonl", '{"prompt": "a cat", "seed": 1}\n{"prompt": "a cat", "seed": 1}\n', "line 2 repeats line 1 ('a cat') with the same seed 1"),
    ("a.jsonl", '{"prompt": "a cat"}\n{"prompt": \n', "line 2 is not valid JSON"),
    ("a.jsonl", '{"prompt": "a cat", "sed": 1}\n', "unknown field sed; did you mean seed?"),
    ("a.jsonl", '{"prompt": "a cat", "seed": 1.5}\n', "seed must be a whole number, got 1.5"),
    ("a.jsonl", '{"text": "a cat"}\n', "line 1 has no prompt"),
    ("a.csv", "text,seed\na cat,1\n", "it names: text, seed"),
    ("a.csv", "prompt,seed\na cat, black,1\n", "more fields than the header"),
    ("a.csv", "prompt,seed\na cat,one\n", "line 2: seed must be a whole number, got 'one'"),
    ("a.txt", b"\xff\xfe", "not UTF-8"),
])  # fmt: skip
def test_wrong_prompt_files_are_named(tmp_path, name, text, message, capsys):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert evaluate.main(["--prompts", str(tmp_path / name), "--reward", "jpeg_compressibility", "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_same_prompt_with_seeds_of_its_own_is_one_prompt_to_the_statistics(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "{text}", "seed": {seed}}}\n' for text, seed in (("x", 1), ("x", 2), ("y", 1))))
    assert len(read_prompts(tmp_path / "a.jsonl").pictures(0, 1)) == 3
    assert statistics.numbered(["x", "x", "y"]).tolist() == [0, 0, 1]
    assert statistics.group_means(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 1])).tolist() == [2.0, 5.0]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "message"), [
    (["--rewards", "pikscore"], "unknown reward 'pikscore'; did you mean pickscore?"),
    (["--rewards", "hpsv2"], "hpsv2: "),
    (["--rewards", "missing.yaml"], "missing.yaml is not a readable YAML file"),
    (["--reward", "pickscore", "--set", "pickscor.path=portraits"], "with a NAME of --reward (pickscore)"),
    ([], "nothing to measure"),
    (["--rewards", "jpeg_compressibility", "--plan", "backward"], "smallest valid num_steps"),
    (["--rewards", "jpeg_compressibility", "--steps", "0"], "num_steps=0"),
    (["--rewards", "jpeg_compressibility", "--steps", "4,4"], "relaxed-steps4-guidance2 is asked for 2 times"),
    (["--rewards", "jpeg_compressibility", "--guidance", "-1"], "guidance_scale=-1"),
    (["--rewards", "jpeg_compressibility", "--size", "60x60"], "must be multiples of 16 pixels"),
    (["--rewards", "jpeg_compressibility", "--model", "nowhere"], "nowhere does not exist"),
    (["--rewards", "jpeg_compressibility", "--batch-size", "0"], "--batch-size 0"),
    (["--rewards", "jpeg_compressibility", "--num-prompts", "0"], "--num-prompts 0"),
    (["--fd-model", "nowhere"], "--fd-model needs --reference"),
    (["--reference", "nowhere"], "--reference nowhere: no such folder"),
    (["--reference", str(ASSETS / "judge")], "holds 0 pictures"),
    (["--reference", str(ASSETS), "--fd-model", "nowhere"], "--fd-model nowhere: no such folder"),
    (["--reference", str(ASSETS), "--fd-model", str(ASSETS)], "holds no config.json"),
    (["--rewards", "jpeg_compressibility", "--prompts", "nothing.txt"], "nothing.txt: no such file"),
])  # fmt: skip
def test_wrong_input_is_named_before_anything_is_drawn(prompts_file, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.setenv("PROXT2I_REWARDS", str(tmp_path / "rewards"))
    assert evaluate.main(arguments(prompts_file, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("proxt2i.evaluate: error:") and message in error
    assert not (tmp_path / "out").exists()


def test_long_prompts_are_refused_with_what_the_model_would_not_hear(squares_model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a red square\na blue square a red square\n")
    asked = ["--model", str(squares_model), "--prompts", str(tmp_path / "a.txt"), "--reward", "jpeg_compressibility", "--steps", "2", "--out", str(tmp_path / "out"), "--latency-runs", "0"]
    assert evaluate.main(asked) == 2
    error = capsys.readouterr().err
    assert "1 prompt(s) are longer than run can hear" in error and "line 2: 'a blue square a red square': not heard: " in error and "red" in error.split("not heard: ")[1]
    assert not (tmp_path / "out").exists()
    assert evaluate.main([*asked, "--cut-long"]) == 0


def test_without_prompts_only_a_portraits_model_is_measured(squares_model, evaluated, tmp_path, capsys):
    assert evaluate.main(["--model", str(squares_model), "--out", str(tmp_path)]) == 2
    assert "another text encoder than theirs" in capsys.readouterr().err
    assert evaluate.main(["--rewards", "pickscore", "--out", str(tmp_path)]) == 2
    assert "need --prompts FILE" in capsys.readouterr().err
    assert evaluate.main(["--out", str(evaluated)]) == 2
    assert "holds an evaluation with prompts" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("a red square\n")
    assert evaluate.main(["--reference", str(tmp_path), "--model", str(squares_model), "--prompts", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "--reference needs --fd-model" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "message"), [
    (["--seed", "1"], "seed: 0 there, 1 here"),
    (["--batch-size", "4"], "batch_size: 2 there, 4 here"),
    (["--num-prompts", "3"], "prompts: 5 of prompts.jsonl"),
    (["--dtype", "bf16"], "dtype: fp32 there, bf16 here"),
    (["--reward", "pickscore", "--set", "pickscore.path=portraits", "--set", "pickscore.dtype=bf16"], "reward pickscore: "),
])  # fmt: skip
def test_a_folder_that_holds_another_evaluation_is_refused(evaluated, prompts_file, capsys, more, message):
    before = {path: path.stat().st_mtime_ns for path in evaluated.rglob("*")}
    assert evaluate.main(arguments(prompts_file, evaluated, *([] if "--reward" in more else REWARDS), *more)) == 2
    error = capsys.readouterr().err
    assert "holds another evaluation" in error and message in error and "Choose another --out, or delete that folder" in error
    assert {path: path.stat().st_mtime_ns for path in evaluated.rglob("*")} == before


def test_a_folder_of_something_else_is_refused(prompts_file, tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert evaluate.main(arguments(prompts_file, tmp_path, *REWARDS)) == 2
    assert "is not empty, and holds no evaluation" in capsys.readouterr().err


# -- what is written --------------------------------------------------------------------------------------------------


def test_the_table_has_the_scores_of_the_pictures_that_generate_draws(evaluated):
    rows = rows_of(evaluated / "per_prompt.csv")
    assert len(rows) == 10 and [row["sampler"] for row in rows[::5]] == ["relaxed-steps2-guidance2", "relaxed-steps3-guidance2"]
    mine = [row for row in rows if row["steps"] == "3"]
    assert [int(row["seed"]) for row in mine] == [11, 1, 2, 3, 4] and [row["category"] for row in mine] == [p["category"] for p in PROMPTS]
    chosen = [0, 2, 3, 4]  # those without a negative prompt, which `generate` does not take
    prompts = [PROMPTS[i]["prompt"] for i in chosen]
    images = generate(load_bundle(SHIPPED_MODEL), prompts, [int(mine[i]["seed"]) for i in chosen], num_steps=3, guidance_scale=2.0)
    expected = score([load_reward(RewardSettings("pickscore", path="portraits")), load_reward(RewardSettings("portraits"))], images.float() / 255, prompts)
    for name, values in expected.items():
        assert [float(mine[i][name]) for i in chosen] == pytest.approx(values.tolist(), abs=0.02)  # batches differ, so pictures do by rounding
    table = pyarrow.parquet.read_table(evaluated / "per_prompt.parquet")
    assert table.num_rows == 10 and table["pickscore"].to_pylist() == pytest.approx([float(row["pickscore"]) for row in rows])
    about = json.loads(table.schema.metadata[b"proxt2i"])
    assert about["prompts"]["number"] == 5 and about["versions"]["torch"] == torch.__version__


def test_means_differences_and_categories_are_those_of_the_table(evaluated):
    rows, found = rows_of(evaluated / "per_prompt.csv"), json.loads((evaluated / "results.json").read_text())
    values = {steps: np.array([float(row["pickscore"]) for row in rows if row["steps"] == str(steps)]) for steps in (2, 3)}
    entry = found["rows"][1]["rewards"]["pickscore"]
    assert entry["mean"] == pytest.approx(values[3].mean()) and entry["low"] < entry["mean"] < entry["high"] and entry["prompts"] == 5
    [difference] = [d for d in found["differences"] if d["reward"] == "pickscore"]
    assert difference["mean"] == pytest.approx((values[3] - values[2]).mean()) and difference["wins"] == ((values[3] > values[2]).mean())
    men = next(c for c in found["categories"] if (c["category"], c["reward"], c["sampler"]) == ("men", "pickscore", "relaxed-steps3-guidance2"))
    assert men["mean"] == pytest.approx(values[3][[1, 3]].mean()) and men["prompts"] == 2
    [summary, _] = rows_of(evaluated / "summary.csv")
    assert float(summary["ms_per_image"]) > 0 and float(summary["peak_memory_mib"]) > 50 and summary["latency_batch"] == "2"
    assert summary["dtype"] == "fp32" and len(summary["model_sha256"]) == 64 and summary["torch"] == torch.__version__ and summary["seed"] == "0"
    assert found["prompts"]["sha256"] == summary["prompts_sha256"] == hashlib.sha256("".join(json.dumps(p) + "\n" for p in PROMPTS).encode()).hexdigest()


def test_the_page_and_the_grid_have_everything_inside(evaluated):
    text = (evaluated / "report.html").read_text()
    assert text.count("<img src=\"data:image/") == 10 and "src=\"http" not in text and "href=" not in text.replace('xlink:href="#', "")
    for part in ("relaxed-steps2-guidance2", "pickscore", "By category", "Differences", "prompts.jsonl, SHA-256", "git commit" if results.git_commit() else "no git", "5 prompts are few"):
        assert part in text
    found = json.loads((evaluated / "results.json").read_text())
    assert text.count('class="clear"') == sum(d["excludes_zero"] for d in found["differences"])
    with Image.open(evaluated / "side_by_side.png") as sheet:
        assert sheet.width > 2 * 128 and sheet.height > 5 * 128
    from proxt2i.report import _evaluations

    (evaluated.parent / "evaluation").symlink_to(evaluated)
    [table] = _evaluations(evaluated.parent)
    assert table["head"][-2:] == ["pickscore", "portraits"] and len(table["rows"]) == 2


def test_pictures_are_kept_as_shards_that_serve_as_a_reference(evaluated, prompts_file, tmp_path):
    folders = sorted((evaluated / "samplers").iterdir())
    assert [sorted(p.name for p in f.glob("*.tar")) for f in folders] == [["00000.tar", "00001.tar", "00002.tar"]] * 2
    reference = reference_of(folders[0], (64, 64), 0)
    images, bad = reference.read(0, 5)
    assert images.shape == (5, 3, 64, 64) and not bad
    for i, image in enumerate(images):
        save_png(to_pil(image), tmp_path / f"{i}.png")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "broken.png").write_bytes(b"no picture")
    files = reference_of(tmp_path, (64, 64), 0)
    again, bad = files.read(0, 6)
    assert torch.equal(again, images) and len(bad) == 1 and bad[0].key == "broken.png"
    out = tmp_path / "out"
    assert evaluate.main(arguments(prompts_file, out, "--reference", folders[0], "--no-images", "--grid", "2")) == 0
    found = json.loads((out / "results.json").read_text())
    row, other = found["rows"]
    assert abs(row["frechet_distance"]) < 1e-3 and row["rewards"] == {}  # the very same pictures
    assert 0 == row["frechet_distance_low"] < row["frechet_distance_high"] and 0 < other["frechet_distance"] < other["frechet_distance_high"]
    [difference] = found["differences"]
    assert difference["mean"] == pytest.approx(other["frechet_distance"] - row["frechet_distance"]) and difference["low"] < difference["mean"] < difference["high"]
    assert rows_of(out / "differences.csv")[0]["wins"] == "" and "frechet_distance" in (out / "report.html").read_text()
    assert sum(len(pictures_in(path)) for path in (out / "samplers").rglob("*.tar")) == 4


def pictures_in(path):
    with tarfile.open(path) as tar:
        return [name for name in tar.getnames() if name.endswith(".png")]


# -- going on ---------------------------------------------------------------------------------------------------------


def test_what_is_added_later_draws_nothing_again(evaluated, prompts_file, tmp_path, monkeypatch):
    out, drawn = tmp_path / "out", []
    shutil.copytree(evaluated, out)
    real = draw.draw
    monkeypatch.setattr(draw, "draw", lambda evaluation, bundle, sampler, pictures: drawn.append(sampler.name) or real(evaluation, bundle, sampler, pictures))
    assert evaluate.main(arguments(prompts_file, out, "--rewards", "pickscore,jpeg_compressibility", "--set", "pickscore.path=portraits")) == 0
    assert drawn == []
    old, new = rows_of(evaluated / "per_prompt.csv"), rows_of(out / "per_prompt.csv")
    assert [row["pickscore"] for row in new] == [row["pickscore"] for row in old] and all(float(row["jpeg_compressibility"]) < 0 for row in new)
    assert evaluate.main(arguments(prompts_file, out, *REWARDS, "--steps", "1,2")) == 0
    assert set(drawn) == {"relaxed-steps1-guidance2"}
    damaged = next((out / "samplers").glob("relaxed-steps2*/00001.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    damaged.with_suffix(".tar").write_bytes(b"")
    drawn.clear()
    assert evaluate.main(arguments(prompts_file, out, *REWARDS)) == 0
    assert drawn == ["relaxed-steps2-guidance2"] and (out / "per_prompt.csv").read_bytes() == (evaluated / "per_prompt.csv").read_bytes()


def run_rank(rank, ranks, port, arguments, log):
    become_rank(rank, ranks, port, log)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(evaluate.main(arguments))


def test_two_ranks_killed_in_the_middle_end_with_the_bytes_of_one_undisturbed(evaluated, prompts_file, tmp_path, monkeypatch):
    out, asked = tmp_path / "out", arguments(prompts_file, tmp_path / "out", *REWARDS)
    ranks = BareRanks(*asked, log=tmp_path / "log", program=run_rank)
    assert wait_for(lambda: any(out.rglob("*.safetensors")), ranks), ranks.output
    ranks.signal(signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL] * 2
    assert not (out / "results.json").exists()
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):  # one after the other: they need not live at the same time
        monkeypatch.setenv("RANK", rank)
        assert evaluate.main(asked) == 0 and (out / "results.json").exists() == (rank == "0")
    assert 1 <= len(done) < 6 and all(path.stat().st_mtime_ns == then for path, then in done.items())
    for name in ("per_prompt.csv", "per_prompt.parquet", "differences.csv", "categories.csv"):
        assert (out / name).read_bytes() == (evaluated / name).read_bytes(), name
    for path in evaluated.rglob("*.tar"):
        assert (out / path.relative_to(evaluated)).read_bytes() == path.read_bytes()


def test_rank_0_says_which_unit_it_waited_for_in_vain(prompts_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate.main(arguments(prompts_file, tmp_path / "out", "--rewards", "jpeg_compressibility", "--wait", "0.1")) == 1
    error = capsys.readouterr().err
    assert "waiting for 3 units of other ranks" in error and "00001 and 2 more units" in error and "goes on from here" in error


def test_pictures_that_are_not_finite_are_an_error(squares_model, tmp_path, capsys):
    shutil.copytree(squares_model, tmp_path / "model")
    bundle = load_bundle(tmp_path / "model")
    next(bundle.uvit.parameters()).data.fill_(torch.nan)
    bundle.uvit.save_pretrained(tmp_path / "model" / "uvit", safe_serialization=True)
    (tmp_path / "a.txt").write_text("a red square\n")
    assert evaluate.main(arguments(tmp_path / "a.txt", tmp_path / "out", "--model", tmp_path / "model", "--reward", "jpeg_compressibility", "--steps", "1")) == 1
    assert "the picture of line 1 (seed 0) is not finite in fp32" in capsys.readouterr().err


# -- several models, portraits ----------------------------------------------------------------------------------------


def test_two_models_on_the_same_prompts(squares_model, tmp_path):
    (tmp_path / "a.txt").write_text("a red square\na blue square\n")
    asked = ["--model", str(squares_model), "--model", str(SHIPPED_MODEL), "--prompts", str(tmp_path / "a.txt"), "--reward", "jpeg_compressibility", "--images-per-prompt", "2", "--steps", "2",
             "--out", str(tmp_path / "out"), "--latency-runs", "0"]  # fmt: skip
    assert evaluate.main(asked) == 0
    rows = rows_of(tmp_path / "out" / "per_prompt.csv")
    assert [(row["model"], row["prompt_number"], row["image"], row["seed"]) for row in rows[:5]] == [
        ("run", "0", "0", "0"), ("run", "0", "1", "1"), ("run", "1", "0", "2"), ("run", "1", "1", "3"), ("portraits", "0", "0", "0")]  # fmt: skip
    [difference] = rows_of(tmp_path / "out" / "differences.csv")
    assert (difference["sampler"], difference["minus"], difference["prompts"]) == ("portraits-relaxed-steps2-guidance1.5", "run-relaxed-steps2-guidance1.5", "2")


def test_models_get_short_names_that_differ(tmp_path):
    assert labels([tmp_path / "a" / "model", tmp_path / "b" / "model"]) == ["a", "b"]
    assert labels([tmp_path / "x" / "a" / "model", tmp_path / "y" / "a" / "model"]) == ["x-a", "y-a"]


def test_portraits_as_prompts_have_the_judges_figures(tmp_path):
    out = tmp_path / "out"
    asked = ["--prompts", "portraits", "--num-prompts", "12", "--steps", "4", "--out", str(out), "--latency-runs", "0", "--batch-size", "12"]
    assert evaluate.main(asked) == 0
    assert evaluate.main(["--num-prompts", "12", "--diversity-prompts", "1", "--steps", "4", "--out", str(tmp_path / "own"), "--batch-size", "12"]) == 0
    [mine] = json.loads((out / "results.json").read_text())["rows"]
    own = json.loads((tmp_path / "own" / "results.json").read_text())["rows"][2]
    assert mine["rewards"]["portraits"]["mean"] == pytest.approx(own["accuracy"], abs=1e-6)
    assert mine["frechet_distance"] == pytest.approx(own["frechet_distance"], rel=1e-3)


# -- statistics -------------------------------------------------------------------------------------------------------


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        values = rng.exponential(size=60)
        low, high = statistics.interval(statistics.bootstrap_means(values[None], 400, seed=trial)[0])
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 300 <= 0.98
    means = statistics.bootstrap_means(np.stack([values, values + 3]))
    assert np.allclose(means[1] - means[0], 3) and np.array_equal(means, statistics.bootstrap_means(np.stack([values, values + 3])))


def test_a_paired_difference_sees_what_the_spread_between_prompts_hides():
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 10, 100)
    a, b = hard + 0.5 + rng.normal(0, 1, 100), hard
    found, one, other = statistics.difference(a, b), statistics.mean_and_interval(a), statistics.mean_and_interval(b)
    assert found["excludes_zero"] and found["low"] > 0 and one["low"] < other["high"] and found["wins"] == (a > b).mean()
    assert statistics.difference(b, b) | {"mean": 0.0} == {"mean": 0.0, "low": 0.0, "high": 0.0, "prompts": 100, "wins": 0.5, "excludes_zero": False}
    assert statistics.mean_and_interval(np.ones(1)) == {"mean": 1.0, "low": None, "high": None, "prompts": 1}


def test_a_distance_without_a_part_is_that_of_the_other_pictures():
    torch.manual_seed(0)
    features, reference = torch.randn(50, 6) + 1, torch.randn(40, 6) * 2
    parts = torch.arange(50) % 7
    expected = [frechet_distance(features[parts != p], reference) for p in range(7)]
    assert frechet.distances_without(features, parts, reference) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="at least 2 pictures outside"):
        frechet.distances_without(features[:2], torch.arange(2), reference)


def test_the_interval_of_a_distance_covers_its_mean_as_often_as_it_says():
    """The mean over draws of as many pictures: with few of them a distance is too high, and no interval of one draw can know by how much."""
    torch.manual_seed(0)
    reference, trials = torch.randn(400, 5), 200
    draws = [torch.randn(120, 5) * 1.2 + 0.2 for _ in range(trials)]
    values = np.array([frechet_distance(draw, reference) for draw in draws])
    groups = np.repeat(np.arange(60), 2)
    parts = torch.from_numpy(frechet.parts_of(groups))
    intervals = [frechet.interval_of(value, frechet.distances_without(draw, parts, reference)) for value, draw in zip(values, draws)]
    covered = np.mean([low <= values.mean() <= high for low, high in intervals])
    assert parts.bincount().tolist() == [6] * 20 and 0.88 <= covered <= 0.99


# -- features ---------------------------------------------------------------------------------------------------------


def write_preprocessor(path, **more):
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], **more}))


def test_dinov2_from_a_folder(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks preprocessor_config.json"):
        features_of(tmp_path).load(torch.device("cpu"))
    write_preprocessor(tmp_path, size={"shortest_edge": 64}, crop_size={"height": 42, "width": 42})
    images = torch.randint(0, 256, (3, 3, 42, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = features_of(tmp_path)
    got = features.load(torch.device("cpu"))(images)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        expected = model(pixel_values=(images / 255 - mean) / std).last_hidden_state[:, 0]
    assert features.name == "dinov2" and got.dtype == torch.float32 and torch.allclose(got, expected, atol=1e-5)
    write_preprocessor(tmp_path, size={"height": 42, "width": 56})
    with pytest.raises(ValueError, match="no square size"):
        features_of(tmp_path).load(torch.device("cpu"))


def test_the_vision_tower_of_a_clip_and_no_text_model(tmp_path):
    from transformers import CLIPTextModel

    features = features_of(ASSETS / "clip")
    shutil.copytree(ASSETS / "clip", tmp_path / "clip")
    write_preprocessor(tmp_path / "clip", size={"shortest_edge": 64})
    got = features_of(tmp_path / "clip").load(torch.device("cpu"))(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert features.name == "clip" and got.ndim == 2 and len(got) == 2
    CLIPTextModel.from_pretrained(ASSETS / "clip").save_pretrained(tmp_path / "text")
    write_preprocessor(tmp_path / "text", size={"shortest_edge": 64})
    with pytest.raises(ValueError, match="takes no pictures"):
        features_of(tmp_path / "text").load(torch.device("cpu"))


def test_the_judge_by_itself_and_as_a_transformers_folder(tmp_path):
    shutil.copytree(ASSETS / "judge", tmp_path / "judge")
    write_preprocessor(tmp_path / "judge", size=64, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own, other = (features_of(path).load(torch.device("cpu"))(images) for path in (None, tmp_path / "judge"))
    assert torch.allclose(own, other, atol=1e-5) and torch.equal(own, Judge()(images)[1])


def test_inception_has_the_features_of_pytorch_fid(tmp_path):
    """The values are those of torchvision 0.28's Inception3 with pytorch-fid's blocks in it, on the same weights and pictures."""
    from proxt2i.evaluation.inception import FidInception

    generator, weights = torch.Generator().manual_seed(0), {}
    for name, tensor in sorted(FidInception().state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue  # the published file has none
        if name.endswith("running_var"):
            weights[name] = torch.rand(tensor.shape, generator=generator) + 0.5
        elif tensor.ndim == 4:
            weights[name] = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
        else:
            weights[name] = torch.randn(tensor.shape, generator=generator) * 0.1 + (1.0 if name.endswith("bn.weight") else 0)
    torch.save(weights, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    images = (torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(1)) * 255).round().to(torch.uint8)
    got = features_of(tmp_path).load(torch.device("cpu"))(images)
    assert got.shape == (2, 2048) and got.sum().item() == pytest.approx(4043.2708, rel=1e-4)
    assert got[0, ::512].tolist() + got[1, 100::700].tolist() == pytest.approx([2.77406, 0.14806, 0.70369, 0.74845, 0.01018, 0.33693, 0.62378], abs=2e-3)
    del weights["Mixed_7c.branch_pool.bn.bias"]
    torch.save(weights, tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    with pytest.raises(ValueError, match="1 missing, first Mixed_7c.branch_pool.bn.bias"):
        features_of(tmp_path).load(torch.device("cpu"))


def test_a_reference_of_other_shapes_is_cut_to_the_size_of_what_is_drawn(tmp_path):
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(((90, 60), (40, 80))):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    images, bad = reference_of(tmp_path, (32, 48), 0).read(0, 2)
    assert images.shape == (2, 3, 32, 48) and not bad
    shipped = reference_of(None, (64, 64), 30)
    assert len(shipped) == 30 and shipped.read(28, 40)[0].shape == (2, 3, 64, 64)
    features = features_of(None).load(torch.device("cpu"))(shipped.read(0, 30)[0])
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-3)
