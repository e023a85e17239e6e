"""A page in the browser that draws pictures: python -m proxt2i.demo (needs Gradio, the extra `demo`)."""

from __future__ import annotations

import argparse
import html
import importlib.util
import ipaddress
import os
import secrets
import socket
import sys
import tempfile
from pathlib import Path

EXAMPLES = """\
examples:
  python -m proxt2i.demo                                                # the shipped portraits model, on this machine only
  python -m proxt2i.demo --model runs/demo/model --model shipped        # the page offers both, and compares them with the same seeds
  python -m proxt2i.demo --host 0.0.0.0 --auth lab:SECRET --port 8000   # for others too

PROXT2I_DEMO_AUTH=USER:PASSWORD is --auth where the command line is not secret. The page fetches nothing from the internet and reports nothing to anyone.
"""
PROMPTS = ("a smiling woman with long red hair and glasses", "a serious man with a beanie on a yellow background", "a lady with curly black hair and a brimmed hat")
MISSING = "the page needs Gradio: in the clone, pip install -c constraints.txt --no-build-isolation -e '.[demo]'"
# A browser that keeps to it asks nothing but this server, whatever the libraries of the page may want.
POLICY = (b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
          b"connect-src 'self' data: blob:; worker-src 'self' blob:; frame-ancestors 'self'")  # fmt: skip
CSS = """
.gradio-container {max-width: 1200px !important; margin: auto}
.strip {display: flex; gap: 3px; overflow-x: auto; min-height: 84px}
.strip figure {margin: 0; flex: 1 1 0; min-width: 34px; max-width: 76px; text-align: center}
.strip img {width: 100%; display: block; border-radius: 4px; margin: 0}
.strip .to-come {width: 100%; aspect-ratio: 1; border-radius: 4px; background: var(--block-border-color); opacity: .5}
.strip figcaption {font-size: 11px; color: var(--body-text-color-subdued); line-height: 1.5}
.note {padding: 8px 12px; border-radius: 8px; border: 1px solid var(--block-border-color); overflow-wrap: anywhere}
.note.wrong {border-color: #dc2626; color: #dc2626}
.note code {display: block; margin-top: 4px; font-size: 12px; white-space: pre-wrap; user-select: all}
.small img {image-rendering: pixelated}
.pictures .grid-wrap {min-height: 0 !important; max-height: none !important; overflow: visible !important}
.pictures:has(.preview) .gallery-container {min-height: 420px}
.pictures .caption-label {font-size: 11px; padding: 1px 6px; bottom: 4px; right: 4px}
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m proxt2i.demo", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="DIR", help="model folder, e.g. RUN/model of a training run; several times: the page "
                        "offers them all; 'shipped' is the portraits model of the package (default: that one)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0: all of this machine's (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to serve at; 0: any free one (default: 7860)")
    parser.add_argument("--auth", metavar="USER:PASSWORD", default=os.environ.get("PROXT2I_DEMO_AUTH"), help="ask visitors for this name and password")
    parser.add_argument("--max-images", type=int, default=16, metavar="M", help="most pictures of one draw (default: 16)")
    parser.add_argument("--max-queue", type=int, default=16, metavar="M", help="most draws that wait; more are refused (default: 16)")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    for flag, value, high in (("--max-images", args.max_images, 256), ("--max-queue", args.max_queue, 10_000)):
        if not 1 <= value <= high:
            raise ValueError(f"{flag} {value}: must be from 1 to {high}")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port {args.port}: must be from 0 to 65535")
    if args.auth is not None and not all(args.auth.partition(":")[::2]):
        raise ValueError("--auth: give USER:PASSWORD, neither of them empty")


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. ValueError when the address is not this machine's or the port is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # a second server cannot take the port while this one reads its models
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}; give another --port (0: any free one) or --host") from None
    return bound


def note(lines, wrong: bool = False) -> str:
    """HTML of a message: each line a sentence, or a pair of a sentence and a command."""
    text = "<br>".join(html.escape(line) if isinstance(line, str) else f"{html.escape(line[0])}<code>{html.escape(line[1])}</code>" for line in lines)
    return f'<div class="note{" wrong" if wrong else ""}" role="{"alert" if wrong else "status"}">{text}</div>'


def one_of(i: int, *values, other) -> list:
    """The outputs of both sides, (strip, pictures) each: `values` for side i, `other` for the other's."""
    return [*values, other, other] if i == 0 else [other, other, *values]


