"""The page in the browser: its logic on the shipped model, and python -m proxt2i.demo as a visitor sees it, in a real Chromium."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from PIL import Image

from proxt2i import demo, drawing, sample
from proxt2i.diffusion import PLANS, VPSchedule, clean_estimate, make_plan, trajectory
from proxt2i.embedded import SHIPPED_MODEL

PROMPT = "a serious man with a beanie"


@pytest.fixture(scope="module")
def models():
    return drawing.load_models([], torch.device("cpu"), SHIPPED_MODEL)


def fill_in(**fields):
    form = {"prompt": PROMPT, "negative": "", "guidance": 1.5, "below": 0.35, "seed": "7", "count": 2, **fields}
    return drawing.read_form(*form.values(), max_images=4)


def drawn_by_command(command, out):
    """The PNGs, in the order of their seeds, of a command line that the page shows."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "proxt2i.sample"] and words.index("--") == len(words) - 2
    assert sample.main([*words[3:-2], "--out", str(out), *words[-2:]]) == 0
    return sorted((p for p in out.glob("*.png") if p.name != "grid.png"), key=lambda p: int(re.search(r"seed(\d+)", p.name)[1]))


def assert_same_pictures(files, others):
    assert len(files) == len(others) > 0
    for file, other in zip(files, others):
        ours, theirs = Image.open(file), Image.open(other)
        assert ours.tobytes() == theirs.tobytes() and ours.text == theirs.text


@pytest.mark.parametrize("name", PLANS)
def test_of_data_that_is_one_image_every_step_expects_it(name):
    plan = make_plan(name, 10)
    image = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    schedule = VPSchedule()

    def eps_fn(y, t, lam, guidance_scale):
        t, lam = float(t[0]), float(lam[0])
        return (lam**0.5 * (y - schedule.alpha(t) ** 0.5 * image) / (schedule.one_minus_alpha(t) + lam),) * 2

    for i, y, x in trajectory(eps_fn, plan, (3, 4, 4), [1, 2], guidance_scale=2.0):
        torch.testing.assert_close(clean_estimate(plan, i, y, x), image.expand(2, -1, -1, -1), rtol=0, atol=2e-3)
    assert (y - x).abs().max() > 1e-3  # the inputs are not the image


@pytest.mark.parametrize("negative, plan, steps", [("", "relaxed", 5), ("glasses, a yellow background", "hybrid", 4)])
def test_a_draw_has_the_bits_and_settings_of_its_command_line(models, negative, plan, steps, tmp_path):
    form = fill_in(negative=negative, guidance=2.25, below=1.0)
    side = drawing.read_side(models, sample.SHIPPED_NAME, plan, steps, form)
    shown = list(drawing.draw(form, side, tmp_path))
    assert [len(drawn.strip) for drawn in shown] == [*range(1, steps), steps]
    assert all(drawn.files is None for drawn in shown[:-1])
    assert_same_pictures(shown[-1].files, drawn_by_command(drawing.command_line(form, side), tmp_path / "command"))
    assert Image.open(shown[-1].files[0]).text.get("negative_prompt", "") == negative
    assert len(set(shown[-1].strip)) == steps and drawing.strip_html(shown[1].strip, side.plan).count("<img") == 2
    if negative:
        plain = list(drawing.draw(fill_in(guidance=2.25, below=1.0), side, tmp_path))[-1]
        assert Image.open(plain.files[0]).tobytes() != Image.open(tmp_path / "command" / f"000-a-serious-man-with-a-beanie-seed{form.seeds[0]}.png").tobytes()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": None}, "prompt is empty"),
        ({"negative": "x" * 2001}, "negative prompt has 2,001 characters; at most 2,000"),
        ({"count": 5}, "Number of images: must be a whole number from 1 to 4, not 5"),
        ({"count": None}, "Number of images: must be a whole number from 1 to 4."),
        ({"count": float("nan")}, "from 1 to 4"),
        ({"count": 1e300}, "from 1 to 4"),
        ({"guidance": None}, "Guidance scale: give a number"),
        ({"guidance": -1.0}, "guidance_scale=-1"),
        ({"below": 1.5}, "guidance_below=1.5"),
        ({"seed": "seven"}, "Seed 'seven': give a whole number"),
        ({"seed": str(2**63 - 1)}, "must fit in 64 bits"),
        ({"steps": 0}, "Steps: must be a whole number from 1 to 100, not 0"),
        ({"steps": 4.5}, "Steps: must be a whole number from 1 to 100, not 4.5"),
        ({"steps": "8"}, "Steps: must be a whole number"),
        ({"plan": "backward", "steps": 9}, "the smallest valid num_steps on this grid is 10"),
        ({"plan": "hybird"}, "did you mean 'hybrid'"),
        ({"model": "nowhere"}, "no model 'nowhere' here; choose one of portraits (shipped)"),
    ],
)
def test_wrong_fields_are_named(models, fields, message):
    side = {"model": sample.SHIPPED_NAME, "plan": "relaxed", "steps": 8} | {k: v for k, v in fields.items() if k in ("model", "plan", "steps")}
    with pytest.raises(ValueError, match=re.escape(message)):
        drawing.read_side(models, *side.values(), fill_in(**{k: v for k, v in fields.items() if k not in side}))


