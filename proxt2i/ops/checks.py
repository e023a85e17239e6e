"""What operators with a result for each image ask of their arguments; ValueError, before any work, where they do not get it."""

import math

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_batch(tensor: torch.Tensor, name: str) -> None:
    if tensor.dtype not in FLOATS or tensor.dim() < 1:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16 with shape [B, ...], "
                         f"not {tensor.dtype} {tuple(tensor.shape)}")


def check_like(tensor: torch.Tensor, like: torch.Tensor, name: str, like_name: str) -> None:
    check_batch(tensor, name)
    if tensor.shape != like.shape:
        raise ValueError(f"{name} must have the shape of {like_name}, {tuple(like.shape)}, not {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but {like_name} is on {like.device}")


def check_per_image(tensor: torch.Tensor, like: torch.Tensor, name: str, columns: tuple[int, ...] = (), integer: bool = False) -> None:
    """[B, *columns] for the B images of `like`, on its device: int64, or float32 or float64."""
    dtypes, wanted = ((torch.int64,), "int64") if integer else ((torch.float32, torch.float64), "float32 or float64")
    shape = (like.shape[0], *columns)
    if tensor.dtype not in dtypes or tensor.shape != shape or tensor.device != like.device:
        raise ValueError(f"{name} must be {wanted} with shape {list(shape)} on {like.device}, "
                         f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}")


def state_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Of the arithmetic and of the results: float64 if any tensor is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def network_output(eps: torch.Tensor, state: torch.dtype) -> torch.Tensor:
    """eps in a dtype that the kernels take beside this state: bfloat16 and float16 stay as they are beside float32."""
    return eps if state == torch.float32 else eps.to(state)


def elements_per_image(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape[1:])


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """[B, ...] -> [B, elements of an image], empty ones too."""
    return tensor.reshape(tensor.shape[0], elements_per_image(tensor))


def without_second_derivative(op: str) -> None:
    """Makes differentiating a backward operator an error, and not a silent zero."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{op} has no second derivative")

    torch.library.register_autograd(op, refuse)
