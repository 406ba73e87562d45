"""The demo page: what it shows, and itself in a real browser without a network."""

import json
import pathlib
import re
import shutil
import socket
import tempfile
import types

import numpy as np
from PIL import Image
import pytest

import alto_jax
from alto_jax.config import ConfigError
from alto_jax.data import rle
from alto_jax.demo import frames
from alto_jax.inference.prediction import Prediction

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def model(debug_model):
    return alto_jax.load(debug_model.path)


def test_frames_grow_to_the_answer(model, tmp_path):
    (_, _, box), (image, phrase, _) = frames.examples(2)
    assert phrase and len(frames.parse_boxes(box)) == 1
    *growing, last = frames.answer(model, image, phrase, "", length=4, end_bias=0.0)
    assert [re.match(r"token (\d) \(code \d+\): ", frame.words)[1] for frame in growing] == ["1", "2", "3", "4"]
    assert all(frame.answer is None for frame in growing) and last.answer.length == 4
    np.testing.assert_array_equal(growing[-1].picture, last.picture)
    names = frames.save(tmp_path / "taken", image, last.answer)
    assert [name.rsplit("/")[-1] for name in names] == ["mask.png", "overlay.png", "answer.json"]
    np.testing.assert_array_equal(np.asarray(Image.open(names[0])) > 0, last.answer.mask)
    told = json.loads((tmp_path / "taken" / "answer.json").read_text())
    np.testing.assert_array_equal(rle.decode(told["rle"], *last.answer.mask.shape, "test"), last.answer.mask)
    # With boxes written, these are what is asked for.
    *_, boxed = frames.answer(model, image, phrase, "10,12,60,70", length=4, end_bias=0.0)
    wanted = model.segment(image, boxes=[(10, 12, 60, 70)], length=4)
    np.testing.assert_array_equal(boxed.answer.mask, wanted.mask)


def test_clicks_become_boxes():
    written, corner = frames.add_corner("", None, (30, 40))
    assert (written, corner) == ("", (30, 40))
    written, corner = frames.add_corner(written, corner, (10, 50))
    assert (written, corner) == ("10,40,30,50", None)
    written, corner = frames.add_corner(written + ";", (1, 2), (3, 4))
    assert frames.parse_boxes(written) == [(10, 40, 30, 50), (1, 2, 3, 4)] and corner is None
    assert frames.add_corner("", (5, 5), (5, 9)) == ("", (5, 9))  # no area: the click is a new corner
    assert frames.parse_boxes(" (1.5, 2,3,4) ; ") == [(1.5, 2, 3, 4)]
    drawn = frames.draw_boxes(np.zeros((60, 50, 3), np.uint8), [(10, 40, 30, 50)])
    edge = drawn.any(-1)
    assert edge[40, 10:30].all() and edge[49, 10:30].all() and not edge[42:48, 12:28].any() and not edge[:40].any()


@pytest.mark.parametrize(
    "image, phrase, boxes, message",
    [(None, "a", "", "Choose a picture first"), ("small", "  ", "", "Say what to segment"),
     ("small", "", "1,2,3", "boxes: expected x1,y1,x2,y2 in pixels, several with ; between, got '1,2,3'"),
     ("small", "", "0,0,99,5", "boxes: expected x1 < x2 <= 50"), ("large", "a", "", "4096 are the most on a side"),
     ("small", "<image>", "", "phrase: expected the name or description")],
)  # fmt: skip
def test_errors_are_words(model, image, phrase, boxes, message):
    sizes = {"small": (40, 50, 3), "large": (2, 5000, 3)}
    picture = None if image is None else np.zeros(sizes[image], np.uint8)
    with pytest.raises(ValueError, match=re.escape(message)):
        list(frames.answer(model, picture, phrase, boxes, length="adaptive", end_bias=0.0))


