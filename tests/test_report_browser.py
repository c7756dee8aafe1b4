"""The report as a browser shows it: nothing fetched, nothing cut, readable on a phone, in the dark and on paper."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest
from report_runs import write_run

from autotool_fast.report import write_comparison, write_report
from benchmarks import screenshots
from benchmarks.browser import Browser, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the PATH")

OPEN_FOLDS = "document.querySelectorAll('details').forEach(d => d.open = true)"
CLOSE_FOLDS = "document.querySelectorAll('details').forEach(d => d.open = false)"

# pairs of labels of one chart whose boxes share more than 2 pixels each way, and labels that leave the chart's card
CROWDED = """[...document.querySelectorAll('svg.chart')].flatMap(svg => {
  const card = svg.closest('figure').getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  const outside = b => b.width && (b.left < card.left || b.right > card.right);
  const found = texts.filter(([, b]) => outside(b)).map(([t]) => t + ' leaves');
  texts.forEach(([s, a], i) => texts.slice(i + 1).forEach(([t, b]) => {
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    // boxes of text are taller than its letters
    if (wide > 2 && high > 0.35 * Math.min(a.height, b.height)) found.push(s + ' on ' + t);
  }));
  return found.map(f => svg.getAttribute('aria-label').slice(0, 40) + ': ' + f);
})"""

# texts whose contrast with what is behind them is below 4.5, the threshold of WCAG 2 (1.4.3)
FAINT = """(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => v <= .03928 * 255 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const found = new Set();
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || ['SCRIPT', 'STYLE', 'title'].includes(e.tagName) || !e.checkVisibility()) continue;
    const style = getComputedStyle(e);
    const [a, b] = [parse(e.tagName === 'text' ? style.fill : style.color), behind(e)].map(light).sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) found.add(`${e.tagName}.${e.getAttribute('class')} ${ratio.toFixed(2)}`);
  }
  return [...found];
})()"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    runs = [write_run(root / f"{arm}-{seed}", 120, seed=seed, arm=arm) for arm in ("none", "fixed") for seed in (0, 1)]
    alone = [write_run(root / name, steps, arm=name) for name, steps in (("decoupled", 240), ("adaptive", 30))]
    early = write_run(root / "early", 3, evaluated=False, with_transcripts=False)
    return {
        "report": write_report(alone[0]),
        "early": write_report(early),
        "comparison": write_comparison([*alone, *runs]),
    }


@pytest.mark.parametrize("width", [1280, 820, 390])
@pytest.mark.parametrize("name", ["report", "early", "comparison"])
def test_the_page_is_quiet_complete_and_no_wider_than_the_window(browser, pages, name, width):
    browser.open(pages[name], width)
    browser.evaluate(OPEN_FOLDS)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= width
    assert browser.requests == [pages[name].resolve().as_uri()]
    assert browser.complaints == []
    assert browser.evaluate("document.styleSheets.length") == 1
    assert browser.evaluate("document.querySelectorAll('.tip').length") == 1  # the script ran under the page's policy
    assert browser.evaluate(CROWDED) == []


def test_letters_in_charts_stay_readable_on_a_phone(browser, pages):
    browser.open(pages["report"], 390)
    sizes = browser.evaluate(
        "[...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().width"
        " / s.viewBox.baseVal.width * parseFloat(getComputedStyle(s).fontSize))"
    )
    assert min(sizes) >= 10.5


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_every_text_stands_out_from_what_is_behind_it(browser, pages, name, dark):
    browser.open(pages[name], dark=dark)
    browser.evaluate(OPEN_FOLDS)
    assert browser.evaluate(FAINT) == []


def test_folds_and_wide_tables_are_within_reach_of_the_keyboard(browser, pages):
    browser.open(pages["report"], 390)
    browser.evaluate(CLOSE_FOLDS)
    state = "document.querySelector('.transcript').open"
    browser.evaluate("document.querySelector('.transcript > summary').focus()")
    browser.press("Enter")
    assert browser.evaluate(state) is True
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.parentElement.className") in ("call", "tool", "prompt")
    browser.evaluate(OPEN_FOLDS)
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
    assert browser.evaluate(f"{wide}.length") > 0
    assert browser.evaluate(f"{wide}.filter(e => e.tabIndex < 0 || !e.getAttribute('aria-label')).length") == 0