def test_what_is_not_heard_is_said(models):
    side = drawing.read_side(models, sample.SHIPPED_NAME, "relaxed", 8, fill_in())
    assert drawing.unheard(fill_in(negative="glasses"), side) == []
    (said,) = drawing.unheard(fill_in(negative="glasses " * 40 + "beanie"), side)
    assert "takes 24 tokens" in said and "end of the negative prompt" in said and "glasses" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["--host", "192.0.2.7", "--port", "0"], "--host 192.0.2.7 --port 0: Cannot assign requested address"),
        (["--auth", "me"], "--auth: give USER:PASSWORD"),
        (["--max-images", "0"], "--max-images 0"),
        (["--max-queue", "0"], "--max-queue 0"),
    ],
)
def test_wrong_flags_are_named(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: True)
    assert demo.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_taken_port_and_a_missing_gradio_are_named(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken, monkeypatch.context() as patch:
        patch.setattr(demo.importlib.util, "find_spec", lambda name: True)
        assert demo.main(["--port", str(taken.getsockname()[1])]) == 2
    assert "in use; give another --port" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo.main(["--port", "0"]) == 2
    assert "-e '.[demo]'" in capsys.readouterr().err


# in the browser ------------------------------------------------------------------------------------------------------------------------------

FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync "
         "--disable-dev-shm-usage --window-size=1280,1400")  # fmt: skip
# keeps every state of the strip that the page showed, however short
WATCH = """window.seen = [];
new MutationObserver(() => {
  const strip = document.querySelector('#strip-left .strip'), seen = window.seen;
  if (strip && seen[seen.length - 1] !== strip.dataset.steps) seen.push(strip.dataset.steps);
}).observe(document.querySelector('#strip-left'), {childList: true, subtree: true, attributes: true});"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install -c constraints.txt gradio")
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "True", "PYTHONUNBUFFERED": "1"}
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with open(log, "w") as out:
        process = subprocess.Popen([sys.executable, "-m", "proxt2i.demo", "--port", "0", "--max-images", "4"], stdout=out, stderr=subprocess.STDOUT, env=environment)
    yield process, log
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and log.read_text().rstrip().endswith("stopped")
        assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def browser(server, tmp_path_factory):
    """A new Chromium with a profile of its own; it starts while the server does."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -c constraints.txt selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SE_OFFLINE", "true")
        patch.setenv("SE_AVOID_STATS", "true")
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def address(server):
    process, log = server
    for _ in until():
        if found := re.search(r"http://\S+", log.read_text()):
            return found[0]
        assert process.poll() is None, log.read_text()


def until(seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.1)
    pytest.fail(f"not within {seconds} s")


class Visitor:
    def __init__(self, browser):
        self.browser = browser

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def click(self, selector):
        self.attempt(lambda: self.all(selector)[0].click())

    def type(self, selector, text):
        from selenium.webdriver.common.keys import Keys

        def typed():
            field = self.all(selector)[0]
            field.send_keys(Keys.CONTROL + "a")  # held until the call ends
            field.send_keys(Keys.DELETE, text)
            assert field.get_attribute("value") == text

        self.attempt(typed)

    def attempt(self, action):
        """Does it once the page has made room: an element may not be there yet, or have been replaced since it was found."""
        from selenium.common.exceptions import WebDriverException

        for _ in until(60):
            try:
                return action()
            except (WebDriverException, IndexError, AssertionError):
                pass

    def message(self):
        """What it says, and the commands in it."""
        return self.attempt(lambda: (self.all("#message")[0].text, [command.text for command in self.all("#message code")]))

    def values(self, selector, attribute="value"):
        return self.attempt(lambda: [element.get_attribute(attribute) for element in self.all(selector)])

    def draw(self, commands):
        """Clicks, waits until the message shows so many commands, and returns them and the addresses of the pictures, side by side."""
        self.click("#draw")
        for _ in until():
            text, shown = self.message()
            if len(shown) == commands and "Drawing" not in text:
                break
        for _ in until():
            pictures = [self.values(f"#pictures-{side} img", "src") for side in ("left", "right")[:commands]]
            if all(pictures):
                return shown, pictures


