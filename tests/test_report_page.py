"""The report in a browser: it renders without errors, and the last evaluation can be stepped through."""

from __future__ import annotations

import pytest

from priorzero.runs.report import write_report
from tests.helpers.browser import run_in_browser, see
from tests.helpers.reports import evaluation_line, make_episode, make_run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    evaluations = [
        evaluation_line(at, mode, [3.0])
        for at in (0, 80)
        for mode in ("world_model", "world_model_with_prior", "prior", "random")
    ]
    modes = ("random", "prior", "world_model", "world_model_with_prior")
    episodes = [make_episode(mode, steps=3 + n) for n, mode in enumerate(modes)]
    folder = make_run(tmp_path_factory.mktemp("report") / "run", evaluations=evaluations, transcripts=episodes)
    return write_report(folder)


def test_page_shows_the_first_step_with_its_bars(page):
    step = see(page, "return see();")
    assert step["where"] == "step 1 of 6" and step["text"] == "You wait." and step["slider"] == ["0", "6"]
    assert step["rows"] == [
        ["action", "LLM prior", "policy", "visits", "Q"],
        ["➤ take 0", "50%", "25%", "7", "1.5"],
        ["wait 0", "38%", "50%", "2", "–"],
        ["go 0", "13%", "25%", "1", "0.1"],
    ]
    assert step["bars"] == ["50%", "25%", "70%", "100%", "37.5%", "50%", "20%", "0%", "12.5%", "25%", "10%", "6.66667%"]
    assert step["chosen"] == 1 and step["prompt"] == "Prompt of step 0" and step["disabled"] == ["first", "previous"]
    assert step["predictions"] == [
        ["", "predicted", "searched", "real"],
        ["value of the state", "0.75", "1.25", "1.97"],  # 1 + 1/2 + ... + 1/32
        ["reward of the action", "–", "–", "1"],
    ]
    assert step["values"] == "score before the action 0 of 7" and step["tree"] is None


def test_page_steps_with_keys_buttons_and_slider(page):
    seen = see(
        page,
        """
        const places = [];
        const note = () => places.push(at("where").innerText);
        for (const name of ["ArrowLeft", "ArrowRight", "ArrowRight", "ArrowLeft", "Enter"]) { key(name); note(); }
        key("ArrowRight", { altKey: true }); note();
        for (const id of ["last", "previous", "next", "next", "first", "next"]) { at(id).click(); note(); }
        at("slider").value = 4; at("slider").dispatchEvent(new Event("input")); note();
        return [places, see()];
        """,
    )
    places, step = seen
    assert places == [
        *("step 1 of 6", "step 2 of 6", "step 3 of 6", "step 2 of 6", "step 2 of 6"),  # the keys
        "step 2 of 6",  # Alt and an arrow go through the browser's history
        *("end", "step 6 of 6", "end", "end", "step 1 of 6", "step 2 of 6"),  # the buttons
        "step 5 of 6",  # the slider
    ]
    assert step["text"] == "> take 3\n\nYou wait." and "➤ take 4" in step["rows"][1] and step["disabled"] == []


def test_page_shows_the_end_of_the_episode(page):
    end = see(page, "for (let n = 0; n < 10; n++) key('ArrowRight'); return see();")
    assert (
        end["where"] == "end" and end["text"] == "> take 5\n\nTHE END" and end["rows"] == [] and end["prompt"] is None
    )
    assert end["outcome"] == "End of the episode: limit of moves reached."
    assert end["values"] == "final score 6 of 7 return 6"
    assert end["disabled"] == ["next", "last"]


def test_page_shows_the_columns_of_each_mode(page):
    modes = see(
        page,
        """
        const select = at("episode");
        return [...select.options].map((option) => {
            select.value = option.value; select.dispatchEvent(new Event("change"));
            return [option.innerText, at("where").innerText, rows()[0], at("actions").querySelectorAll(".bar").length];
        });
        """,
    )
    assert modes == [
        ["LLM and world model: score 6", "step 1 of 6", ["action", "LLM prior", "policy", "visits", "Q"], 12],
        ["world model alone: score 5", "step 1 of 5", ["action", "policy", "visits", "Q"], 9],
        ["LLM alone: score 4", "step 1 of 4", ["action", "LLM prior"], 3],
        ["random actions: score 3", "step 1 of 3", ["action"], 0],
    ]


def test_page_draws_tables_and_charts(page):
    drawn = see(
        page,
        """
        const count = (query) => document.querySelectorAll(query).length;
        const box = document.querySelector("#curve > svg").getBoundingClientRect();
        return {
            rows: count("#learned tbody tr"), dots: count("#curve > svg circle"), marks: count("#curve > svg .mark"),
            losses: count("#losses svg polyline"), times: count("#time tr"),
            wide: box.width > 500 && box.height > 100,
            fits: document.documentElement.scrollWidth <= window.innerWidth,
        };
        """,
    )
    assert drawn == {"rows": 4, "dots": 4, "marks": 8, "losses": 6, "times": 3, "wide": True, "fits": True}


def test_page_shows_hostile_text_as_text(tmp_path):
    hostile = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u2028&lt;"
    episode = make_episode(text=hostile, game=hostile)
    episode["steps"][0]["valid_actions"][1] = hostile
    folder = make_run(tmp_path / "run", {"run": {"env_id": hostile}}, transcripts=[episode])
    script = "return [document.title, at('text').textContent, at('actions').querySelector('.chosen td').textContent];"
    title, text, action = see(write_report(folder), script)
    assert title == f"{hostile}, seed 0: PriorZero report"
    assert text == hostile and action == f"➤ {hostile}"


def test_page_without_transcripts_has_no_errors(tmp_path):
    folder = make_run(tmp_path / "run", iterations=0, evaluations=[])
    words = see(write_report(folder), "return document.getElementById('transcript').innerText;")
    assert "No step of an evaluation is stored." in words


def test_browser_reports_errors_of_a_page(tmp_path):
    """The tests above can fail."""
    path = tmp_path / "page.html"
    path.write_text("<body><script>missing();</script></body>")
    result, messages = run_in_browser(path, "return 1;")
    assert result == 1 and len(messages) == 1 and "missing is not defined" in messages[0]
