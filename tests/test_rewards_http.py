"""Rewards over HTTP: a real worker process and its client, and what happens when either misbehaves."""

import json
import signal
import socket
import threading
import time
from http.client import HTTPConnection

import pytest
import torch
from runs import start

from proxt2i.data.portraits import make_arrays
from proxt2i.rewards import RewardError, RewardSettings, load_reward, score
from proxt2i.rewards import http as client
from proxt2i.rewards.http import HttpReward, decode, encode
from proxt2i.rewards.serve import Worker, main

TOKEN = "only-for-these-tests"


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(client, "BACKOFF_S", 0.05)


@pytest.fixture(scope="module")
def portraits():
    images, captions, metadata = make_arrays(100_000_700, 6)
    return torch.from_numpy(images).float() / 255, captions, metadata


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN + "\n")
    return file


@pytest.fixture(scope="module")
def worker(token_file):
    process = start(["python", "-m", "proxt2i.rewards.serve", "--reward", "portraits,jpeg_compressibility", "--set", "portraits.batch_size=4", "--port", "0",
                     "--token-file", token_file, "--max-mb", "1", "--device", "cpu"])
    for line in process.stdout:
        if line.startswith("serving ") and "jpeg" in line:
            break
    else:
        pytest.fail(f"the worker ended with {process.wait()}")
    process.url = line.split()[1].rpartition("/")[0]
    yield process
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.communicate()


def settings(worker, token_file, name="portraits", **more):
    return RewardSettings("http", url=f"{worker.url}/{name}", token_file=str(token_file), **{"timeout_s": 20.0, **more})


def post(worker, body, path="/portraits", token=TOKEN, **headers):
    connection = HTTPConnection(worker.url.removeprefix("http://"), timeout=20)
    connection.request("POST", path, body, {"Authorization": f"Bearer {token}", **headers})
    response = connection.getresponse()
    return response.status, json.loads(response.read())["error"]


def test_a_worker_gives_the_same_scores_as_the_reward_itself(worker, token_file, portraits):
    images, captions, metadata = portraits
    metadata = [None, {"attributes": {"person": "man"}, "stated": ["person"]}, *metadata[2:]]
    remote = [load_reward(settings(worker, token_file, name)) for name in ("portraits", "jpeg_compressibility")]
    local = [load_reward(RewardSettings(name)) for name in ("portraits", "jpeg_compressibility")]
    ours, theirs = score(local, images, captions, metadata), score(remote, images, captions, metadata)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_worker_can_be_named_by_the_environment(worker, token_file, monkeypatch):
    by_name = RewardSettings("http", url="$REWARD_WORKER_1/portraits", token_file="$REWARD_TOKEN")
    with pytest.raises(ValueError, match="there is no variable REWARD_WORKER_1; `launchers.grpo --reward-worker` sets"):
        load_reward(by_name)
    monkeypatch.setenv("REWARD_WORKER_1", worker.url)
    monkeypatch.setenv("REWARD_TOKEN", str(token_file))
    assert load_reward(by_name).url == f"{worker.url}/portraits"


def test_wrong_tokens_and_names_are_found_before_the_work(worker, token_file, tmp_path):
    (tmp_path / "other").write_text("another-token-altogether")
    with pytest.raises(ValueError, match="refused: status 401: wrong or missing token; set token_file"):
        load_reward(settings(worker, tmp_path / "other"))
    with pytest.raises(ValueError, match="this worker serves portraits, jpeg_compressibility"):
        load_reward(settings(worker, token_file, "hpsv2"))
    with pytest.raises(ValueError, match="token file .*none: No such file"):
        load_reward(settings(worker, tmp_path / "none"))


