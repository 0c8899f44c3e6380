"""docs/site is what the files give, its links lead somewhere, and a browser shows it well at both widths."""

import base64
import html
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from docs import figures
from docs.prose import formula
from helpers import ROOT, environment

SITE = ROOT / "docs/site"
PAGES = sorted(path.name for path in SITE.glob("*.html"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# What a page is measured by, in a copy: widths, texts of too little contrast.
SCRIPT = """<script>addEventListener('load', () => {
  const rgb = s => s.match(/[\\d.]+/g).map(Number), lum = c => c.slice(0, 3).map(v => v / 255).map(
    v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((a, v, i) => a + v * [.2126, .7152, .0722][i], 0)
  const pale = new Set(), walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  for (let node; node = walk.nextNode();) {
    if (!node.data.trim()) continue
    let e = node.parentElement, back = e, style = getComputedStyle(e)
    while (back && (rgb(getComputedStyle(back).backgroundColor)[3] ?? 1) === 0) back = back.parentElement
    const pair = [lum(rgb(e.closest('svg') ? style.fill : style.color)),
                  lum(back ? rgb(getComputedStyle(back).backgroundColor) : [255, 255, 255])].sort((a, b) => b - a)
    if ((pair[0] + .05) / (pair[1] + .05) < 4.5) pale.add(e.className + ': ' + node.data.slice(0, 30))
  }
  parent.postMessage([innerWidth, document.documentElement.scrollWidth, [...pale]], '*')
})</script>"""


def build(root, out):
    command = [sys.executable, "-m", "docs.build", str(out)]
    return subprocess.run(command, cwd=root, env=environment(), text=True, capture_output=True)


class Page(html.parser.HTMLParser):
    """What a page links to, its anchors, and the names of its elements."""
    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.tags = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        self.anchors += [attributes["id"]] if "id" in attributes else []


def parts(text):
    """A page without its PNG pictures, and these."""
    found = re.findall(r"data:image/png;base64,([^\"]+)", text)
    pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(x)))).astype(int) for x in found]
    return re.sub(r"data:image/png;base64,[^\"]+", "", text), pixels


def test_the_site_is_what_the_files_give(tmp_path):
    """Byte for byte; but rounding of another machine may change a level of a few pixels, and its zlib a file."""
    result = build(ROOT, tmp_path)
    assert result.returncode == 0, result.stderr
    assert PAGES == sorted(path.name for path in tmp_path.iterdir()) and len(PAGES) >= 5
    for name in PAGES:
        (ours, pictures), (theirs, built) = (parts((folder / name).read_text("utf-8")) for folder in (SITE, tmp_path))
        assert ours == theirs, f"{name}: make docs"
        assert [x.shape for x in pictures] == [x.shape for x in built]
        assert all(np.mean(a != b) < 0.02 for a, b in zip(pictures, built))


def test_the_figures_of_the_readme_are_those_of_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for draw in (figures.banner, figures.tasks):
        draw(path := tmp_path / f"{draw.__name__}.png")
        ours, drawn = (np.asarray(Image.open(file)).astype(int) for file in (ROOT / "docs" / path.name, path))
        assert ours.shape == drawn.shape and np.abs(ours - drawn).mean() < 0.5  # fonts and rounding may differ
    assert len(figures.hidden_cells(figures.panels("mfm_mae", figures.ROW)[1])) == 48  # 75 % of 64


def test_a_formula_keeps_all_its_signs():
    text = re.sub("<[^>]+>", "", formula("0.8 mean |c r'p - phi(h O_i)|^2 = sum_k w_k / sqrt(var x + 1e-6)"))
    assert re.sub(r"\s", "", text) == "0.8mean|cr′p−φ(hOi)|2=∑kwk/varx+1e-6"


def test_a_false_shape_stops_the_build(tmp_path):
    for path in [*ROOT.glob("*.py"), *ROOT.glob("docs/*.*"), *ROOT.glob("demo/*.*")]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    text = (ROOT / "mfm_mae.py").read_text("utf-8")
    line = text[:text.index("  # (B, 1+V, E)")].count("\n") + 1
    (tmp_path / "mfm_mae.py").write_text(text.replace("  # (B, 1+V, E)", "  # (B, 1+M, E)"), "utf-8")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode == 1 and "Traceback" not in result.stderr and not (tmp_path / "site/index.html").exists()
    assert re.search(rf"mfm_mae\.py:{line}: # \(B, 1\+M, E\): is \(2, 17, 64\)", result.stderr)


def test_pages_are_whole_small_and_alone():
    pages = {name: Page((SITE / name).read_text("utf-8")) for name in PAGES}
    for name, page in pages.items():
        assert page.tags & {"script", "iframe", "object", "embed"} == set()
        assert len(page.anchors) == len(set(page.anchors)), name
        for link in (link for link in page.links if not link.startswith(("https://", "data:"))):
            path, _, anchor = link.partition("#")
            assert not anchor or anchor in pages[path or name].anchors, f"{name}: {link}"
            assert (SITE / path).exists(), f"{name}: {link}"
        text = re.sub(r'<a href="https://[^>]*>', "", (SITE / name).read_text("utf-8"))
        assert not re.search(r"(src|href)=[\"']?http|url\(|@import|/tmp/|/root/|/work/", text), name
    assert sum(path.stat().st_size for path in SITE.iterdir()) < 3e6


@pytest.mark.skipif(not CHROMIUM, reason="there is no chromium: apt-get install chromium")
@pytest.mark.parametrize("name", PAGES)
def test_a_browser_shows_it(tmp_path, name):
    """On a phone's width and on a desktop's, light and dark: no error, nothing too wide, enough contrast."""
    text, frames = (SITE / name).read_text("utf-8").replace("</head>", SCRIPT + "</head>"), ""
    for scheme, rule in (("light", "not all"), ("dark", "min-width: 1px")):
        (tmp_path / f"{scheme}.html").write_text(text.replace("prefers-color-scheme: dark", rule), "utf-8")
        frames += "".join(f"<iframe src={scheme}.html width={width} height=900></iframe>" for width in (360, 1400))
    (tmp_path / "all.html").write_text("<title>[]</title><script>onmessage = event => document.title = JSON.stringify("
                                       "[...JSON.parse(document.title), event.data])</script>" + frames)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
               f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{tmp_path}/all.html"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", result.stdout)[1]))
    assert sorted(width for width, _, _ in found) == [360, 360, 1400, 1400]
    assert all(content <= width and not pale for width, content, pale in found), found
    assert "CONSOLE" not in result.stderr