def build(models: dict, max_images: int):
    """The page as gradio.Blocks. models: {name: Bundle}."""
    import gradio as gr
    import torch

    from .diffusion.plan import PLANS
    from .drawing import MAX_STEPS, command_line, draw, read_form, read_side, strip_html, unheard
    from .pipeline import latent_size, plan_of

    names = list(models)
    own = models[names[0]].settings
    other = names[1 % len(names)]
    small = all(latent_size(model)[0] * model.codec.factor <= 128 for model in models.values())  # their pixels may be seen
    quiet = dict(api_visibility="private", show_progress="hidden")

    def on_draw(prompt, negative, guidance, below, seed, count, compare, *sides):
        """Streams (message, strip, pictures, strip, pictures)."""
        same = gr.skip()
        try:
            form = read_form(prompt, negative, guidance, below, seed, count, max_images=max_images)
            chosen = [read_side(models, *sides[i : i + 3], form) for i in ((0, 3) if compare else (0,))]
            notes = list(dict.fromkeys(line for side in chosen for line in unheard(form, side)))
            for i, side in enumerate(chosen):
                yield note([f"Drawing: {side.model}, {side.plan.name}, {side.plan.num_steps} steps …", *notes]), *one_of(i, strip_html([], side.plan), [], other=same)
                with tempfile.TemporaryDirectory() as folder:
                    for drawn in draw(form, side, Path(folder)):
                        if drawn.files is None:
                            yield same, *one_of(i, strip_html(drawn.strip, side.plan), same, other=same)
                            continue
                        done = f"{len(drawn.files)} images in {drawn.seconds:.2f} s: {side.model}, {side.plan.name}, {side.plan.num_steps} steps. The same pictures:"
                        notes.append((done, command_line(form, side)))
                        pictures = [(str(path), f"seed {seed}") for path, seed in zip(drawn.files, form.seeds)]
                        yield note(notes), *one_of(i, strip_html(drawn.strip, side.plan), pictures, other=same)  # Gradio copies them before it asks for more
        except ValueError as error:
            yield note([str(error)], wrong=True), *[same] * 4
        except torch.OutOfMemoryError:
            yield note([f"{len(form.seeds)} images are too many for the device's memory: ask for fewer."], wrong=True), *[same] * 4

    def on_model(name):
        settings = models[name].settings
        return settings.plan, settings.num_steps, settings.guidance_scale, settings.guidance_below

    def side_inputs(side, model, plan):
        with gr.Row():
            model = gr.Dropdown(names, value=model, label="Model", visible=len(names) > 1, min_width=240, elem_id=f"model-{side}")
            plan = gr.Dropdown(list(PLANS), value=plan, label="Plan", min_width=120, elem_id=f"plan-{side}")
            steps = gr.Number(models[model.value].settings.num_steps, label=f"Steps (1–{MAX_STEPS})", min_width=80, elem_id=f"steps-{side}")
        return [model, plan, steps]

    def side_outputs(side):
        strip = gr.HTML(strip_html([], plan_of(own)), elem_id=f"strip-{side}")
        pictures = gr.Gallery(show_label=False, columns=4, height="auto", object_fit="contain", buttons=["download", "fullscreen"], interactive=False,
                              elem_id=f"pictures-{side}", elem_classes=["pictures", "small"] if small else ["pictures"])  # fmt: skip
        return [strip, pictures]

    with gr.Blocks(title="proxt2i", analytics_enabled=False, delete_cache=(600, 6 * 3600)) as page:
        gr.Markdown("# proxt2i\nText to image in a few proximal steps. The strip shows after every step what the model then expects to see in the end.")
        with gr.Row():
            prompt = gr.Textbox(label="Prompt", value=PROMPTS[0], lines=1, max_lines=4, scale=3, elem_id="prompt")
            negative = gr.Textbox(label="Negative prompt", lines=1, max_lines=4, scale=2, elem_id="negative")
        with gr.Row(equal_height=True):
            guidance = gr.Number(own.guidance_scale, label="Guidance scale", min_width=110, elem_id="guidance")
            below = gr.Number(own.guidance_below, label="Guidance below", min_width=110, elem_id="below")
            seed = gr.Textbox("0", label="Seed", min_width=110, elem_id="seed")
            count = gr.Number(min(4, max_images), label=f"Images (1–{max_images})", min_width=110, elem_id="count")
            with gr.Column(min_width=130):
                dice = gr.Button("Random seed", size="sm", elem_id="dice")
                compare = gr.Checkbox(label="Compare two", container=False, elem_id="compare")
        with gr.Row():
            go = gr.Button("Draw", variant="primary", scale=4, elem_id="draw")
            stop = gr.Button("Stop", min_width=80)
        message = gr.HTML(elem_id="message")
        with gr.Row():
            with gr.Column(elem_id="left"):
                left = side_inputs("left", names[0], own.plan)
                left_shown = side_outputs("left")
            with gr.Column(visible=False, elem_id="right") as column:
                right = side_inputs("right", other, models[other].settings.plan if other != names[0] else "hybrid")
                right_shown = side_outputs("right")
        gr.Examples([[text] for text in PROMPTS], [prompt], label="Prompts for the shipped model")

        running = [trigger(on_draw, [prompt, negative, guidance, below, seed, count, compare, *left, *right], [message, *left_shown, *right_shown],
                           concurrency_id="draw", concurrency_limit=1, **quiet) for trigger in (go.click, prompt.submit, negative.submit)]  # fmt: skip
        stop.click(lambda: note(["Stopped."]), None, message, cancels=running, queue=False, **quiet)
        dice.click(lambda: str(secrets.randbelow(2**32)), None, seed, queue=False, **quiet)
        compare.change(lambda on: gr.Column(visible=on), compare, column, queue=False, **quiet)
        left[0].input(on_model, left[0], [*left[1:], guidance, below], queue=False, **quiet)
        right[0].input(lambda name: on_model(name)[:2], right[0], right[1:], queue=False, **quiet)
    return page


