"""The page in Chromium: start by keyboard, playback without stalls, words, saved clips, lost connections."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.flash_beep import FlashBeepTalker, flash_beep_talker
from workflows.serving.engine import EngineLimits
from workflows.serving.server import ServerOptions, background_server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: make test-browser"),
]
LIVE = "body[data-phase=live]"
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 800}
RED = """(() => {
    const pen = new OffscreenCanvas(1, 1).getContext("2d");
    pen.drawImage(video, 0, 0, 1, 1);
    const [red, green] = pen.getImageData(0, 0, 1, 1).data;
    return red > 128 && green < 128;
})()"""
SOCKET = re.compile(r"/v1/realtime/video")


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> FlashBeepTalker:
    """Return the stand-in for a network: frames are red while a word is spoken."""
    return flash_beep_talker(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def server(talker: FlashBeepTalker) -> Iterator[str]:
    with background_server(talker, ServerOptions(port=0)) as running:
        yield running.url


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server: str) -> Iterator:
    """Yield the page, ready to start; fail on messages in the console of the browser, refused requests excepted."""
    context = browser.new_context(viewport=DESKTOP)
    tab = context.new_page()
    messages: list[str] = []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.goto(server)
    tab.wait_for_selector("#start:enabled")
    yield tab
    context.close()
    assert [text for text in messages if "status of 4" not in text] == []


def start(tab) -> None:
    tab.click("#start")
    tab.wait_for_selector(LIVE, timeout=60_000)


def say(tab, words: str) -> None:
    tab.fill("#words", words)
    tab.keyboard.press("Enter")


def seconds_of(tab) -> float:
    return tab.evaluate("video.currentTime")


def wait_until(tab, condition: str, seconds: float = 20) -> None:
    """Wait for a JavaScript expression; the page forbids the evaluation that Playwright's own wait uses."""
    for _ in range(round(seconds / 0.1)):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(100)
    raise AssertionError(f"not within {seconds} s: {condition}")


def overflow(tab) -> int:
    return tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def test_keyboard_alone_starts_a_session_that_plays_20_seconds_without_stalls(page, tmp_path: Path):
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "start":
            break
    assert page.evaluate("document.activeElement.matches('#start:focus-visible')")
    page.keyboard.press("Enter")
    page.wait_for_selector(LIVE, timeout=60_000)
    assert page.evaluate("document.activeElement.id") == "words"
    first = seconds_of(page)
    page.wait_for_timeout(20_000)
    assert 19 < seconds_of(page) - first < 22
    assert page.inner_text("[data-metric=buffered] .detail") == "0 stalls"
    assert page.inner_text(".mark") == "Generated"
    page.screenshot(path=tmp_path / "live.png")


def test_typed_words_are_queued_then_spoken_then_said(page):
    start(page)
    page.evaluate(
        """() => {
            window.states = [];
            const note = (changes) => changes.forEach(({ target }) => states.push(target.dataset.state));
            new MutationObserver(note).observe(document.querySelector("#log"),
                { subtree: true, attributeFilter: ["data-state"] });
        }"""
    )
    say(page, "Hello, how are you?")
    page.wait_for_selector("#log [data-state=active]", timeout=60_000)
    wait_until(page, RED)
    assert page.inner_text("#subtitle") == "Hello, how are you?"
    page.wait_for_selector("#log [data-state=done]", timeout=60_000)
    assert [state for state in page.evaluate("states") if state != "sent"] == ["queued", "active", "done"]
    applied = float(page.inner_text("[data-metric=applied] dd:not(.detail)").split()[0])
    assert applied < 3


def test_a_changed_caption_is_applied(page):
    start(page)
    page.fill("#new-caption", "a character with a green face")
    page.keyboard.press("Enter")
    page.wait_for_selector("#log [data-kind=caption][data-state=active], [data-kind=caption][data-state=done]")


def test_a_saved_clip_is_an_mp4_with_sound_and_the_mark_of_generated_media(page, tmp_path: Path):
    start(page)
    wait_until(page, "video.currentTime > 3")
    file = tmp_path / "clip.mp4"
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(file)
    probed = probe(file)
    assert sorted(stream["codec_name"] for stream in probed["streams"]) == ["aac", "h264"]
    assert float(probed["format"]["duration"]) > 3
    assert "enerated" in probed["format"]["tags"]["comment"]


