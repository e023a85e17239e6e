"""Which sampler makes the best pictures in few steps?  Proximal plans against score samplers, every one at its best settings.

    python benchmarks/few_step.py [--config benchmarks/few_step.yaml] [key=value ...]

1. Trains the two score networks that are not given: the run of the proximal network (backbone, data order, images) with another
   objective; one on all times, as usual, one on the noise levels of the proximal pairs alone.
2. Chooses for every sampler and step count the time grid, then guidance, that give the smallest Fréchet distance on `search_prompts` pictures.
3. Draws `prompts` pictures with each of `seeds` other seeds, and prints for every sampler and step count
     FD         Fréchet distance to real pictures after the VAE, which all samplers share (search uses this one)
     FD raw     Fréchet distance to the real pictures themselves: also what the VAE loses, so a picture clearer than life is rewarded
     accuracy   share of what the prompt asks for that is right
     diversity  variance among the pictures of one prompt, relative to real pictures of that prompt (1 = as varied)
   with 95 % bootstrap intervals over the seeds, as table.md, results.json and few_step.png; `grids/` shows pictures.

Everything drawn is kept under `out`, so an interrupted run goes on where it was, and new samplers can be added to an old table.
"""

import argparse
import hashlib
import io
import itertools
import json
import multiprocessing
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from few_step_measure import clip_measure, portraits_measure
from few_step_report import write_report
from few_step_samplers import SAMPLERS, draw, query_times

from proxt2i.data.index import write_atomically
from proxt2i.models.files import weights_digest
from proxt2i.diffusion import VPSchedule, guidance_scales, guided
from proxt2i.embedded import SHIPPED_MODEL
from proxt2i.embedded.judge import diversity, frechet_distance
from proxt2i.images import grid, save_png, to_uint8
from proxt2i.models.bundle import load_bundle

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    """Meaning and defaults: few_step.yaml."""

    prox: str | None
    score: str | None
    pairs: str | None
    train: list[str]
    train_pairs: list[str]
    shards: str | None
    clip: str | None
    out: str
    nfe: list[int]
    search_nfe: list[int]
    guidance: list[float]
    guidance_below: list[float]
    search_prompts: int
    prompts: int
    seeds: int
    processes: int
    batch_size: int
    device: str
    samplers: list[str] = field(default_factory=lambda: list(SAMPLERS))


@dataclass(frozen=True)
class Cell:
    """One sampler with one choice of settings on the first `prompts` prompts; picture i has noise seed `seed * 1e6 + i`."""

    sampler: str
    nfe: int
    grid: str
    scale: float
    below: float
    prompts: int
    seed: int


def network(sampler: str) -> str:
    """prox, score or pairs: the weights that the sampler runs on."""
    return SAMPLERS[sampler].network.split()[0]


def networks(config: Config) -> set[str]:
    return {network(name) for name in config.samplers}


# ---- drawing one cell, in a worker process ---------------------------------------------------------------------------

_worker = None


