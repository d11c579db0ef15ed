"""The page decides as the classifier does, whatever cells are chosen."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image

from heedful.inspect import CorrespondenceClassifier, write_correspondence_page

G = 4
NAMES = {0: "a </script> wren", 1: "a lark"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(30, 6, G, G, generator=generator)
    labels = torch.randint(0, 4, (30,), generator=generator)
    classifier = CorrespondenceClassifier(maps, labels, neighbours=20, votes=7, top=3)
    query = torch.randn(6, G, G, generator=generator)
    path = tmp_path_factory.mktemp("page") / "page.html"
    found = classifier(query)
    pictures = [Image.new("L", (8, 8), int(i)) for i in found.neighbours]
    write_correspondence_page(found, path, query=Image.new("RGB", (400, 300)), pictures=pictures, names=NAMES)
    return classifier, query, path.read_text("utf-8")


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_everything(made):
    classifier, query, page = made
    told, found = data_of(page), classifier(query)
    assert told["query"].startswith("data:image/jpeg") and told["mask"] is None
    assert [n["place"] for n in told["neighbours"]] == found.neighbours.tolist()
    assert {n["name"] for n in told["neighbours"] if n["label"] in (0, 2)} == {NAMES[0], "2"}
    assert all(n["picture"].startswith("data:image/png") for n in told["neighbours"])
    similarity = torch.tensor([n["similarity"] for n in told["neighbours"]])
    torch.testing.assert_close(similarity, found.similarity.flatten(1), rtol=0, atol=1e-6)
    assert not re.search(r'(src|href)="http', page)


# Appended to the page: decides for masks, clicks cells, and writes down what came of it.
PROBE = """
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const text = id => document.getElementById(id).textContent;
const told = () => [text("decision"), text("before"), document.querySelectorAll("#query .cell.on").length];
const found = { decided: MASKS.map(mask => decide(data, mask)), shown: [told()] };
const cells = document.querySelectorAll("#query .cell");
document.getElementById("none").click();
found.shown.push(told());
for (const z of [5, 6, 7]) cells[z].dispatchEvent(new MouseEvent("click"));
cells[7].dispatchEvent(new KeyboardEvent("keydown", { key: " " }));
found.shown.push(told());
cells[6].dispatchEvent(new MouseEvent("mouseenter"));
const matches = [...document.querySelectorAll("#neighbours .match")];
found.matches = matches.map(e => [e.getAttribute("y"), e.getAttribute("x")]);
document.getElementById("automatic").click();
found.shown.push(told());
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
document.body.appendChild(out);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_page_decides_as_the_classifier(made, tmp_path):
    classifier, query, page = made
    masks = [torch.rand(G, G, generator=torch.Generator().manual_seed(i)) > 0.6 for i in range(8)]
    masks.append(torch.zeros(G, G, dtype=torch.bool))
    told = json.dumps([None, *(mask.flatten().int().tolist() for mask in masks)])
    file = tmp_path / "probed.html"
    file.write_text(page.replace("</body>", PROBE.replace("MASKS", told) + "</body>"), "utf-8")
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--virtual-time-budget=3000", "--dump-dom", file.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]))

    first = classifier(query)
    for mask, own in zip([None, *masks], found["decided"], strict=True):
        wanted = classifier(query, mask=mask)
        assert (own["prediction"], own["votes"]) == (wanted.prediction, wanted.votes)
        assert first.neighbours[own["order"]].tolist() == wanted.neighbours.tolist()
        ranked = [own["scores"][i] for i in own["order"]]
        assert ranked == pytest.approx(wanted.scores.tolist(), abs=2e-6)  # six digits are kept

    own = torch.zeros(G, G, dtype=torch.bool)
    own[1, 1] = own[1, 2] = True
    after = classifier(query, mask=own)
    name = {**{i: str(i) for i in range(4)}, **NAMES}
    opened, emptied, clicked, back = found["shown"]
    automatic = f"{first.votes} of 7 votes · automatic mask"
    assert opened[:2] == [name[first.prediction], automatic] and back == opened
    assert emptied[0] == opened[0] and "no cell is chosen" in emptied[1] and emptied[2] == 0
    assert clicked[0] == name[after.prediction] and clicked[2] == 2
    assert clicked[1].startswith(f"{after.votes} of 7 votes")
    matches = sorted([int(y), int(x)] for y, x in found["matches"])
    assert matches == sorted(first.cells[:, 6].tolist())


def test_opens_with_the_given_mask(made, tmp_path):
    classifier, query, _ = made
    mask = torch.eye(G, dtype=torch.bool)
    found = classifier(query, mask=mask)
    black = Image.new("L", (8, 8))
    write_correspondence_page(found, tmp_path / "a.html", query=black, pictures=[black] * 20)
    assert data_of((tmp_path / "a.html").read_text("utf-8"))["mask"] == mask.flatten().int().tolist()


@pytest.mark.door
def test_refuses_too_few_pictures(made, tmp_path):
    classifier, query, _ = made
    black = Image.new("L", (8, 8))
    with pytest.raises(ValueError, match="pictures are 3, must be 20"):
        write_correspondence_page(classifier(query), tmp_path / "a.html", query=black, pictures=[black] * 3)
