"""A network, or the whole sampler, behind CUDA graphs: for small batches, where a GPU computes faster than Python can launch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .plan import Plan
from .proximal import EpsFn, step_rows, trajectory


class CudaGraphs:
    """network(y, t, lam, text) -> eps, as a U-ViT is called, and `trajectory`, all steps of the sampler, without the launches: for every set of
    shapes and dtypes (and every plan) a graph is captured at the first call and replayed at the next ones, on inputs that are copied into its own.

    network: a module in eval mode on one GPU; its weights may change in place, and where they have moved graphs are captured anew. Every
    graph keeps the memory of its activations; max_graphs: the oldest goes when there are more. On a CPU, and with gradients, the network
    is called as it is.
    """

    def __init__(self, network: torch.nn.Module, max_graphs: int = 8):
        self.network, self.max_graphs = network, max_graphs
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, y: Tensor, t: Tensor, lam: Tensor, text: list[Tensor]) -> Tensor:
        if not self.works_on(y.device):
            return self.network(y, t, lam, text)
        return self._replay(("network",), lambda y, t, lam, *text: self.network(y, t, lam, list(text)), [y, t, lam, *text])

    @staticmethod
    def works_on(device: torch.device) -> bool:
        return device.type == "cuda" and not torch.is_grad_enabled()

    def trajectory(self, eps_fn: Callable[[Callable, list[Tensor], list[Tensor]], EpsFn], name: str, text: list[Tensor], null_text: list[Tensor],
                   plan: Plan, shape: Sequence[int], seeds: Tensor, scales: Sequence[float]) -> Iterator[tuple[int, None, Tensor]]:
        """As `diffusion.trajectory` without want_x, of which it yields the end alone: (N-1, None, x_0).

        eps_fn(network, text, null_text): makes the sampler's eps_fn of tensors that are the graph's own; `name` says which it is.
        text, null_text: see `guided`.  seeds: int64 [B] on the GPU.  scales: of guidance, one a step.
        """
        rows = torch.tensor(step_rows(plan, scales), dtype=torch.float64, device=seeds.device)  # before the capture, which cannot copy from the CPU

        def run(seeds, rows, *embeddings):
            own = eps_fn(self.network, list(embeddings[:len(text)]), list(embeddings[len(text):]))
            (_, _, x), = deque(trajectory(own, plan, shape, seeds, guidance_scale=scales, rows=rows, want_x=False), maxlen=1)
            return x

        key = (name, plan, tuple(shape), tuple(scales))  # the times, and which steps are guided or remember, are constants of the graph
        yield plan.num_steps - 1, None, self._replay(key, run, [seeds, rows, *text, *null_text])

    def _replay(self, key: tuple, function: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
        """function(*inputs) by the graph of `key` and of these inputs' shapes and dtypes."""
        key = (*key, next(self.network.parameters()).data_ptr(), *((tuple(x.shape), x.dtype) for x in inputs))
        if key not in self._graphs:
            while len(self._graphs) >= self.max_graphs:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = self._capture(function, inputs)
        graph, own, output = self._graphs[key]
        for target, value in zip(own, inputs):
            target.copy_(value)
        graph.replay()
        return output.clone()

    def _capture(self, function: Callable[..., Tensor], inputs: list[Tensor]):
        own = [x.clone() for x in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made at a first call must not be made during the capture
            for _ in range(2):
                function(*own)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = function(*own)
        return graph, own, output