class Worker:
    def __init__(self, config: Config):
        torch.set_num_threads(1 if config.device == "cpu" else torch.get_num_threads())
        self.config, self.out = config, Path(config.out)
        folders = {"prox": config.prox or SHIPPED_MODEL, "score": config.score, "pairs": config.pairs}
        self.bundles = {name: load_bundle(folders[name], config.device) for name in networks(config) | {"prox"}}
        bundle = self.bundles["prox"]
        if config.shards:
            size = bundle.uvit.config.sample_size * bundle.codec.factor
            self.measure = clip_measure(config.shards, config.clip, config.prompts, bundle.codec, size)
        else:
            self.measure = portraits_measure(config.prompts, bundle.codec)
        self.schedule = VPSchedule(bundle.settings.beta_min, bundle.settings.beta_max)
        self.text, self.null = bundle.text(self.measure.captions), bundle.text([""])
        self.digests = {name: weights_digest(b.uvit)[:12] for name, b in self.bundles.items()}

    def path(self, cell: Cell) -> Path:
        """Where the cell is kept: its settings and its network decide the name."""
        about = {**asdict(cell), "network": self.digests[network(cell.sampler)], "measure": [self.config.shards, self.config.clip]}
        return self.out / "cells" / f"{cell.sampler.replace(' ', '-')}-{cell.nfe}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.npz"

    @torch.no_grad()
    def __call__(self, cell: Cell) -> None:
        sampler, bundle = SAMPLERS[cell.sampler], self.bundles[network(cell.sampler)]
        scales = guidance_scales(query_times(sampler, cell.nfe, cell.grid, self.schedule), cell.scale, cell.below)
        shape = (bundle.uvit.config.in_channels, *[bundle.uvit.config.sample_size] * 2)
        features, right = [], []
        for chosen in torch.arange(cell.prompts).split(self.config.batch_size):
            eps_fn = guided(bundle.uvit, [e[chosen] for e in self.text], self.null)
            seeds = (cell.seed * 1_000_000 + chosen).to(self.config.device)
            latents = draw(sampler, eps_fn, cell.nfe, cell.grid, shape, seeds, scales, self.schedule)
            images = to_uint8(bundle.codec.decode(latents)).cpu()
            f, r = self.measure.look(images, chosen.tolist())
            features.append(f)
            right.append(r)
            if cell.seed == 1 and not chosen[0]:
                self._save_grid(cell, images[:32])
        path = self.path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        np.savez(data, features=torch.cat(features).numpy(), right=torch.cat(right).numpy())
        write_atomically(path, data.getvalue())

    def _save_grid(self, cell: Cell, images):
        folder = self.out / "grids"
        folder.mkdir(parents=True, exist_ok=True)
        save_png(grid(images, 8, scale=1), folder / f"{cell.sampler.replace(' ', '-')}-{cell.nfe}.png", asdict(cell))


def _start(config: Config) -> None:
    global _worker
    _worker = Worker(config)


def _draw(cell: Cell) -> None:
    _worker(cell)


# ---- choosing, then measuring ----------------------------------------------------------------------------------------


