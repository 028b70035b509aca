"""Notebooks in Chromium: run in JupyterLab, and read as committed.

`make browser-test` runs these for minutes. Look at the screenshots in build/browser/ afterwards:
the tests cannot see what is ugly.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial

import nbformat
import pytest
from helpers import ROOT
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ClearOutputPreprocessor
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]
SHOTS = ROOT / "build" / "browser"
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
DRIVEN = [path for path in NOTEBOOKS if path.name[:2] in ("03", "04", "08")]
OUTPUT, PROMPT = ".jp-OutputArea-output", ".jp-CodeCell .jp-InputPrompt"
# JupyterLab and nbconvert name their elements alike.
FIND_DEFECTS = r"""
const found = [], outputs = [...document.querySelectorAll(".jp-OutputArea-output")];
for (const output of outputs) {
  const note = what => found.push(`${what}: ${output.innerText.trim().slice(0, 200)}`);
  if (output.matches("[data-mime-type$=stderr], [data-mime-type$=error]")) note("error, warning");
  if (/[HV]Box\(|Progress\(|displaying widget/.test(output.textContent)) note("widget as text");
  for (const part of [output, ...output.querySelectorAll("*")])
    if (part.clientWidth && part.scrollWidth > part.clientWidth + 1) note("wider than its place");
  for (const part of output.querySelectorAll("img, table"))
    if (part.getBoundingClientRect().right > output.getBoundingClientRect().right + 1)
      note(`${part.tagName} is cut off`);
  for (const cell of output.querySelectorAll("td, th"))
    if (cell.textContent.endsWith("...")) note("text shortened by pandas");
  for (const image of output.querySelectorAll("img"))
    if (!(image.complete && image.naturalWidth)) note("image not loaded");
}
return outputs.length ? found : ["no outputs"];
"""


@contextmanager
def browser(name, width_px, height_px):
    """A browser that reaches this machine only; a screenshot shows what it saw last."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # There is no sandbox for root, and little shared memory in containers.
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
    options.add_argument(f"--window-size={width_px},{height_px}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.save_screenshot(SHOTS / f"{name}-last.png")
        driver.quit()


def wait(driver, limit_s, condition):
    WebDriverWait(driver, limit_s).until(lambda _: condition())


def texts(driver, css):
    script = "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent)"
    return driver.execute_script(script, css)


def photograph(driver, name, css):
    """Screenshots of the complete page, one per screen."""
    scroller = driver.find_element(By.CSS_SELECTOR, css)
    script = "return [arguments[0].scrollHeight, arguments[0].clientHeight]"
    total_px, page_px = driver.execute_script(script, scroller)
    for page, top_px in enumerate(range(0, total_px, page_px), start=1):
        driver.execute_script("arguments[0].scrollTop = arguments[1]", scroller, top_px)
        driver.save_screenshot(SHOTS / f"{name}-{page:02}.png")


def execution_counts(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell.execution_count for cell in cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the checkout, with a home of its own: its folder and URL."""
    root = tmp_path_factory.mktemp("lab")
    for folder in ("backbones", "utils", "notebooks", "results"):
        shutil.copytree(ROOT / folder, root / folder)
    settings = root / ".jupyter/lab/user-settings/@jupyterlab/notebook-extension"
    settings.mkdir(parents=True)
    all_cells = '{"windowingMode": "none"}'  # also those outside of the window are in the page
    (settings / "tracker.jupyterlab-settings").write_text(all_cells)
    env = {"HOME": str(root), "PYTHONPATH": str(root), "JUPYTER_TOKEN": "secret"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", f"--ServerApp.root_dir={root}"]
    with subprocess.Popen(command, env=os.environ | env) as server:
        while server.poll() is None and socket.socket().connect_ex(("127.0.0.1", port)):
            time.sleep(0.2)
        yield root, f"http://127.0.0.1:{port}/lab/tree/notebooks"
        server.terminate()


@pytest.mark.parametrize("path", DRIVEN, ids=lambda path: path.name)
def test_run_all_cells(lab, path):
    root, url = lab
    saved = root / "notebooks" / path.name
    cleared, _ = ClearOutputPreprocessor().preprocess(nbformat.read(saved, as_version=4), {})
    nbformat.write(cleared, saved)
    bars = set()

    def idle():  # not the toolbar's circle, which is idle before there is a kernel
        return any(text.endswith("| Idle") for text in texts(driver, ".jp-StatusBar-TextItem"))

    def finished():
        return "[*]:" not in texts(driver, PROMPT) and idle()

    def progressed():
        bars.update(text for text in texts(driver, OUTPUT) if "%|" in text)
        return len(bars) > 2 or finished()

    def choose(menu, item):
        for kind, text in (("MenuBar", menu), ("Menu", item)):
            label = f"//div[contains(@class, 'lm-{kind}-itemLabel') and .='{text}']"
            wait(driver, 60, partial(driver.find_elements, By.XPATH, label))
            driver.find_element(By.XPATH, label).click()

    with browser(path.stem, 1400, 1000) as driver:
        driver.get(f"{url}/{path.name}?token=secret&reset")
        wait(driver, 120, idle)
        choose("Run", "Run All Cells")
        wait(driver, 60, lambda: "[*]:" in texts(driver, PROMPT))
        wait(driver, 600, progressed)
        assert len(bars) > 2
        wait(driver, 1800, finished)
        photograph(driver, path.stem, ".jp-WindowedPanel-outer")
        assert driver.execute_script(FIND_DEFECTS) == []
        choose("File", "Save Notebook")
        in_order = list(range(1, len(execution_counts(path)) + 1))
        wait(driver, 60, lambda: execution_counts(saved) == in_order)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_notebooks_read_well(path, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(HTMLExporter().from_filename(path)[0], encoding="utf-8")
    with browser(f"static-{path.stem}", 1000, 1400) as driver:
        driver.get(page.as_uri())
        loaded = "return [...document.images].every(image => image.complete)"
        wait(driver, 60, partial(driver.execute_script, loaded))
        photograph(driver, f"static-{path.stem}", "html")
        assert driver.execute_script(FIND_DEFECTS) == []
