"""Muon: the momentum of each matrix is made nearly orthogonal, so that a step moves all its directions alike.

For a matrix W [M, N] with gradient G, at each step (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon):

    B = m B + (1 - m) G              the momentum, kept
    O = orthogonal(m B + (1 - m) G)  nearly U V^T, of U S V^T
    W = (1 - lr decay) W - lr 0.2 sqrt(max(M, N)) O

The last factor gives an update the root mean square that AdamW's have (Moonlight, arXiv 2502.16982), so that rates and
decay of AdamW serve as they are. Embedding tables, vectors, convolutions, routers and what lies outside of a layer keep
AdamW.

Orthogonal is a matter of the whole matrix, so each travels: of a round of matrices every rank gets some whole, makes
them orthogonal, and gives each rank the part that it holds. No number depends on how a matrix was split.

Letters of this file: M and N sides of a matrix, B matrices of one shape.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.collectives import all_to_all_rows
from parallel.dtensors import local_part
from parallel.torch_private import global_offset
from train.config import OptimizerConfig

Box = tuple[tuple[int, int], ...]
"""Where a tensor's part begins and ends along each axis of the whole."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""A polynomial's: it brings singular values from 0 to 1 near to 1, small ones fastest (Jordan et al.)."""
_ITERATIONS = 5
_ROUND_NUMBERS = 1 << 26
"""Numbers that a rank gets whole in one round, unless a single matrix has more."""


def is_orthogonalised(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes a parameter: a matrix within a layer, or a stack of experts' matrices, but no router's."""
    if ".layers." not in name or ".router." in name:
        return False
    return parameter.dim() == 2 or (parameter.dim() == 3 and ".experts." in name)


class Matrix(NamedTuple):
    """One matrix of a parameter: its place in the list of parameters, and in the parameter."""

    parameter: int
    box: Box

    @property
    def shape(self) -> tuple[int, int]:
        """M and N."""
        rows, columns = (end - start for start, end in self.box[-2:])
        return rows, columns


