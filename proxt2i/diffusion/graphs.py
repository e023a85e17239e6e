"""A network behind CUDA graphs: for small batches, where a GPU computes faster than Python can launch."""

from __future__ import annotations

import torch
from torch import Tensor


class CudaGraphs:
    """network(y, t, lam, text) -> eps, as a U-ViT is called, without the launches: for every set of shapes and dtypes a graph is captured at
    the first call and replayed at the next ones, on inputs that are copied into its own. It computes what the network computes.

    network: a module in eval mode on one GPU; its weights may change in place, and where they have moved graphs are captured anew. Every
    graph keeps the memory of its activations; max_graphs: the oldest goes when there are more. On a CPU, and with gradients, the network
    is called as it is.
    """

    def __init__(self, network: torch.nn.Module, max_graphs: int = 8):
        self.network, self.max_graphs = network, max_graphs
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, y: Tensor, t: Tensor, lam: Tensor, text: list[Tensor]) -> Tensor:
        inputs = [y, t, lam, *text]
        if y.device.type != "cuda" or torch.is_grad_enabled():
            return self.network(y, t, lam, text)
        key = (next(self.network.parameters()).data_ptr(), *((tuple(x.shape), x.dtype) for x in inputs))
        if key not in self._graphs:
            while len(self._graphs) >= self.max_graphs:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = self._capture(inputs)
        graph, own, eps = self._graphs[key]
        for target, value in zip(own, inputs):
            target.copy_(value)
        graph.replay()
        return eps.clone()

    def _capture(self, inputs: list[Tensor]):
        own = [x.clone() for x in inputs]

        def call():
            return self.network(*own[:3], own[3:])

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is made at a first call must not be made during the capture
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            eps = call()
        return graph, own, eps
