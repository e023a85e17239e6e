"""A reward that another process computes: the client of `python -m proxt2i.rewards.serve`, and the format of its requests.

A request is one safetensors file: the tensor `images`, uint8 [B, 3, H, W], and in the file's metadata under `request` the JSON
{"prompts": [...], "metadata": [...] or null}. The answer is JSON: {"scores": [...]} or {"error": "..."}. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .base import RewardError, RewardSettings
from .preprocess import quantise

ATTEMPTS = 4
BACKOFF_S = 0.5  # before the second attempt, doubled before each one after it
RETRIED = (502, 503, 504)  # statuses of a worker, or of a proxy before it, that is busy or starting


class WorkerUnreachable(RewardError):
    """No answer in any attempt."""


class HttpReward:
    def __init__(self, url: str, timeout_s: float = 60.0, token: str | None = None):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not parts.path.strip("/"):
            raise ValueError(f"url {url!r}: expected http://HOST:PORT/NAME, as the worker prints it")
        self.url, self.host, self.port, self.path = url, parts.hostname, parts.port, parts.path.rstrip("/")
        self.connection = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self.timeout_s, self.headers, self.max_bytes = timeout_s, {"Authorization": f"Bearer {token}"} if token else {}, None

    def check(self) -> None:
        """Ask the worker for its health. ValueError when it does not answer, does not want us, or does not serve this reward."""
        prefix, _, name = self.path.rpartition("/")
        try:
            health = self._request("GET", f"{prefix}/health")
        except RewardError as error:
            raise ValueError(str(error)) from None
        if name not in health.get("rewards", ()):
            raise ValueError(f"{self.url}: this worker serves {', '.join(health.get('rewards', ())) or 'nothing'}")
        self.max_bytes = health.get("max_bytes")

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict | None] | None = None) -> Tensor:
        body = encode(quantise(images), prompts, metadata)
        if self.max_bytes and len(body) > self.max_bytes:
            raise RewardError(f"{self.url}: a batch of {len(body):,} bytes, and the worker takes {self.max_bytes:,}; lower batch_size, or raise the worker's --max-mb")
        scores = self._request("POST", self.path, body).get("scores")
        if not isinstance(scores, list) or not all(isinstance(s, (int, float)) for s in scores):
            raise RewardError(f"{self.url}: answered without a list of scores; is this a worker of proxt2i.rewards.serve?")
        return torch.tensor(scores, dtype=torch.float32)

    def _request(self, method: str, path: str, body: bytes | None = None) -> dict:
        """The JSON of the answer. WorkerUnreachable after the last attempt; RewardError for a refusal, which is not tried again."""
        start, problem = time.monotonic(), None
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
            connection = self.connection(self.host, self.port, timeout=self.timeout_s)
            try:
                connection.request(method, path, body, self.headers)
                response = connection.getresponse()
                status, content = response.status, response.read()
            except (OSError, HTTPException) as error:  # refused, reset, timed out, half an answer
                problem = f"no answer within {self.timeout_s:g} s (timeout_s)" if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
                continue
            finally:
                connection.close()
            answer = _object(content)
            if status == 200 and "error" not in answer:
                return answer
            problem = f"status {status}: {answer.get('error', response.reason)}"
            if status not in RETRIED:
                raise RewardError(f"{self.url} refused: {problem}")
        raise WorkerUnreachable(f"{self.url} failed {ATTEMPTS} times in {time.monotonic() - start:.1f} s, at last: {problem}. "
                                f"Is the worker running and free? It answers {path.rpartition('/')[0]}/health when it is")


def encode(images: Tensor, prompts: list[str], metadata: list[dict | None] | None) -> bytes:
    """images: uint8 [B, 3, H, W]. ValueError for metadata that JSON cannot hold."""
    try:
        request = json.dumps({"prompts": list(prompts), "metadata": metadata})
    except TypeError as error:
        raise ValueError(f"metadata must be plain JSON values to travel to a worker: {error}") from None
    return save_tensors({"images": images.contiguous()}, metadata={"request": request})


def decode(body: bytes) -> tuple[Tensor, list[str], list[dict | None] | None]:
    """What `encode` was given. ValueError saying what is wrong with the body."""
    try:
        images = load_tensors(body)["images"]
        size = int.from_bytes(body[:8], "little")
        request = json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["request"])
        prompts, metadata = request["prompts"], request["metadata"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the body is not a safetensors file with `images`, and prompts in its metadata ({type(error).__name__}: {error})") from None
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images must be uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}")
    if not isinstance(prompts, list) or len(prompts) != len(images) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompts must be {len(images)} strings, one per image")
    if metadata is not None and (not isinstance(metadata, list) or len(metadata) != len(images) or not all(m is None or isinstance(m, dict) for m in metadata)):
        raise ValueError(f"metadata must be null or {len(images)} objects or nulls, one per image")
    return images, prompts, metadata


def read_token(file: Path | str) -> str:
    """ValueError when it is missing or too short to be one."""
    try:
        token = Path(file).read_text().strip()
    except OSError as error:
        raise ValueError(f"token file {file}: {error.strerror}") from None
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f'token file {file}: needs one line of at least 16 printable characters; python -c "import secrets; print(secrets.token_urlsafe())" makes one')
    return token


def _expand(value: str | None, field: str) -> str | None:
    """`value` with $NAME replaced by that variable. ValueError where there is none."""
    missing = [name for name in re.findall(r"\$(\w+)", value or "") if name not in os.environ]
    if missing:
        raise ValueError(f"{field} {value!r}: there is no variable {missing[0]}; `launchers.grpo --reward-worker` sets REWARD_WORKER_1, ... and REWARD_TOKEN")
    return os.path.expandvars(value) if value else value


def load(settings: RewardSettings, device: torch.device) -> HttpReward:
    url, token_file = (_expand(value, field) for value, field in ((settings.url, "url"), (settings.token_file, "token_file")))
    reward = HttpReward(url, settings.timeout_s, read_token(token_file) if token_file else None)
    reward.check()
    return reward


def _object(content: bytes) -> dict:
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"error": f"not JSON: {content[:80]!r}"}
