"""The HTML page: complete, valid, without outside resources, and safe with any names."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from test_figures import make_run

from fastafd.reporting import figures
from fastafd.reporting.markdown import Table, markdown
from fastafd.reporting.page import seconds_by_part, tables_html, write_page

VOID = {"meta", "img", "circle", "rect", "path", "polyline"}  # elements of the page without an end tag


class Page(HTMLParser):
    """The elements as (tag, attributes), and the text outside of <style>; fails if tags are not balanced."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text, self.style = [], [], "", ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            self.style += data
        else:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(tmp_path, runs, tables=(), drawn=()):
    write_page(runs, list(tables), list(drawn), tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text())


def alone(page):
    """Check that the page has no script, loads nothing, and has unique ids, texts for images and links that exist."""
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert "href" not in attributes or attributes["href"].removeprefix("#") in ids
    assert "--line0" in page.style and "url(" not in page.style and "@import" not in page.style
    assert all(image["alt"] for image in page.all("img"))
    assert all(picture["aria-label"] for picture in page.all("svg"))
    return page


def pictures(page):
    by_text = {}
    for image in page.all("img"):
        kind, data = re.fullmatch(r"data:image/(\S+);base64,(.*)", image["src"]).groups()
        by_text[image["alt"]] = (kind, base64.b64decode(data))
    return by_text


def test_one_run(tmp_path):
    run = make_run(tmp_path / "run", changed={"batch_size": 64, "attack.steps": 7})
    page = alone(page_of(tmp_path, [run], [("Results", [Table(["a", "b"], [["x", "1"]])])]))
    assert not page.all("nav")  # one run needs no table of contents
    for said in ("AFD on digits", "CPU, 1 threads", "2026-11-22 07:15 UTC", "2.14.1+cu130", "3.11.7", "magnified 16"):
        assert said in page.text
    assert "batch_size64 not the recipe's" in page.text and "epochs2 not" not in page.text
    assert len(page.all("mark")) == 2
    assert "attack.eps8/255" in page.text
    assert re.search(r"AFD90\.00 \[84\.0, 94\.0\] n=10060\.00 \[50\.0, 70\.0\] n=100not run", page.text)
    points = [line["points"].count(",") for line in page.all("polyline")]
    assert points == [4, 4, 4]  # clean, adversarial, loss: one point for each line of the log


def test_a_run_from_before_settings_had_dotted_names(tmp_path):
    """Its page lists the nested settings as they are."""
    run = make_run(tmp_path / "run")
    del run.result["settings"]
    text = alone(page_of(tmp_path, [run])).text
    assert "attack.steps7" in text and "sgd.epochs2" in text and "pretrainednone" in text


def test_autoattack_by_evaluation_later_is_shown(tmp_path):
    run = make_run(tmp_path / "run")
    later = {"dataset": "digits", "eps": "8/255", "autoattack": {"accuracy": 0.45, "interval": [0.26, 0.66], "n": 20}}
    (run.folder / "evaluation-autoattack.json").write_text(json.dumps(later))
    assert re.search(
        r"AFD90\.00 \[84\.0, 94\.0\] n=10060\.00.{0,20}n=10045\.00 \[26\.0, 66\.0\] n=20", page_of(tmp_path, [run]).text
    )


def test_examples_show_what_was_kept(tmp_path):
    run = make_run(tmp_path / "run")
    by_text = pictures(alone(page_of(tmp_path, [run])))
    kept = run.samples

    def pixels(alt):
        assert by_text[alt][0] == "png"
        return np.asarray(Image.open(io.BytesIO(by_text[alt][1])))

    assert np.array_equal(pixels("clean image of cat, taken for cat"), kept["images"][0])
    change = kept["perturbation"][2].astype(np.float64)
    attacked = np.clip(kept["images"][2] / 255 + change, 0, 1)
    assert np.abs(pixels("attacked image of eel, taken for dog") / 255 - attacked).max() < 1 / 255
    magnified = pixels("its perturbation, magnified 16 times").astype(
        float
    )  # the last picture with that text: the third image's
    assert np.abs(magnified / 255 - (change * 255 / 8 * 0.5 + 0.5)).max() < 1 / 255


