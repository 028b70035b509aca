"""The notebooks as a person sees them: run in JupyterLab, and read as committed, in Chromium.

`make browser-test` runs these minutes. Look at the screenshots in build/browser/ afterwards: what
is ugly passes.
"""

import json
import os
import secrets
import shutil
import socket
import sys
import time
from contextlib import contextmanager

import nbformat
import psutil
import pytest
from helpers import ROOT
from nbconvert import HTMLExporter
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
SCROLLER = ".jp-WindowedPanel-outer"
PROMPTS = ".jp-CodeCell .jp-InputPrompt"
WIDGET = r"\b([HV]Box|FloatProgress|IntProgress)\(|(Loading|Error displaying) widget"
# What a reader would trip over; JupyterLab and nbconvert name their elements alike.
BLEMISHES = (
    r"""
const found = [];
const outputs = [...document.querySelectorAll(".jp-OutputArea-output")];
for (const output of outputs) {
  const note = what => found.push(`${what}: ${output.innerText.trim().slice(0, 200)}`);
  if (output.matches("[data-mime-type$=stderr], [data-mime-type$=error]")) note("error, warning");
  if (/WIDGET/.test(output.textContent)) note("widget as text");
  for (const part of [output, ...output.querySelectorAll("*")])
    if (part.clientWidth && part.scrollWidth > part.clientWidth + 1)
      note(`${part.tagName} of ${part.scrollWidth} px in ${part.clientWidth}`);
  for (const part of output.querySelectorAll("img, table"))
    if (part.getBoundingClientRect().right > output.getBoundingClientRect().right + 1)
      note(`${part.tagName} sticks out`);
  for (const cell of output.querySelectorAll("td, th"))
    if (cell.textContent.endsWith("...")) note("text cut by pandas");
  for (const image of output.querySelectorAll("img"))
    if (!(image.complete && image.naturalWidth)) note("image not loaded");
}
return outputs.length ? found : ["no outputs"];
"""
).replace("WIDGET", WIDGET)


@contextmanager
def browser(name, width_px, height_px):
    """A browser that sees this machine alone; a screenshot is left where the test fails in it."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    for old in SHOTS.glob(f"{name}-*.png"):
        old.unlink()
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "headless=new",
        "no-sandbox",  # which root cannot have
        "disable-dev-shm-usage",  # small in containers
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(f"--{argument}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        size = {"width": width_px, "height": height_px, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        yield driver
    except BaseException:
        driver.save_screenshot(SHOTS / f"{name}-failed.png")
        raise
    finally:
        driver.quit()


def wait(driver, condition, limit_s, what):
    return WebDriverWait(driver, limit_s).until(
        lambda _: condition(), f"waited {limit_s} s for {what}"
    )


def photograph(driver, name, scroller):
    """Screenshots of the whole length, a page each."""
    lengths = "return [arguments[0].scrollHeight, arguments[0].clientHeight]"
    total_px, page_px = driver.execute_script(lengths, scroller)
    for page, top_px in enumerate(range(0, total_px, page_px), start=1):
        driver.execute_script("arguments[0].scrollTop = arguments[1]", scroller, top_px)
        driver.save_screenshot(SHOTS / f"{name}-{page:02}.png")


def copy_without_outputs(root):
    """What notebooks need of the checkout."""
    for folder in ("backbones", "utils", "notebooks", "results"):
        shutil.copytree(ROOT / folder, root / folder)
    for path in root.glob("notebooks/*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.update(outputs=[], execution_count=None)
        nbformat.write(notebook, path)


def own_jupyter(folder):
    """The environment of a Jupyter that neither uses nor changes anybody's state."""
    for name, settings in {
        # All cells in the document at once, so that all can be looked at.
        "notebook-extension/tracker": {"windowingMode": "none", "scrollPastEnd": False},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }.items():
        path = folder / "LAB_SETTINGS" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    kinds = ("LAB_SETTINGS", "LAB_WORKSPACES", "CONFIG", "DATA", "RUNTIME")
    places = {f"JUPYTER{'_' * (kind[:3] != 'LAB')}{kind}_DIR": folder / kind for kind in kinds}
    return os.environ | {"IPYTHONDIR": str(folder)} | {k: str(v) for k, v in places.items()}