def test_the_worker_refuses_what_it_should_not_take(worker, portraits):
    good = encode((portraits[0] * 255).round().byte(), portraits[1], None)
    header = int.from_bytes(good[:8], "little") + 8
    for body, path, token, headers, status, message in [
        (b"garbage", "/portraits", TOKEN, {}, 400, "not a safetensors file"),
        (good[: len(good) // 2], "/portraits", TOKEN, {}, 400, "not a safetensors file"),
        (b"\x80\x04\x95", "/portraits", TOKEN, {}, 400, "not a safetensors file"),
        (good[:header].replace(b"U8", b"I8") + good[header:], "/portraits", TOKEN, {}, 400, "images must be uint8"),
        (encode(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["a"], None), "/portraits", TOKEN, {}, 400, "prompts must be 2 strings"),
        (encode(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ["a"], [1]), "/portraits", TOKEN, {}, 400, "metadata must be null or 1 objects"),
        (bytes(2 * 2**20), "/portraits", TOKEN, {}, 413, "at most 1,048,576 are taken"),
        (b"", "/portraits", TOKEN, {"Content-Length": str(10**12)}, 413, "1,000,000,000,000 bytes"),
        (good, "/portraits", "wrong", {}, 401, "wrong or missing token"),
        (good, "/../etc/passwd", TOKEN, {}, 404, "there are /portraits, /jpeg_compressibility"),
        (encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ["a bicycle"], None), "/portraits", TOKEN, {}, 500, "reward portraits, prompt 'a bicycle'"),
    ]:  # fmt: skip
        if headers:  # a body that is promised and never sent
            with socket.create_connection(worker.url.removeprefix("http://").split(":"), timeout=20) as s:
                s.sendall(f"POST {path} HTTP/1.0\r\nAuthorization: Bearer {token}\r\nContent-Length: {10**12}\r\n\r\n".encode())
                s.shutdown(socket.SHUT_WR)
                answer = s.makefile("rb").read().decode()
            assert " 413 " in answer and message in answer
        else:
            got = post(worker, body, path, token)
            assert got[0] == status and message in got[1], (body[:20], got)


def test_a_batch_that_is_too_large_is_not_sent(worker, token_file):
    reward = load_reward(settings(worker, token_file))
    with pytest.raises(RewardError, match="the worker takes 1,048,576; lower batch_size"):
        score([reward], torch.zeros(8, 3, 256, 256), ["a man"] * 8)


def test_a_hanging_and_a_dead_worker_are_reported_in_time(worker, token_file, portraits):
    reward = load_reward(settings(worker, token_file, timeout_s=0.3))
    worker.send_signal(signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(RewardError, match=r"reward portraits, images 0 to 5.*failed 4 times.*no answer within 0.3 s.*health"):
        score([reward], *portraits)
    assert 1.2 <= time.monotonic() - begun < 5
    worker.send_signal(signal.SIGCONT)
    reward.timeout_s = 20.0
    assert score([reward], *portraits)["portraits"].shape == (6,)  # and it can go on
    worker.kill()
    worker.wait()
    with pytest.raises(RewardError, match="failed 4 times.*ConnectionRefusedError"):
        score([reward], *portraits)
    with pytest.raises(ValueError, match="failed 4 times.*ConnectionRefusedError"):
        load_reward(settings(worker, token_file))


class Mean:
    name, batch_size, calls = "mean", 8, 0

    def __call__(self, images, prompts, metadata=None):
        self.calls += 1
        if prompts == ["break"]:
            raise KeyError("broken")
        return images.mean((1, 2, 3))


def test_a_worker_that_starts_late_is_waited_for_and_its_errors_are_not_repeated():
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    reward, served = HttpReward(f"http://127.0.0.1:{port}/mean", 10.0), Mean()
    reward.name, reward.batch_size = "mean", 8
    workers = []

    def serve():
        workers.append(Worker(("127.0.0.1", port), [served]))
        workers[0].serve_forever()

    timer = threading.Timer(0.1, serve)
    timer.start()
    try:
        assert score([reward], torch.full((1, 3, 2, 2), 0.2), ["a"])["mean"].item() == pytest.approx(0.2)
        with pytest.raises(RewardError, match="status 500: reward mean, prompt 'break': KeyError: 'broken'"):
            score([reward], torch.zeros(1, 3, 2, 2), ["break"])
        assert served.calls == 2
    finally:
        workers[0].shutdown()
        workers[0].server_close()
        timer.join()


def test_something_else_that_answers_is_no_worker():
    with socket.create_server(("127.0.0.1", 0)) as s:
        def answer():
            for _ in range(2):
                connection, _ = s.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n<html>hello")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        reward = HttpReward(f"http://127.0.0.1:{s.getsockname()[1]}/mean", 5.0)
        with pytest.raises(ValueError, match="not JSON: b'<html>hello'"):
            reward.check()
        with pytest.raises(RewardError, match="not JSON"):
            reward(torch.zeros(1, 3, 2, 2), ["a"])
        thread.join()


def test_requests_survive_the_wire():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    for metadata in (None, [{"a": [1, "é"]}, None]):
        got = decode(encode(images, ['“quoted”\n"', ""], metadata))
        assert torch.equal(got[0], images) and got[1:] == (['“quoted”\n"', ""], metadata)
    with pytest.raises(ValueError, match="plain JSON values"):
        encode(images, ["a", "b"], [{"x": torch.ones(1)}, None])


@pytest.mark.parametrize(("arguments", "message"), [
    (["--reward", "portraits", "--host", "0.0.0.0"], "needs --token-file"),
    (["--reward", "portraits", "--token-file", "/nonexistent"], "token file /nonexistent"),
    (["--reward", "portrait"], "did you mean portraits?"),
    (["--reward", "portraits", "--set", "pickscore.path=portraits"], "expected NAME.KEY=VALUE with a NAME of --reward"),
    ([], "name rewards either by --reward"),
    (["--reward", "jpeg_compressibility", "--host", "192.0.2.1", "--token-file", "{token}"], "cannot listen on 192.0.2.1:8008"),
])  # fmt: skip
def test_wrong_arguments_of_the_worker(arguments, message, token_file, capsys):
    assert main([a.format(token=token_file) for a in arguments]) == 2
    assert message in capsys.readouterr().err