def probe(file: Path) -> dict:
    command = ["ffprobe", "-v", "error", "-show_format", "-show_streams", "-of", "json", str(file)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_a_stopped_session_can_be_played_again(page):
    start(page)
    wait_until(page, "video.currentTime > 2")
    page.click("#stop")
    wait_until(page, "video.controls")
    page.evaluate("video.play()")
    wait_until(page, "video.currentTime > 1")
    assert page.is_enabled("#save")


def test_a_snapshot_is_resumed_from_the_start_page(page):
    start(page)
    wait_until(page, "video.currentTime > 2")
    page.click("#snapshot")
    page.wait_for_selector("#snapshot:has-text('Saved')")
    page.reload()
    page.wait_for_selector("#start:enabled")
    page.click("#snapshots .open")
    page.wait_for_selector(LIVE, timeout=60_000)
    assert int(page.inner_text("#clock").split(":")[1]) >= 2


def test_a_lost_connection_is_resumed_and_the_clip_has_no_gap(page, tmp_path: Path):
    sockets = []

    def relay(socket) -> None:
        socket.connect_to_server()
        sockets.append(socket)

    page.route_web_socket(SOCKET, relay)
    start(page)
    wait_until(page, "video.currentTime > 2")
    page.click("#snapshot")
    page.wait_for_selector("#snapshot:has-text('Saved')")
    sockets[-1].close(code=1012)
    page.wait_for_selector("#notice:has-text('Connection lost.')")
    page.keyboard.press("Enter")  # the Resume button has the focus
    page.wait_for_selector(LIVE, timeout=60_000)
    page.wait_for_timeout(2000)
    file = tmp_path / "clip.mp4"
    with page.expect_download() as download:
        page.click("#save")
    download.value.save_as(file)
    assert frame_gap(file) < 0.1


def frame_gap(file: Path) -> float:
    """Return the longest time between two frames in seconds; infinity if time runs backwards."""
    command = ["ffprobe", "-v", "error", "-select_streams", "v", "-show_entries", "packet=pts_time", "-of", "csv=p=0"]
    text = subprocess.run([*command, str(file)], check=True, capture_output=True, text=True).stdout
    times = [float(line.strip(",")) for line in text.split()]
    steps = [b - a for a, b in zip(times, times[1:], strict=False)]
    return max(steps) if min(steps) > 0 else float("inf")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_page_without_horizontal_scrolling(browser, server: str, scheme: str, tmp_path: Path):
    context = browser.new_context(viewport=PHONE, color_scheme=scheme, has_touch=True)
    tab = context.new_page()
    tab.goto(server)
    tab.wait_for_selector("#start:enabled")
    assert overflow(tab) == 0
    start(tab)
    say(tab, "This is a long sentence that a narrow window has to break into several lines.")
    tab.wait_for_timeout(1000)
    assert overflow(tab) == 0
    tab.screenshot(path=tmp_path / f"phone-{scheme}.png", full_page=True)
    context.close()


@pytest.mark.parametrize(("field", "option"), [("#face-file", None), ("#voices input[type=file]", "input[value=clip]")])
def test_an_upload_of_a_wrong_kind_is_refused_with_the_reason(page, field: str, option: str | None, tmp_path: Path):
    if option:
        page.check(option)
    file = tmp_path / "upload.bin"
    file.write_text("neither a picture nor sound")
    page.set_input_files(field, file)
    if option:
        page.click("#start")
    page.wait_for_selector("#setup-error:visible")
    assert len(page.inner_text("#setup-error")) > 30
    page.check("#voices input[type=radio] >> nth=0")
    start(page)


def test_a_full_server_is_tried_again_until_there_is_a_place(browser, talker: FlashBeepTalker):
    options = ServerOptions(port=0, token="secret", limits=EngineLimits(sessions=1, retry_seconds=2))
    with background_server(talker, options) as running, browser.new_context(viewport=DESKTOP) as context:
        first, second = context.new_page(), context.new_page()
        for tab in (first, second):
            tab.goto(f"{running.url}?token=secret")
            tab.wait_for_selector("#start:enabled")
        start(first)
        second.click("#start")
        second.wait_for_selector("#notice:has-text('1 of 1 sessions are in use')")
        first.click("#stop")
        second.wait_for_selector(LIVE, timeout=60_000)
