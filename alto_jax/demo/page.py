"""The page itself, of Gradio's components."""

from collections.abc import Iterator
import os
import pathlib
import socket
import tempfile
import threading
from typing import Any

import numpy as np

from alto_jax.config import ConfigError
from alto_jax.demo import frames
from alto_jax.inference.segmenter import Segmenter

# Note: of the machine, so that a page without a network looks the same. Gradio reads this before it is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
_HEIGHT = 360  # of a picture on the page, in pixels
_INTRO = """# Masks of as many tokens as they need
`{checkpoint}` · Choose or drop a picture, say what to segment or click two corners of a box, and watch the mask grow.
"""


def build(model: Segmenter, checkpoint: str) -> Any:
    """The page (gradio.Blocks) for a model.

    Raises:
      ConfigError: Gradio is not installed.
    """
    try:
        import gradio as gr  # late: an optional dependency
    except ImportError as error:
        raise ConfigError(f"the page needs Gradio: pip install 'alto_jax[page]' ({error})") from error
    most, turn = model.cfg.tokenizer.num_latent_tokens, threading.Lock()

    def ask(image: np.ndarray | None, phrase: str, boxes: str, kind: str, exact: int, bias: float) -> Iterator[tuple]:
        """Frames of the adaptive (or exact) answer, then of the one with all tokens beside it."""
        beside, length = None, int(exact) if kind == "exact" else "adaptive"
        try:
            with turn:  # Note: one device; who comes second waits.
                for frame in frames.answer(model, image, phrase, boxes, length=length, end_bias=float(bias)):
                    yield frame.picture, frame.words, beside, None
                assert frame.answer is not None and image is not None  # Note: the last frame has it.
                *_, whole = frames.answer(model, image, phrase, boxes, length="full", end_bias=0.0)
                assert whole.answer is not None
                both = frame.answer.mask | whole.answer.mask
                same = (frame.answer.mask & whole.answer.mask).sum() / both.sum() if both.any() else 1.0
            told = f"{frame.words}\nIoU with the mask of all {most} tokens: {same:.2f}"
            # Note: Gradio copies the files, and deletes its copies when they are old.
            with tempfile.TemporaryDirectory(prefix="alto_jax_demo_") as folder:
                yield frame.picture, told, whole.picture, frames.save(pathlib.Path(folder), image, frame.answer)
        except ValueError as error:
            raise gr.Error(str(error), duration=10) from error

    def click(image: np.ndarray | None, boxes: str, corner: Any, event: gr.SelectData) -> tuple[str, Any, str]:
        if image is None:
            return boxes, None, ""
        boxes, corner = frames.add_corner(boxes, corner, (int(event.index[0]), int(event.index[1])))
        return (
            boxes,
            corner,
            "" if corner is None else f"First corner at {corner[0]}, {corner[1]}; click the other one.",
        )

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    with gr.Blocks(title="alto_jax", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(_INTRO.format(checkpoint=checkpoint))
        corner = gr.State(None)
        with gr.Row():
            with gr.Column():
                image = gr.Image(label="Picture", type="numpy", image_mode="RGB", sources=["upload", "clipboard"],
                                 height=_HEIGHT, elem_id="picture")  # fmt: skip
                phrase = gr.Textbox(label="Phrase", placeholder="the red apple", elem_id="phrase")
                boxes = gr.Textbox(label="Boxes instead (pixels; or click two corners on the picture)",
                                   placeholder="12,30,55,80; 60,10,90,40", elem_id="boxes")  # fmt: skip
                with gr.Row():
                    kind = gr.Radio(["adaptive", "exact"], value="adaptive", label="Length", elem_id="kind")
                    exact = gr.Slider(1, most, value=min(8, most), step=1, label="Exact tokens", elem_id="exact")
                    bias = gr.Slider(-8, 8, value=0, step=0.5, label="END bias", elem_id="bias")
                with gr.Row():
                    go = gr.Button("Segment", variant="primary", elem_id="go")
                    clear = gr.Button("Clear boxes")
            with gr.Column():
                shown = gr.Image(
                    label="Mask, token by token", interactive=False, format="png", height=_HEIGHT, elem_id="shown"
                )
                words = gr.Textbox(label="Answer", lines=3, interactive=False, elem_id="words")
                beside = gr.Image(
                    label=f"All {most} tokens", interactive=False, format="png", height=_HEIGHT, elem_id="beside"
                )
                taken = gr.File(label="Mask, overlay, codes and RLE", file_count="multiple", elem_id="taken")
        gr.Examples(
            [list(example) for example in frames.examples()], inputs=[image, phrase, boxes], cache_examples=False
        )
        image.select(click, [image, boxes, corner], [boxes, corner, words])
        clear.click(lambda: ("", None), None, [boxes, corner])
        given = [image, phrase, boxes, kind, exact, bias]
        # What is asked while an answer grows is answered after it, not dropped.
        gr.on(
            [go.click, phrase.submit, boxes.submit], ask, given, [shown, words, beside, taken], show_progress="hidden",
            trigger_mode="always_last",
        )  # fmt: skip
    page.alto_theme = theme
    return page


def launch(model: Segmenter, checkpoint: str, host: str, port: int, *, wait: bool = True) -> Any:
    """Serves the page; with `wait` until it is interrupted.

    Raises:
      ConfigError: Gradio is missing, the port is taken, or the host is none of this machine.
    """
    _check_free(host, port)
    page = build(model, checkpoint)
    try:
        page.queue(default_concurrency_limit=1, max_size=32).launch(
            server_name=host, server_port=port, share=False, prevent_thread_lock=not wait, quiet=False,
            theme=page.alto_theme, max_file_size="32mb", footer_links=[], ssr_mode=False,
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"--host={host} --port={port}: {error}") from error
    return page


def _check_free(host: str, port: int) -> None:
    """Raises ConfigError if nothing can listen there; Gradio would tell of the port, whatever is wrong."""
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(where)
    except OSError as error:
        raise ConfigError(f"--host={host} --port={port}: {error}") from error
