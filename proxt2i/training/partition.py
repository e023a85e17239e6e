"""Which values of which parameters a rank owns under ZeRO: one description for all its stages.

ZeRO-1 and -2 lay the parameters of a group end to end and cut the result into equal slices, one a rank. ZeRO-3 cuts every
parameter by itself and lays a rank's cuts end to end. Either way a rank owns a few flat fp32 tensors, the *partitions*,
made of pieces of parameters and padding. Optimizer state and averaged weights have the same layout. Whatever is to outlive
a run, or to pass between ranks, is named by (parameter, range of its flattened values): that means the same on any number of
ranks and in any stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Values `start` ... `stop` of the flattened parameter `name`, which begin at `offset` in flat tensor number `partition`."""

    name: str
    start: int
    stop: int
    partition: int
    offset: int

    @property
    def place(self) -> slice:
        """Where it lies in that flat tensor."""
        return slice(self.offset, self.offset + self.stop - self.start)

    def of(self, flat: list[Tensor]) -> Tensor:
        """This piece of a rank's flat tensors: a view [stop - start]."""
        return flat[self.partition][self.place]


class Partition:
    """This rank's share of the engine's parameters.

    flat: this rank's fp32 partitions, which the optimizer updates (the engine's own tensors).
    groups: the optimizer's parameter group of each. names: of the parameters in each, on all ranks together.
    pieces[rank]: what each rank owns. shapes: of every parameter, by name.
    """

    def __init__(self, engine):
        names = {id(p): name.removeprefix("module.") for name, p in engine.module.named_parameters()}
        zero, world = engine.optimizer, dist.get_world_size()
        self.device = engine.device
        if engine.zero_optimization_stage() == 3:
            self.flat = list(zero.fp32_partitioned_groups_flat)
            groups, self.groups = zero.fp16_groups, [zero.sub_group_to_group_id[i] for i in range(len(self.flat))]
            self.pieces = [_cut_each(groups, names, rank) for rank in range(world)]
        else:
            self.flat = list(zero.single_partition_of_fp32_groups)
            groups, self.groups = zero.round_robin_bit16_groups, list(range(len(self.flat)))
            self.pieces = [_cut_whole(groups, names, zero.round_robin_bit16_offsets, self.flat, rank) for rank in range(world)]
        self.names = [[names[id(p)] for p in group] for group in groups]
        self.shapes = {names[id(p)]: torch.Size(getattr(p, "ds_shape", p.shape)) for group in groups for p in group}

    @property
    def own(self) -> list[Piece]:
        return self.pieces[dist.get_rank()]

    def gather(self, flat: list[Tensor]) -> dict[str, Tensor] | None:
        """Whole tensors by parameter name, on the CPU, from every rank's `flat` (laid out as self.flat). Collective.

        Rank 0 gets them, the others None. One partition at a time passes through the device's memory.
        """
        world, first = dist.get_world_size(), dist.get_rank() == 0
        whole = {name: torch.empty(shape.numel()) for name, shape in self.shapes.items()} if first else None
        for number, part in enumerate(flat):
            part = part.detach().to(self.device).contiguous()  # offloaded ones too: the ranks may only speak from device to device
            parts = [torch.empty_like(part) for _ in range(world)] if first else None
            dist.gather(part, parts, dst=0)
            for rank in range(world if first else 0):
                for piece in self.pieces[rank]:
                    if piece.partition == number:
                        whole[piece.name][piece.start:piece.stop] = parts[rank][piece.place]
        return whole and {name: values.view(self.shapes[name]) for name, values in whole.items()}


def _cut_whole(groups, names, offsets, flat: list[Tensor], rank: int) -> list[Piece]:
    """ZeRO-1 and -2: rank's slice is [rank * size, (rank + 1) * size) of its group's parameters laid end to end."""
    pieces = []
    for number, group in enumerate(groups):
        size = flat[number].numel()
        first = rank * size
        for parameter, offset in zip(group, offsets[number]):
            start, stop = max(first, offset) - offset, min(first + size, offset + parameter.numel()) - offset
            if start < stop:
                pieces.append(Piece(names[id(parameter)], start, stop, number, offset + start - first))
    return pieces


def _cut_each(groups, names, rank: int) -> list[Piece]:
    """ZeRO-3: rank's part of a parameter is [rank * size, (rank + 1) * size) of it, and those follow each other."""
    pieces = []
    for number, group in enumerate(groups):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            start, stop = rank * size, min((rank + 1) * size, parameter.ds_numel)
            if start < stop:
                pieces.append(Piece(names[id(parameter)], start, stop, number, offset))
            offset += size
    return pieces