def test_names_are_escaped(tmp_path):
    bad = "<b>&\"'</b>"
    run = make_run(tmp_path / "<i>run&", classes=[bad, "dog", "eel"], dataset=bad, changed={bad: bad})
    run.settings[bad] = run.result["device"] = bad
    page = alone(
        page_of(
            tmp_path, [run, run], [(bad, [Table([bad, "b"], [["x", bad]], title=bad, notes=[bad], left_out=[bad])])]
        )
    )
    assert not {"b", "i"} & {tag for tag, _ in page.elements}
    assert page.text.count(bad) >= 12 and "<i>run&" in page.text
    assert f"clean image of {bad}, taken for {bad}" in {image["alt"] for image in page.all("img")}


def test_several_runs_without_samples(tmp_path):
    runs = [make_run(tmp_path / f"run{index}", samples=False, pretraining=None) for index in range(3)]
    page = alone(page_of(tmp_path, runs))
    assert len(page.all("nav")) == 1 and len(page.all("a")) == 4
    assert not page.all("img") and page.text.count("kept no examples") == 3
    assert page.text.count("not known") == 3


def test_a_run_of_no_steps(tmp_path):
    run = make_run(tmp_path / "run")
    (run.folder / "metrics.jsonl").write_text("")
    assert not alone(page_of(tmp_path, [run])).all("svg")


def test_figures_are_inlined(tmp_path):
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run", samples=False)
    drawn = [figures.feature_gap([run], tmp_path)]
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    page = alone(page_of(tmp_path, [run], drawn=[*drawn, tmp_path / "other.png"]))
    svg, png = pictures(page).values()
    assert svg == ("svg+xml", drawn[0].with_suffix(".svg").read_bytes())
    assert png == ("png", (tmp_path / "other.png").read_bytes())
    assert figures.CAPTIONS["figure1a"][1] in page.text


def test_every_second_is_in_one_part(tmp_path):
    run = make_run(tmp_path / "run")
    parts = seconds_by_part(run)
    assert parts == {"pre-training": 2.0, "data": 1.5, "attack": 6.0, "other": 2.5, "evaluation": 3.0}
    page = page_of(tmp_path, [run])
    widths = [
        float(span["style"].removeprefix("width:").removesuffix("%")) for span in page.all("span") if "style" in span
    ]
    assert widths == pytest.approx([100 * spent / 15 for spent in parts.values()], abs=0.001)


def test_a_table_is_rendered_twice():
    """As HTML and as Markdown, with the same cells; a bar inside a cell does not end it."""
    tables = [
        Table(["a", "b"], [["`x`", "1 [0.1, 0.2]"], ["a | b", "<two>"]], title="first"),
        Table(["c"], [["**3**"]], notes=["A note."], left_out=["runs/x: of a sweep", "runs/y: seed 1"]),
    ]
    page = Page(tables_html(tables))
    assert [len(page.all(tag)) for tag in ("table", "tr", "td", "li", "p")] == [2, 5, 2, 2, 3]
    assert not page.all("strong") and not page.all("code")  # a cell is text, not Markdown
    for text in ("`x`", "1 [0.1,\N{NO-BREAK SPACE}0.2]", "a | b", "<two>", "**3**", "A note.", "runs/y: seed 1"):
        assert text in page.text
    assert markdown(tables) == (
        "first\n\n| a | b |\n|---|---|\n| `x` | 1 [0.1, 0.2] |\n| a \\| b | <two> |\n\n"
        "| c |\n|---|\n| **3** |\n\nA note.\n\nLeft out:\n\n- runs/x: of a sweep\n- runs/y: seed 1"
    )
