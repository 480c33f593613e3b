"""The report in a real browser: transcripts open, sorting and filters work, and nothing a model wrote is run."""

from typing import Any

import pytest
from browser import CHROMIUM, Browser
from test_report import PAYLOADS, finding

from unfeign.split_persona.report import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

RUNS = (
    "<script>window.ran = 1; alert(1)</script>",
    '"><img src=x onerror="window.ran=1; alert(1)">',
    "</pre></details></main><svg onload=alert(1)><script>alert(2)</script>",
    '<iframe srcdoc="<script>parent.ran=1</script>"></iframe>',
    '<details open ontoggle="window.ran=1; alert(1)">',
    "<a href='javascript:window.ran=1'>x</a><style>@import 'javascript:alert(1)';</style>",
    '" autofocus onfocus="window.ran=1" x="',
    '<math><mtext><img src onerror="alert(1)"></mtext></math>',
    '<meta http-equiv="refresh" content="0;url=javascript:alert(1)">',
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("browser")
    every = [*PAYLOADS, *RUNS]
    said: list[dict[str, Any]] = []
    for number, attack in enumerate(every):
        texts = {"system": attack, "user": attack, "reasoning": attack, "answer": attack}
        texts |= {"family": f"{chr(ord('z') - number)} {attack}", "scenario_id": f"p{number}/{attack}"}
        review = {"intervention": attack, "text": attack, "p_fail": 0.5}
        said.append(finding(f"p{number}", **texts, persona={"p_fail": 0.5, "reviews": [review]}))
    changed = [{**said[0]}, *({**one, "complied": not one["complied"]} for one in said[1:])]
    path = folder / "report.html"
    write_report(path, title=RUNS[0], before=said, after=changed, notes=[*every], run={"model": RUNS[1]})
    browser = Browser(folder / "profile")
    browser.open(path.as_uri())
    yield browser, len(every)
    browser.close()


def test_transcripts_open_and_nothing_is_run(page):
    browser, n = page
    shown = browser.run(
        """(() => { const all = [...document.querySelectorAll("details[data-family]")];
        all.forEach(one => one.querySelector("summary").click());
        const open = all.filter(one => one.open), long = all.filter(one => one.innerText.length > 200);
        return [all.length, open.length, long.length] })()"""
    )
    assert shown == [n, n, n]
    browser.run("""document.querySelectorAll("a, mark, summary").forEach(one => one.focus())""")
    browser.run("new Promise(done => setTimeout(done, 300))")
    assert browser.run("window.ran") is None and not browser.asked
    assert (
        browser.run("""document.querySelectorAll("img, iframe, main script, meta[http-equiv=refresh]").length""") == 0
    )
    assert RUNS[0] in browser.run("document.body.innerText")


def test_sorting_and_filters_work(page):
    browser, n = page
    families = """[...document.querySelectorAll("details[data-family]")].map(one => one.dataset.family)"""
    as_audited = browser.run(families)
    choose = """(name, value) => { const box = document.querySelector(name); box.value = value;
        box.dispatchEvent(new Event("change")); }"""
    browser.run(f"({choose})('#order', 'family')")
    assert browser.run(families) == sorted(as_audited) != as_audited
    browser.run(f"({choose})('#order', 'changed')")
    assert browser.run(families)[-1] == as_audited[0], "the one that did not change comes last"
    browser.run(f"({choose})('#order', '')")
    assert browser.run(families) == as_audited
    browser.run(f"({choose})('#filters select[data-field=family]', {as_audited[3]!r})")
    seen = """[...document.querySelectorAll("details[data-family]")].filter(one => !one.hidden).length"""
    assert browser.run(seen) == 1 and n > 1


def test_its_policy_lets_no_script_in(page):
    browser, _ = page
    browser.run(
        """document.body.append(Object.assign(document.createElement("script"), {text: "window.let_in = 1"}))"""
    )
    browser.run("""document.body.setAttribute("onclick", "window.let_in = 1"); document.body.click()""")
    assert browser.run("window.let_in") is None
    assert any("Content Security Policy" in line for line in browser.said)