class Muon:
    """The step of Muon for some parameters, whose momentum the optimizer that has it keeps and adds.

    `group`: the ranks among which the parameters are sharded, each holding another part; None where all are whole.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        names: Sequence[str],
        config: OptimizerConfig,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.parameters, self.momentum = parameters, config.momentum
        self.group = group = None if group is None or group.size() == 1 else group
        self.rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
        self.device = _device(parameters)
        self.boxes = _boxes_of_all_ranks(parameters, group)
        matrices = [
            Matrix(index, box)
            for index, (name, parameter) in enumerate(zip(names, parameters, strict=True))
            for box in _matrices(name, parameter.shape)
        ]
        matrices.sort(key=lambda matrix: (-math.prod(matrix.shape), matrix.shape))  # alike ones together
        self.rounds = list(_rounds(matrices, ranks))
        """In each the matrices of every rank in turn."""

    def step(self, lr: float, weight_decay: float) -> None:
        """Update the parameters that have a gradient, on every rank of the group the same ones.

        In the gradient's place stands what is to be made orthogonal.
        """
        grads = [None if p.grad is None else local_part(p.grad) for p in self.parameters]
        for matrices in self.rounds:
            owned = [[m for m in of_rank if grads[m.parameter] is not None] for of_rank in matrices]
            held = self.boxes[self.rank]
            mine = [
                (m, _slices(_overlap(m.box, held[m.parameter]), held[m.parameter]))
                for of_rank in owned
                for m in of_rank
            ]
            ours = [grads[m.parameter][at] for m, at in mine]  # type: ignore[index]
            for (m, at), update in zip(mine, self._exchanged(owned, ours), strict=True):
                weight = local_part(self.parameters[m.parameter]).detach()[at]
                weight.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * 0.2 * math.sqrt(max(m.shape)))

    def _exchanged(self, owned: list[list[Matrix]], parts: list[Tensor]) -> list[Tensor]:
        """This rank's parts of matrices, in the order of their owners, made parts of the orthogonal ones."""
        if self.group is None:
            return _orthogonal_of_each(parts)
        first = local_part(self.parameters[0])
        dtype = torch.bfloat16 if self.device == "cuda" else first.dtype
        sizes, here = [part.numel() for part in parts], iter(range(len(parts)))
        sends = [sum(sizes[next(here)] for _ in of_rank) for of_rank in owned]
        shared = [[_overlap(m.box, boxes[m.parameter]) for m in owned[self.rank]] for boxes in self.boxes]
        receives = [sum(map(_numbers, of_rank)) for of_rank in shared]
        places = [
            [_slices(box, m.box)[-2:] for box, m in zip(of_rank, owned[self.rank], strict=True)] for of_rank in shared
        ]
        flat = torch.cat([first.new_empty(0, dtype=dtype), *(part.flatten().to(dtype) for part in parts)])
        arrived = all_to_all_rows(flat.to(self.device), sends, receives, self.group)

        whole, taken = [arrived.new_empty(m.shape) for m in owned[self.rank]], 0
        for of_rank in places:
            for matrix, place in zip(whole, of_rank, strict=True):
                part = matrix[place]
                part.copy_(arrived[taken : taken + part.numel()].view(part.shape))
                taken += part.numel()
        whole = _orthogonal_of_each(whole)
        back = [matrix[place].flatten() for of_rank in places for matrix, place in zip(whole, of_rank, strict=True)]
        returned = all_to_all_rows(torch.cat([arrived[:0], *back]), receives, sends, self.group)
        pieces = returned.to(first).split(sizes)
        return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def orthogonal(g_BMN: Tensor) -> Tensor:
    """Nearly U V^T of each matrix U S V^T; singular values above a hundredth of its norm come to lie around 1."""
    if g_BMN.shape[-2] > g_BMN.shape[-1]:
        return orthogonal(g_BMN.mT).mT
    a, b, c = _COEFFICIENTS
    x = g_BMN / (torch.linalg.vector_norm(g_BMN, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _orthogonal_of_each(matrices: list[Tensor]) -> list[Tensor]:
    """Matrices of one shape are made orthogonal together."""
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        alike[matrix.shape].append(index)
    found = list(matrices)
    for shape, indices in alike.items():
        stack = torch.stack([matrices[index].reshape(shape[-2:]) for index in indices])
        for index, matrix in zip(indices, orthogonal(stack), strict=True):
            found[index] = matrix.view(shape)
    return found


def _matrices(name: str, shape: torch.Size) -> Iterator[Box]:
    """The matrices of a parameter: of each expert's packed gate and up, two."""
    whole: Box = tuple((0, size) for size in shape)
    if len(shape) == 2:
        yield whole
        return
    parts = 2 if re.search(r"\bgate_up_proj\b", name) else 1
    rows = shape[1] // parts
    for expert in range(shape[0]):
        for part in range(parts):
            yield (expert, expert + 1), (part * rows, (part + 1) * rows), whole[2]


def _rounds(matrices: Sequence[Matrix], ranks: int) -> Iterator[list[list[Matrix]]]:
    """Matrices, ordered by size, dealt to ranks one by one, in rounds that are not too large for any."""
    start = 0
    while start < len(matrices):
        each = max(1, _ROUND_NUMBERS // math.prod(matrices[start].shape))
        taken = matrices[start : start + each * ranks]
        yield [list(taken[rank::ranks]) for rank in range(ranks)]
        start += len(taken)


def _boxes_of_all_ranks(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> list[list[Box]]:
    """For each rank of the group, the part of every parameter that it holds."""
    own: list[Box] = []
    for parameter in parameters:
        offset = global_offset(parameter) if isinstance(parameter, DTensor) else (0,) * parameter.dim()
        own.append(tuple((o, o + size) for o, size in zip(offset, local_part(parameter).shape, strict=True)))
    if group is None:
        return [own]
    ends = torch.tensor([end for box in own for axis in box for end in axis], device=_device(parameters))
    of_all = ends.new_empty(group.size() * len(ends))
    dist.all_gather_single(of_all, ends, group=group)
    found: list[list[Box]] = []
    for of_rank in of_all.view(group.size(), -1).tolist():
        pairs = iter(zip(of_rank[::2], of_rank[1::2], strict=True))
        found.append([tuple(itertools.islice(pairs, len(box))) for box in own])
    return found


def _device(parameters: Sequence[nn.Parameter]) -> str:
    """Where groups exchange tensors; parameters that are offloaded lie on the host."""
    return next((p.device_mesh.device_type for p in parameters if isinstance(p, DTensor)), "cpu")


def _overlap(a: Box, b: Box) -> Box:
    """What two parts of a tensor share; nothing along each axis where that is nothing."""
    shared = tuple((max(s, t), min(e, f)) for (s, e), (t, f) in zip(a, b, strict=True))
    return shared if all(start < end for start, end in shared) else ((0, 0),) * len(shared)


def _numbers(box: Box) -> int:
    return math.prod(end - start for start, end in box)


def _slices(box: Box, origin: Box) -> tuple[slice, ...]:
    """Where a part lies in another that holds all of it."""
    return tuple(slice(start - first, end - first) for (start, end), (first, _) in zip(box, origin, strict=True))