def test_files_to_take_away_do_not_stay(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    from alto_jax.demo import page

    image, mask = np.zeros((9, 9, 3), np.uint8), np.eye(9, dtype=bool)
    found = Prediction(mask, np.float32(mask), "", [], [1, 2], 2, 0.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(frames, "examples", lambda: [(image, "a", "")])
    monkeypatch.setattr(frames, "answer", lambda *args, **options: iter([frames.Frame(image, "", found)]))
    model = types.SimpleNamespace(cfg=types.SimpleNamespace(tokenizer=types.SimpleNamespace(num_latent_tokens=8)))
    [ask] = {one.fn for one in page.build(model, "debug").fns.values() if one.name == "ask"}
    for *_, taken in ask(image, "a", "", "adaptive", 4, 0.0):
        assert taken is None or [pathlib.Path(file).stat().st_size > 0 for file in taken] == [True] * 3
    assert len(taken) == 3 and not list(tmp_path.glob("alto_jax_demo_*"))


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "127.0.0.1"])
def test_what_cannot_be_listened_at_is_named(host):
    pytest.importorskip("gradio")
    from alto_jax.demo import page

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--host={re.escape(host)} --port={port}: \[Errno -?\d+\]"):
            page.launch(None, "debug", host, port, wait=False)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_in_a_browser(model, tmp_path):
    """Load, choose, type, click: the mask is shown; the slider changes the number of tokens; nothing from elsewhere."""
    from playwright.sync_api import expect, sync_playwright

    from alto_jax.demo import page

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = page.launch(model, "debug", "127.0.0.1", port, wait=False)
    elsewhere = []

    def only_here(route):
        if "127.0.0.1" in route.request.url or route.request.url.startswith(("data:", "blob:")):
            return route.continue_()
        elsewhere.append(route.request.url)
        return route.abort()

    try:
        with sync_playwright() as player:
            browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            tab = browser.new_page(viewport={"width": 1280, "height": 1000})
            tab.set_default_timeout(60_000)
            expect.set_options(timeout=60_000)
            tab.route("**/*", only_here)
            tab.goto(f"http://127.0.0.1:{port}")
            words = tab.locator("#words textarea")
            tab.locator("#go").click()
            expect(tab.get_by_text("Choose a picture first.")).to_be_visible()
            tab.locator("table tbody tr, .gallery button").first.click()
            expect(tab.locator("#picture img")).to_be_visible()
            expect(tab.locator("#boxes textarea")).to_have_value(re.compile(r"^\d+,\d+,\d+,\d+$"))
            tab.get_by_role("button", name="Clear boxes").click()
            expect(tab.locator("#boxes textarea")).to_have_value("")
            tab.locator("#phrase textarea").fill("the red apple")
            tab.locator("#go").click()
            expect(words).to_have_value(
                re.compile(r"^\d+ tokens, score .*IoU with the mask of all 8 tokens: ", re.DOTALL)
            )
            assert tab.locator("#shown img").get_attribute("src") and tab.locator("#beside img").get_attribute("src")
            for name in ("mask.png", "overlay.png", "answer.json"):
                expect(tab.locator("#taken").get_by_text(name.split(".")[0]).first).to_be_visible()

            tab.locator("#kind").get_by_text("exact").click()

            def ask_for(count):
                tab.locator("#exact input[type=number]").fill(str(count))
                tab.locator("#exact input[type=number]").press("Tab")
                tab.locator("#go").click()
                expect(words).to_have_value(re.compile(rf"^{count} tokens, score "))

            ask_for(3)
            ask_for(6)

            shown = tab.locator("#picture img").bounding_box()
            for across, down in ((0.4, 0.3), (0.6, 0.8)):
                tab.locator("#picture img").click(position={"x": shown["width"] * across, "y": shown["height"] * down})
                tab.wait_for_timeout(500)
            expect(tab.locator("#boxes textarea")).to_have_value(re.compile(r"^\d+,\d+,\d+,\d+$"))
            ask_for(4)
            tab.screenshot(path=tmp_path / "page.png", full_page=True)
            browser.close()
    finally:
        served.close()
    assert (tmp_path / "page.png").stat().st_size > 20_000
    assert elsewhere == []