class Guarded:
    """An ASGI application whose answers carry POLICY."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def guarded_send(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"content-security-policy", POLICY)]}
            await send(message)

        await self.app(scope, receive, guarded_send)


def application(page, auth: str | None = None) -> Guarded:
    """The page as an ASGI application. auth: USER:PASSWORD to ask visitors for."""
    import fastapi
    import gradio as gr

    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    user, _, password = (auth or "").partition(":")
    app = gr.mount_gradio_app(fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None), page, "/", auth=(user, password) if auth else None,
                              footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
                              max_file_size="1kb", theme=theme, css=CSS)  # fmt: skip
    return Guarded(app)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        check(args)
        with tempfile.TemporaryDirectory(prefix="proxt2i-demo-") as cache:
            # read when Gradio is imported or a page is built; the last two are said to huggingface_hub, which Gradio imports
            os.environ.update(GRADIO_TEMP_DIR=cache, GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="1")
            run(args)
    except KeyboardInterrupt:  # uvicorn, too, raises it once it has shut down
        pass
    except (ValueError, OSError) as error:
        print(f"proxt2i.demo: error: {error}", file=sys.stderr)
        return 2
    print("stopped")
    return 0


def run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(MISSING)
    bound = listen(args.host, args.port)  # refused before models are read

    import uvicorn

    from .drawing import load_models
    from .embedded import SHIPPED_MODEL
    from .pipeline import pick_device

    models = load_models(args.model, pick_device(args.device), SHIPPED_MODEL)
    page = build(models, args.max_images).queue(max_size=args.max_queue)
    host, port = bound.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        who = "anyone who has the password" if args.auth else "anyone (--auth USER:PASSWORD asks for a password)"
        print(f"proxt2i.demo: warning: {host} can be reached from other machines, by {who}; the connection is not encrypted", file=sys.stderr)
    name = f"[{host}]" if ":" in host else host
    print(f"{', '.join(models)} at http://{'localhost' if host in ('0.0.0.0', '::') else name}:{port} (Ctrl-C stops)", flush=True)
    uvicorn.Server(uvicorn.Config(application(page, args.auth), log_level="warning", timeout_graceful_shutdown=2)).run(sockets=[bound])


if __name__ == "__main__":
    from proxt2i.entry import keep_freed_memory

    keep_freed_memory()
    sys.exit(main())