def download(addresses, folder):
    folder.mkdir()
    files = [folder / f"{i}.png" for i in range(len(addresses))]
    for address, file in zip(addresses, files):
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=30) as answer:
            file.write_bytes(answer.read())
    return files


def test_a_visitor_draws_compares_and_errs(browser, address, tmp_path):
    visitor = Visitor(browser)
    browser.get(address)
    for _ in until():
        if demo.PROMPTS[0] in visitor.values("#prompt textarea"):
            break
    visitor.attempt(lambda: browser.execute_script(WATCH))

    visitor.type("#prompt textarea", PROMPT)
    visitor.type("#seed textarea, #seed input", "7")
    visitor.type("#count input", "2")
    (command,), (left,) = visitor.draw(1)
    assert "--seed 7 --num-images 2" in command and len(left) == 2
    files = download(left, tmp_path / "left")
    assert_same_pictures(files, drawn_by_command(command, tmp_path / "command"))
    assert Image.open(files[1]).text["prompt"] == PROMPT and Image.open(files[1]).text["seed"] == "8"
    seen = browser.execute_script("return window.seen")
    assert seen[-1] == "8" and len(set(seen) & {str(i) for i in range(1, 8)}) >= 3, seen  # it came while it was drawn
    assert len(set(visitor.values("#strip-left img", "src"))) == 8

    visitor.click("#compare input")
    visitor.type("#steps-right input", "5")
    commands, (again, right) = visitor.draw(2)
    assert commands[0] == command and "--steps 5 --plan hybrid" in commands[1]
    assert_same_pictures(download(again, tmp_path / "again"), files)
    assert_same_pictures(download(right, tmp_path / "right"), drawn_by_command(commands[1], tmp_path / "command-right"))

    visitor.click("#dice")
    for _ in until():
        if visitor.values("#seed textarea, #seed input")[0] != "7":
            break
    wrong = [("#steps-right input", "0", "Steps: must be a whole number from 1 to 100, not 0"), ("#count input", "5", "Number of images: must be a whole number from 1 to 4"),
             ("#prompt textarea", " ", "The prompt is empty: describe a picture.")]  # fmt: skip
    for field, text, complaint in wrong:
        visitor.type(field, text)
        visitor.click("#draw")
        for _ in until(60):
            if complaint in visitor.message()[0]:
                break
    assert "Traceback" not in browser.page_source
    visitor.type("#count input", "1")
    visitor.click("#compare input")
    visitor.type("#prompt textarea", "<b>man</b> ${7*7} " + "man " * 40)
    commands, _ = visitor.draw(1)
    assert "does not hear the end of the prompt" in visitor.message()[0] and "'<b>man</b> ${7*7} man" in commands[0]

    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in asked if event["method"] == "Network.requestWillBeSent"}
    assert any(url.startswith(address) for url in asked)
    assert [url for url in asked if not url.startswith((address, "data:", "blob:", "chrome:"))] == []
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_password_is_asked_for(models, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install -c constraints.txt gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    from starlette.testclient import TestClient

    with TestClient(demo.application(demo.build(models, 4).queue(max_size=2), "me:se:cret")) as client:
        assert PROMPT[:5] not in client.get("/config").text and client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "me", "password": "se:cret"}).status_code == 200
        answer = client.get("/config")
        assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]


def test_more_draws_than_may_wait_are_refused(models, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install -c constraints.txt gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    from starlette.testclient import TestClient

    side = [next(iter(models)), "relaxed", 30]
    with TestClient(demo.application(demo.build(models, 4).queue(max_size=2))) as client:
        draw = next(d["id"] for d in client.get("/config").json()["dependencies"] if len(d["inputs"]) == 13)
        form = {"data": [PROMPT, "", 1.5, 0.35, "7", 4, False, *side, *side], "fn_index": draw, "session_hash": "me"}
        answers = []
        while len(answers) < 30 and not (answers and answers[-1].status_code == 503):  # one is drawn, two wait
            answers.append(client.post("/gradio_api/queue/join", json=form))
    assert [answer.status_code for answer in answers[:2]] == [200, 200] and answers[-1].status_code == 503
    assert "Queue is full" in answers[-1].json()["detail"]
