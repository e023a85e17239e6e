"""A worker that scores for others over HTTP: heavy rewards on their own GPU or machine, one worker for many trainers.

    python -m proxt2i.rewards.serve --reward hpsv2,imagereward --port 8008
    python -m proxt2i.rewards.serve --reward pickscore --set pickscore.path=portraits --host 0.0.0.0 --token-file token

A trainer uses it by {name: http, url: "http://HOST:8008/hpsv2"}. GET /health says what is served. Hosts other than loopback need a token,
which travels unencrypted: use it inside a private network, or through ssh -L or a proxy that speaks TLS.
"""

from __future__ import annotations

import argparse
import hmac
import ipaddress
import json
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from .base import Reward, RewardError, add_arguments, load_reward, score, settings_of_arguments
from .http import decode, read_token

DISCARDED = 64 * 2**20  # bytes of a refused body that are still read, so that its sender gets to see the answer


class Worker(ThreadingHTTPServer):
    """Serves `rewards` at /NAME each; one request is scored at a time, others wait."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], rewards: list[Reward], token: str | None = None, max_bytes: int = 256 * 2**20, read_timeout_s: float = 30.0):
        check_host(address[0], token)
        self.rewards, self.token, self.max_bytes, self.read_timeout_s = {r.name: r for r in rewards}, token, max_bytes, read_timeout_s
        self.scoring = threading.Lock()
        try:
            super().__init__(address, Handler)
        except OSError as error:
            raise ValueError(f"cannot listen on {address[0]}:{address[1]}: {error.strerror}; give another --host or --port") from None

    def handle_error(self, request, client_address) -> None:
        error = sys.exc_info()[1]
        print(f"{client_address[0]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


class Handler(BaseHTTPRequestHandler):
    server: Worker

    def setup(self) -> None:
        self.timeout = self.server.read_timeout_s  # for each read of a slow or silent client
        super().setup()

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if self.path != "/health":
            return self._answer(404, {"error": f"GET /health, or POST to /{', /'.join(self.server.rewards)}"})
        self._answer(200, {"status": "ok", "rewards": list(self.server.rewards), "max_bytes": self.server.max_bytes})

    def do_POST(self) -> None:
        if not self._allowed():
            return
        reward = self.server.rewards.get(self.path.removeprefix("/"))
        if reward is None:
            return self._refuse(404, f"no reward {self.path}; there are /{', /'.join(self.server.rewards)}")
        length = self._length()
        if length is None:
            return self._answer(411, {"error": "a Content-Length is needed"})
        if length > self.server.max_bytes:
            return self._refuse(413, f"the body has {length:,} bytes, and at most {self.server.max_bytes:,} are taken (--max-mb)")
        body = self.rfile.read(length)
        try:
            if len(body) < length:
                raise ValueError(f"the body ends after {len(body):,} of {length:,} bytes")
            images, prompts, metadata = decode(body)
        except ValueError as error:
            return self._answer(400, {"error": str(error)})
        try:
            with self.server.scoring:
                scores = score([reward], images.float() / 255, prompts, metadata)[reward.name].tolist()
        except (RewardError, ValueError) as error:
            return self._answer(500, {"error": str(error)})
        self._answer(200, {"scores": scores})

    def _allowed(self) -> bool:
        expected, given = self.server.token, self.headers.get("Authorization", "")
        if expected is None or hmac.compare_digest(given.encode("latin-1", "replace"), f"Bearer {expected}".encode()):
            return True
        self._refuse(401, "wrong or missing token; set token_file of the reward to a copy of the worker's --token-file")
        return False

    def _length(self) -> int | None:
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() else None

    def _refuse(self, status: int, message: str) -> None:
        left = min(self._length() or 0, DISCARDED)
        while left > 0 and (chunk := self.rfile.read(min(left, 2**20))):
            left -= len(chunk)
        self._answer(status, {"error": message})

    def _answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code="-", size="-") -> None:
        if code != 200:  # only what went wrong
            super().log_request(code, size)


def check_host(host: str, token: str | None) -> None:
    """ValueError when others could reach the worker without a token."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if token is None and not loopback:
        raise ValueError(f"--host {host} can be reached from other machines, so it needs --token-file FILE; without a token only this machine is served (127.0.0.1)")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m proxt2i.rewards.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=8008, help="port to listen on; 0: any free one (default: 8008)")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="file with a secret that clients must send (their token_file)")
    parser.add_argument("--max-mb", type=int, default=256, help="largest request (MiB; default: 256)")
    args = parser.parse_args(argv)
    try:
        settings = settings_of_arguments(args)
        token = read_token(args.token_file) if args.token_file else None
        check_host(args.host, token)
        from ..pipeline import pick_device

        device = pick_device(args.device)
        worker = Worker((args.host, args.port), [load_reward(s, device) for s in settings], token, args.max_mb * 2**20)
    except (ValueError, OSError) as error:
        print(f"proxt2i.rewards.serve: error: {error}", file=sys.stderr)
        return 2
    if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:  # as under nohup: what is ignored stays so
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=worker.shutdown).start())
    for name in worker.rewards:
        print(f"serving http://{args.host}:{worker.server_port}/{name}", flush=True)
    try:
        worker.serve_forever()
    except KeyboardInterrupt:
        pass
    worker.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