def test_calls_and_results_are_folded_until_they_are_opened(browser, pages):
    browser.open(pages["report"])
    assert browser.evaluate("document.querySelectorAll('.transcript .call > .s').length") > 0
    hidden = "[...document.querySelectorAll('.transcript[open] .call > .s')].filter(e => e.checkVisibility()).length"
    assert browser.evaluate(hidden) == 0
    browser.evaluate("document.querySelectorAll('.transcript[open] .call').forEach(d => d.open = true)")
    assert browser.evaluate(hidden) > 0


def test_long_names_leave_room_for_the_figures_on_a_phone(browser, tmp_path):
    names = ("quite-a-long-name-of-a-run-whose-last-part-matters-most", "n" * 60)
    runs = [write_run(tmp_path / name, 2, arm=arm) for name, arm in zip(names, ("none", "fixed"), strict=True)]
    browser.open(write_comparison(runs), 390)
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= 390
    heads = "[...document.querySelectorAll('table.runs th[scope=row]')].map(e => e.getBoundingClientRect())"
    assert browser.evaluate(f"Math.min(...{heads}.map(b => b.width))") > 0.2 * 390
    assert browser.evaluate(f"Math.max(...{heads}.map(b => b.width))") < 0.5 * 390
    assert browser.evaluate(f"Math.max(...{heads}.map(b => b.height))") < 250


def test_a_tooltip_shows_the_values_under_the_pointer(browser, pages):
    browser.open(pages["report"])
    shown = browser.evaluate(
        """(() => {
          const hit = document.querySelectorAll('svg.chart rect.hit:not(.cell)')[3];
          hit.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: 1270, clientY: 890}));
          const box = document.querySelector('.tip');
          const { right, bottom } = box.getBoundingClientRect();
          return [box.hidden, box.textContent, right <= innerWidth, bottom <= innerHeight];
        })()"""
    )
    assert shown[0] is False
    assert shown[1].startswith("RL step ")
    assert shown[2:] == [True, True]


def test_on_paper_folds_are_open_and_screen_furniture_is_gone(browser, pages):
    browser.open(pages["report"], 760, paper=True)
    visible = "[...document.querySelectorAll('{}')].map(e => e.checkVisibility())"
    for opened in (".call > .s", ".transcript .text", "details .columns"):
        found = browser.evaluate(visible.format(opened))
        assert found
        assert all(found)
    for gone in ("nav", "details.data", "details.long", ".glimpse"):
        found = browser.evaluate(visible.format(gone))
        assert found
        assert not any(found)
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= 760
    # A4 less its margins is about 1,036 pixels high: a chart fits on one page
    assert browser.evaluate("Math.max(...[...document.querySelectorAll('figure')].map(f => f.offsetHeight))") < 1000
    # a transcript may be as long as a sheet: kept whole it would leave the one before half empty
    inside = "[...document.querySelectorAll('{}')].map(e => getComputedStyle(e).breakInside)"
    assert set(browser.evaluate(inside.format(".transcript"))) == {"auto"}
    assert set(browser.evaluate(inside.format(".text details"))) == {"avoid"}
    kept = "[...document.querySelectorAll('figure')].every(f => getComputedStyle(f).breakInside === 'avoid')"
    assert browser.evaluate(kept) is True


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_the_printed_page_has_text_on_every_sheet(browser, pages, name):
    browser.open(pages[name])
    pdf = browser.pdf()
    sheets = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert 3 <= sheets <= 25
    streams = []
    for body in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            streams.append(zlib.decompress(body))
        except zlib.error:
            continue
    texts = [stream for stream in streams if re.search(rb"\bT[jJ]\b", stream)]
    assert len(texts) >= sheets
    assert sum(len(re.findall(rb"\bT[jJ]\b", stream)) for stream in texts) > 500


def test_pictures_show_the_report_and_the_comparison_and_leave_the_runs_alone(tmp_path, capsys):
    runs = [write_run(tmp_path / name, 30, arm=name) for name in ("decoupled", "none")]
    first, second = map(str, runs)
    assert screenshots.main([first, "--compare", first, second, "--images", str(tmp_path / "images")]) == 0
    names = ["report.png", "report_training.png", "report_compare.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "images" / name) for name in names]
    for name in names:
        data = (tmp_path / "images" / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        assert width == screenshots.WIDTH
        assert 900 < height < 4000
    assert not (runs[0] / "report.html").exists()
    assert screenshots.main([str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
