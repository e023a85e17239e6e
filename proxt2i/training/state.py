"""What a run must remember, as safetensors: each rank writes the pieces that it owns, any number of ranks reads them back.

A rank's file holds, for every piece of a parameter, the tensors weight/NAME and ema/NAME and the optimizer's momentum_buffer/NAME
or exp_avg/NAME and exp_avg_sq/NAME, all float32 [stop - start] of the flattened parameter, and in its metadata the ranges and the
optimizer's step count. Nothing depends on the number of ranks or the stage of ZeRO that wrote it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from proxt2i.training.ema import EMA
from proxt2i.training.partition import Partition

WEIGHT, AVERAGE = "weight", "ema"


def write_rank(folder: Path, partition: Partition, ema: EMA, optimizer: torch.optim.Optimizer) -> Path:
    """Write this rank's file to `folder`; returns it. OSError or SafetensorError when the disk does not take it."""
    states = [optimizer.state[flat] for flat in partition.flat]
    steps = {int(state["step"]) for state in states if "step" in state}
    tensors = {}
    for piece in partition.own:
        kinds = {WEIGHT: partition.flat, AVERAGE: ema.averages}
        kinds |= {kind: [s.get(kind) for s in states] for kind in states[piece.partition] if kind != "step"}
        for kind, flat in kinds.items():
            tensors[f"{kind}/{piece.name}"] = piece.of(flat).detach().to("cpu", copy=True)
    about = {"ranges": {piece.name: [piece.start, piece.stop] for piece in partition.own}, "step": max(steps, default=0)}
    path = folder / f"rank-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
    save_file(tensors, path, metadata={"about": json.dumps(about)})
    return path


class SavedState:
    """The files of all ranks in one checkpoint folder. ValueError when they are not complete or not readable."""

    def __init__(self, folder: Path):
        self.folder = folder
        paths = sorted(folder.glob("rank-*-of-*.safetensors"))
        if not paths or len(paths) != int(paths[0].stem.split("-")[-1]):
            raise ValueError(f"{folder} holds {len(paths)} rank-*.safetensors files: not a complete checkpoint")
        self._pieces: dict[str, dict[str, list]] = {}  # name -> kind -> [(start, stop, file)]
        self.step = 0
        for path in paths:
            try:
                file = safe_open(path, "pt")
                about = json.loads(file.metadata()["about"])
                for key in file.keys():
                    kind, name = key.split("/", 1)
                    self._pieces.setdefault(name, {}).setdefault(kind, []).append((*about["ranges"][name], file))
                self.step = max(self.step, about["step"])
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} cannot be read as a rank's state ({type(error).__name__}: {error})") from None

    def sizes(self) -> dict[str, int]:
        """Number of values of every parameter."""
        return {name: max(stop for _, stop, _ in kinds[WEIGHT]) for name, kinds in self._pieces.items()}

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Values start ... stop of the flattened tensor: float32 [stop - start]. ValueError when some are missing."""
        values, found = torch.empty(stop - start), 0
        for first, last, file in self._pieces.get(name, {}).get(kind, []):
            low, high = max(first, start), min(last, stop)
            if low < high:
                values[low - start:high - start] = file.get_slice(f"{kind}/{name}")[low - first:high - first]
                found += high - low
        if found != stop - start:
            raise ValueError(f"{self.folder}: {kind} of {name} has {found} of the values {start} to {stop}")
        return values

    @torch.no_grad()
    def load_weights(self, module: nn.Module, kind: str = WEIGHT, trained: bool = False) -> None:
        """Fill the parameters of `module`, or only those that are trained. ValueError when they are not the ones that were saved."""
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad or not trained}
        sizes, wanted = self.sizes(), {name: p.numel() for name, p in parameters.items()}
        if sizes != wanted:
            different = sorted(name for name in sizes.keys() | wanted.keys() if sizes.get(name) != wanted.get(name))
            raise ValueError(f"the weights in {self.folder} do not fit the model: {', '.join(different[:3])} differ")
        for name, parameter in parameters.items():
            parameter.copy_(self.read(kind, name, 0, parameter.numel()).view(parameter.shape))

    @torch.no_grad()
    def load_training(self, partition: Partition, ema: EMA, optimizer: torch.optim.Optimizer) -> None:
        """Fill this rank's averaged weights and optimizer state. ValueError when another kind of optimizer wrote it."""
        for piece in partition.own:
            piece.of(ema.averages).copy_(self.read(AVERAGE, piece.name, piece.start, piece.stop))
        for number, flat in enumerate(partition.flat):
            is_muon = "momentum" in optimizer.param_groups[partition.groups[number]]
            wanted = {"momentum_buffer"} if is_muon else {"exp_avg", "exp_avg_sq"}
            kinds = {kind for name in partition.names[number] for kind in self._pieces.get(name, {})} - {WEIGHT, AVERAGE}
            if kinds and kinds != wanted:
                raise ValueError(f"{self.folder}: its optimizer kept {', '.join(sorted(kinds))} where this run's keeps {', '.join(sorted(wanted))}: "
                                 "optim.name must be that of the run which wrote it")
            state = {kind: torch.zeros_like(flat) for kind in sorted(kinds)}
            for piece in partition.own:
                if piece.partition == number:
                    for kind, values in state.items():
                        values[piece.place] = self.read(kind, piece.name, piece.start, piece.stop)
            if kinds and not is_muon:
                state["step"] = torch.tensor(float(self.step), device=flat.device)
            optimizer.state[flat] = state
