"""A headless browser: what a page looks like to its reader after its scripts have run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # The console's messages are written to stderr, and timers run until the page is quiet.
    *("--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"),
)


def find_browser() -> str:
    """The path of Chromium. The test is skipped if there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium; install the package chromium of the distribution")
    return found


def run_in_browser(page: Path, script: str, *, width: int = 800, height: int = 600) -> tuple[Any, list[str]]:
    """Open a page, then run a script in it.

    Args:
        page: an HTML file. A copy beside it, with the script at its end, is what the browser opens.
        script: the body of a JavaScript function, which returns something that JSON can express.
        width: of the window, in pixels.
        height: likewise.

    Returns:
        What the script returned, and the messages on the console, among them all errors.
    """
    browser = find_browser()
    source = page.read_text(encoding="utf-8")
    head, end, tail = source.rpartition("</body>")
    assert end, "the page has no body"
    record = (
        f"<script>const result = document.createElement('pre'); result.id = 'test-result';"
        f"result.textContent = encodeURIComponent(JSON.stringify((function () {{ {script} }})()));"
        f"document.body.append(result);</script>"
    )
    copy = page.with_name(f"{page.stem}_in_browser.html")
    copy.write_text(f"{head}{record}{end}{tail}", encoding="utf-8")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            *FLAGS,
            f"--window-size={width},{height}",
            f"--user-data-dir={profile}",
            copy.absolute().as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    match = re.search(r'<pre id="test-result">([^<]*)</pre>', done.stdout)
    assert match, f"the script did not return: {messages}"
    return json.loads(unquote(match[1])), messages


# What a reader sees of the present step in the step player.
STEP_TOOLS = """
    const at = (id) => document.getElementById(id);
    const key = (name, more = {}) => {
        const event = new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true, ...more });
        document.body.dispatchEvent(event);
    };
    const cells = (row) => [...row.cells].map((cell) => cell.innerText.trim());
    const rows = (id = "actions") => [...at(id).querySelectorAll("tr")].map(cells);
    const tree = () => [...at("nodes").querySelectorAll(".row")].filter((row) => row.checkVisibility())
        .map((row) => [...row.children].map((cell) => cell.innerText.trim()));
    const see = () => ({
        where: at("where").innerText, text: at("text").innerText, outcome: at("outcome").innerText,
        rows: rows(), chosen: at("actions").querySelectorAll(".chosen").length,
        bars: [...at("actions").querySelectorAll(".bar i")].map((bar) => bar.style.width),
        values: at("values").innerText.replace(/\\s+/g, " "), predictions: rows("predictions"),
        tree: at("tree").hidden ? null : tree(),
        prompt: at("prompt").hidden ? null : at("prompt").querySelector("pre").textContent,
        slider: [at("slider").value, at("slider").max],
        disabled: ["first", "previous", "next", "last"].filter((id) => at(id).disabled),
    });
"""


def see(page: Path, script: str, *, width: int = 800, height: int = 600) -> Any:
    """Run a script, which can use :data:`STEP_TOOLS`, in a page that logs nothing to the console."""
    result, messages = run_in_browser(page, STEP_TOOLS + script, width=width, height=height)
    assert messages == []
    return result