def stop(server, limit_s=60):
    """Ends a server, its kernels and their workers, also those that it would leave behind."""
    family = [server, *server.children(recursive=True)] if server.is_running() else []
    for process in family[:1]:
        process.terminate()
    for process in psutil.wait_procs(family, timeout=limit_s)[1]:
        process.kill()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the checkout: its folder, address and token."""
    root = tmp_path_factory.mktemp("lab")
    copy_without_outputs(root)
    token = secrets.token_hex()
    env = own_jupyter(root / "jupyter") | {"PYTHONPATH": str(root), "JUPYTER_TOKEN": token}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={root}"]
    log = root / "log"
    with log.open("w") as out:
        server = psutil.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        for _ in range(600):
            with socket.socket() as client:
                if server.poll() is not None or not client.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.2)
        assert server.poll() is None, log.read_text()
        yield root, f"http://127.0.0.1:{port}/lab/tree", token
    finally:
        stop(server)


def choose(driver, menu, item):
    """By the mouse, as a person does."""
    for kind, text in (("MenuBar", menu), ("Menu", item)):
        label = f"//div[contains(@class, 'lm-{kind}-itemLabel') and .='{text}']"
        found = wait(driver, lambda xpath=label: driver.find_element(By.XPATH, xpath), 60, text)
        found.click()


def texts(driver, css):
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(found => found.textContent)", css
    )


def counts(path):
    """What a saved notebook's code cells say of when they were executed."""
    cells = nbformat.read(path, as_version=4).cells
    return [cell.execution_count for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", DRIVEN, ids=lambda path: path.name)
def test_a_person_presses_run_all(lab, path):
    root, address, token = lab
    saved = root / "notebooks" / path.name
    in_order = list(range(1, len(counts(path)) + 1))
    bars = set()

    def idle():  # not the toolbar's circle, which says so before there is a kernel
        return any(text.endswith("| Idle") for text in texts(driver, ".jp-StatusBar-TextItem"))

    def pending():
        return "[*]:" in texts(driver, PROMPTS)

    def finished():
        return not pending() and idle()

    def progress():
        bars.update(text for text in texts(driver, ".jp-OutputArea-output") if "%|" in text)
        return len(bars) > 2 or finished()

    with browser(path.stem, 1400, 1000) as driver:
        # Without the tabs that the test before this one had open.
        driver.get(f"{address}/notebooks/{path.name}?token={token}&reset")
        wait(driver, idle, 120, "an idle kernel")
        choose(driver, "Run", "Run All Cells")
        wait(driver, pending, 60, "the first cell to start")
        wait(driver, progress, 600, "a progress bar that moves twice")
        assert len(bars) > 2
        assert pending()
        bar = driver.find_element(By.XPATH, "//pre[contains(., '%|')]")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", bar)
        driver.save_screenshot(SHOTS / f"{path.stem}-running.png")
        wait(driver, finished, 1800, "the last cell")
        photograph(driver, path.stem, driver.find_element(By.CSS_SELECTOR, SCROLLER))
        assert driver.execute_script(BLEMISHES) == []
        assert texts(driver, PROMPTS) == [f"[{count}]:" for count in in_order]
        choose(driver, "File", "Save Notebook")
        wait(driver, lambda: counts(saved) == in_order, 60, "the saved notebook")
    outputs = [out for cell in nbformat.read(saved, 4).cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if {"error", "stderr"} & {out.output_type, out.get("name")}]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_notebooks_read_well(path, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(HTMLExporter().from_filename(path)[0], encoding="utf-8")
    with browser(f"static-{path.stem}", 1000, 1400) as driver:
        driver.get(page.as_uri())
        loaded = "return [...document.images].every(image => image.complete)"
        wait(driver, lambda: driver.execute_script(loaded), 60, "the images")
        photograph(driver, f"static-{path.stem}", driver.find_element(By.TAG_NAME, "html"))
        assert driver.execute_script(BLEMISHES) == []
