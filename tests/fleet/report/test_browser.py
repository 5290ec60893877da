"""Pages as a browser shows them: nothing is loaded, nothing is wider than a phone.

A page of our own holds the tested one in a frame as wide as a phone or a desk, and
measures it from there; the server that hands out both sees all that is asked for.
"""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from PIL import Image

from fleet.records import ClientReport, RoundReport, RunRecord
from fleet.report import write_comparison, write_page
from fleet.report.grid import Grid
from fleet.report.rows import Row

MIB = 2**20
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
MEASURING = r"""<!doctype html><meta charset=utf-8><title>measuring</title>
<body style="margin:0"><iframe src="report.html" style="border:0;width:WIDTHpx;height:800px">
</iframe><script>
addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  const boxes = [...page.querySelectorAll("figure svg")].map((svg) => {
    const box = svg.getBoundingClientRect();
    return { left: box.left, right: box.right, height: box.height };
  });
  const letters = [...page.querySelectorAll("figure svg text")].map((text) =>
    text.getBoundingClientRect().height);
  const range = page.createRange();
  const wide = [...page.querySelectorAll(".wide")].map((div) =>
    ({ hidden: div.scrollWidth - div.clientWidth, layers: page.defaultView.getComputedStyle(div)
      .backgroundAttachment }));
  // Words of the first table that are broken over two lines.
  const walker = page.createTreeWalker(page.querySelector("tbody").closest("div"),
    NodeFilter.SHOW_TEXT);
  const torn = [];
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    for (const word of text.data.matchAll(/[^\s=,]+/g)) {
      range.setStart(text, word.index);
      range.setEnd(text, word.index + word[0].length);
      if (range.getClientRects().length > 1) torn.push(word[0]);
    }
  }
  document.body.textContent = "measured" + JSON.stringify({ wide, torn,
    width: page.documentElement.scrollWidth, boxes, smallest: Math.min(...letters),
    title: page.title, words: page.body.innerText.length }) + "measured";
});
</script>"""

pytestmark = pytest.mark.skipif(
    not BROWSER, reason="no Chromium on this machine: install the package chromium"
)


def client(name, blocks):
    return ClientReport(
        name=name, blocks=blocks, num_examples=5, loss=0.5, peak_bytes=MIB * blocks, seconds=1.0
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Six runs of unequal devices, some with long names, some refused."""
    folder = tmp_path_factory.mktemp("runs")
    records = []
    for i in range(6):
        record = RunRecord.create(str(folder / f"run-{i}"), {})
        for n in range(8):
            names = [f"raspberry-pi-in-the-greenhouse-number-{c:02d}" for c in range(6)]
            clients = tuple(client(name, 1 + 2 * (c % 3)) for c, name in enumerate(names[:5]))
            record.add_round(
                RoundReport(
                    server_round=n,
                    accuracy=0.1 + 0.1 * n * (1 - 0.1 * i),
                    loss=1.0,
                    bytes_up=3 * MIB * n,
                    bytes_down=MIB * n,
                    peak_client_bytes=(5 + i) * MIB,
                    clients=clients if n else (),
                    asked=tuple(names) if n else (),
                    refused={names[5]: "head.weight holds NaN or infinity; " * 6} if n else {},
                    coverage={f"blocks.{b}.conv.weight": 5 - b for b in range(5)} if n else {},
                    bytes_by_client={name: (MIB, MIB) for name in names},
                    accuracy_by_client={name: (5, 0.1 * c) for c, name in enumerate(names)},
                )
            )
        records.append(record)
    return records


@pytest.fixture(scope="module", params=["run", "comparison"])
def page(request, records, tmp_path_factory):
    """The folder of a `report.html`."""
    if request.param == "run":
        write_page(records[0], records[1:2])
        return records[0].path
    folder = tmp_path_factory.mktemp("comparison")
    rows = [
        Row(f"strategy={name}, blocks=1,3,5", {0: records[i], 1: records[i + 3]}, {2: "killed"})
        for i, name in enumerate(("fedavg", "fedadam", "fedyogi"))
    ]
    cells = [(row.name, *["12.3 ± 4.5"] * 9) for row in rows]
    columns = ("row", *(f"column {i}" for i in range(9)))
    write_comparison(folder, "Three strategies", rows, [Grid("All", columns, cells, named=True)])
    return folder


@pytest.fixture
def browse(page, tmp_path):
    """Function of browser flags and a path → what it prints; and the paths that it asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(page))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(path, *flags):
        address = f"http://127.0.0.1:{server.server_address[1]}/{path}"
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        command = [BROWSER, *FLAGS, profile, "--enable-logging=stderr", *flags, address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    yield run, asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_fits_the_screen_and_loads_nothing(page, browse, width):
    run, asked = browse
    (page / "measuring.html").write_text(MEASURING.replace("WIDTH", str(width)))
    try:
        shown, complaints = run("measuring.html", "--dump-dom", f"--window-size={width},900")
    finally:
        (page / "measuring.html").unlink()
    measured = json.loads(re.search("measured({.*?})measured", shown).group(1))
    assert complaints == []
    assert set(asked) <= {"/measuring.html", "/report.html", "/favicon.ico"}
    assert measured["width"] <= width
    assert len(measured["boxes"]) >= 5
    for box in measured["boxes"]:
        assert box["left"] >= 0 and box["right"] <= width and box["height"] > 40
    assert measured["smallest"] >= 9  # pixels of a letter's line
    assert measured["words"] > 300 and measured["title"]
    assert measured["torn"] == []
    for table in measured["wide"]:  # shadows stay at edges, covers move with the table
        assert table["layers"] == ", ".join(["local"] * 3 + ["scroll"] * 3)
        assert table["hidden"] <= 0 or width < 1000


@pytest.mark.parametrize("width", [360, pytest.param(1280, marks=pytest.mark.slow)])
def test_a_page_opened_from_a_file_is_drawn(page, tmp_path, width):
    picture = tmp_path / "page.png"
    command = [
        BROWSER,
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={picture}",
        f"--window-size={width},3000",
        Path(page / "report.html").as_uri(),
    ]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    image = Image.open(picture).convert("RGB")
    assert image.size == (width, 3000)
    colours = image.getcolors(1 << 24)
    assert len(colours) > 500  # letters and lines, smoothed
    drawn = sum(count for count, colour in colours if colour != (255, 255, 255))
    assert 0.01 < drawn / (width * 3000) < 0.6