class Bench:
    def __init__(self, config: Config):
        self.config = config
        self.here = Worker(config)  # for references and file names; the pictures are drawn by the others
        self.pool = multiprocessing.get_context("spawn").Pool(config.processes, _start, (config,))

    def draw(self, cells: list[Cell], about: str) -> None:
        missing = [c for c in dict.fromkeys(cells) if not self.here.path(c).exists()]
        missing.sort(key=lambda c: -c.nfe * c.prompts)
        for _ in tqdm(self.pool.imap_unordered(_draw, missing), desc=about, total=len(missing), unit="cell", disable=not missing):
            pass

    def load(self, cell: Cell) -> tuple[torch.Tensor, torch.Tensor]:
        data = np.load(self.here.path(cell))
        return torch.from_numpy(data["features"]), torch.from_numpy(data["right"])

    def distance(self, cell: Cell, codec: bool = True) -> float:
        measure = self.here.measure
        real = (measure.real_codec if codec else measure.real)[: cell.prompts * measure.copies]
        return frechet_distance(self.load(cell)[0], real)

    def choose(self) -> dict[tuple[str, int], Cell]:
        """The best grid at the second guidance, then the best guidance on that grid, for each (sampler, step count).

        Guidance on some steps only is tried at the largest scale. Step counts without a search take the nearest one's choice.
        """
        config, n = self.config, self.config.search_prompts
        scales = sorted(config.guidance)
        try_scale = scales[min(1, len(scales) - 1)]
        searched = config.search_nfe or config.nfe
        rows = [(SAMPLERS[name], nfe) for name in config.samplers for nfe in searched if nfe >= SAMPLERS[name].min_steps]
        on_grids = {(s.name, nfe): [Cell(s.name, nfe, grid, try_scale, 1.0, n, 0) for grid in s.grids] for s, nfe in rows}
        self.draw(list(itertools.chain(*on_grids.values())), "time grids")
        grids = {key: min(cells, key=self.distance).grid for key, cells in on_grids.items()}
        guidances = {}
        for s, nfe in rows:
            parts = [(scales[-1], below) for below in config.guidance_below if below < 1 and s.guided_parts]
            choices = [(scale, 1.0) for scale in scales] + parts
            guidances[s.name, nfe] = [Cell(s.name, nfe, grids[s.name, nfe], scale, below, n, 0) for scale, below in choices]
        self.draw(list(itertools.chain(*guidances.values())), "guidance")
        best = {key: min(cells, key=self.distance) for key, cells in guidances.items()}
        for name, nfe in itertools.product(config.samplers, config.nfe):
            if nfe >= SAMPLERS[name].min_steps and (name, nfe) not in best:
                near = min((key for key in best if key[0] == name), key=lambda key: abs(key[1] - nfe))
                best[name, nfe] = replace(best[near], nfe=nfe)
        return best

    def measure(self, best: dict[tuple[str, int], Cell]) -> list[dict]:
        """The final figures of the chosen cells, one dict a row."""
        config, finals = self.config, {}
        for key, cell in best.items():
            seeds = config.seeds if SAMPLERS[cell.sampler].contender else min(2, config.seeds)
            finals[key] = [Cell(cell.sampler, cell.nfe, cell.grid, cell.scale, cell.below, config.prompts, 1 + j) for j in range(seeds)]
        self.draw(list(itertools.chain(*finals.values())), "final figures")
        return [self.row(cells) for cells in finals.values()]

    def row(self, cells: list[Cell]) -> dict:
        features, right = zip(*(self.load(c) for c in cells))
        measure = self.here.measure
        groups = len(measure.captions)
        within = diversity(torch.stack(features, 1).flatten(0, 1), groups)  # nan for a single seed
        spread = diversity(measure.real, groups if measure.copies > 1 else 1)  # without copies: among all real pictures
        first = cells[0]
        return {
            "sampler": first.sampler, "network": SAMPLERS[first.sampler].network, "nfe": first.nfe, "grid": first.grid, "guidance": first.scale,
            "guidance_below": first.below, "fd": summary([self.distance(c) for c in cells]),
            "fd_raw": summary([self.distance(c, codec=False) for c in cells]), "accuracy": summary([r.mean().item() for r in right]),
            "all_right": summary([(r == 1).float().mean().item() for r in right]), "diversity": within / spread,
        }  # fmt: skip


def summary(values: list[float]) -> dict:
    """Mean of the seeds and its 95 % bootstrap interval."""
    values = np.array(values)
    means = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": values.mean(), "low": low, "high": high, "values": values.tolist()}


def train(run: Path, overrides: list[str]) -> str:
    """A score network's model folder; trained (or trained on, after an interruption) if it is not there yet."""
    if not (run / "model").is_dir():
        command = ["deepspeed", "proxt2i/train.py", "--deepspeed", "configs/zero2.json", f"train.run_dir={run.resolve()}", *overrides]
        subprocess.run([*command, *["--resume"] * run.is_dir()], cwd=ROOT, check=True)
    return str(run / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file with the settings that differ from few_step.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the config to change")
    args = parser.parse_args()
    files = [Path(__file__).with_name("few_step.yaml"), *([args.config] if args.config else [])]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), *map(OmegaConf.load, files), OmegaConf.from_dotlist(args.settings))
        config: Config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, OSError) as error:
        parser.error(f"{str(error).splitlines()[0]}; the settings are those of benchmarks/few_step.yaml")
    unknown = [name for name in config.samplers if name not in SAMPLERS]
    if unknown or bool(config.shards) != bool(config.clip):
        parser.error(f"unknown samplers {unknown}; valid: {', '.join(SAMPLERS)}" if unknown else "real data needs both shards and clip")
    if config.search_prompts > config.prompts:
        parser.error("search_prompts must not exceed prompts")
    if "score" in networks(config):
        config.score = config.score or train(Path(config.out) / "score-run", config.train)
    if "pairs" in networks(config):
        config.pairs = config.pairs or train(Path(config.out) / "pairs-run", config.train_pairs)
    try:
        bench = Bench(config)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    best = bench.choose()
    write_report(bench.measure(best), asdict(config), Path(config.out))


if __name__ == "__main__":
    main()
