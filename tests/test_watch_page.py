"""The page of an episode in a browser: steps, bars, tree, curves, keyboard, and its size with many steps."""

from __future__ import annotations

import json
import re
import resource

import pytest

from priorzero.play.transcript import TRAINING
from priorzero.runs.pages.episodes import LARGE, episode_data, write_episodes
from tests.helpers.browser import see
from tests.helpers.reports import make_episode, make_step


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    episode = {**make_episode(steps=4, tree=True), "episode": 2, "env_step": 1200, "seed": 5}
    episode["steps"][2]["action_values"][0] = -0.5  # so the bars of Q-values reach from -0.5 to 1.5
    [path] = write_episodes([episode], tmp_path_factory.mktemp("watch"))
    return path


def test_page_shows_a_step_with_bars_predictions_tree_and_prompt(page):
    assert page.name == "toy_world_model_with_prior_step1200_seed5_2.html"
    step = see(
        page,
        "return {...see(), about: at('transcript').querySelector('.muted').innerText, select: at('choice').hidden};",
    )
    assert (
        step["about"]
        == "LLM and world model, episode 2, after 1,200 environment steps of training, seed 5, score 4 of 7, 4 steps"
    )
    assert step["where"] == "step 1 of 4" and step["text"] == "You wait." and step["select"]
    assert step["rows"] == [
        ["action", "LLM prior", "policy", "visits", "Q"],
        ["➤ take 0", "50%", "25%", "7", "1.5"],
        ["wait 0", "38%", "50%", "2", "–"],
        ["go 0", "13%", "25%", "1", "0.1"],
    ]
    assert step["bars"] == ["50%", "25%", "70%", "100%", "37.5%", "50%", "20%", "0%", "12.5%", "25%", "10%", "30%"]
    assert step["predictions"] == [
        ["", "predicted", "searched", "real"],
        ["value of the state", "0.75", "1.25", "1.88"],  # 1 + 1/2 + 1/4 + 1/8
        ["reward of the action", "0.07", "–", "1"],
    ]
    assert step["prompt"] == "Prompt of step 0"


def test_page_shows_small_numbers_and_the_scale_of_rewards(tmp_path):
    episode = {**make_episode(steps=1, tree=True), "reward_scale": 3.0}
    episode["steps"][0] |= {"action_values": [-0.00123, 0.0004, None], "predicted_value": -0.0012}
    [path] = write_episodes([episode], tmp_path)
    step = see(path, "return see();")
    assert [row[-1] for row in step["rows"][1:]] == ["4e-4", "–", "-1e-3"]
    assert step["predictions"][1][:2] == ["value of the state", "-1e-3"]
    assert step["predictions"][2] == ["reward of the action, times train.reward_scale=3", "0.07", "–", "3"]


def test_page_unfolds_the_search_tree(page):
    first, opened, everything, folded, after = see(
        page,
        """
        const seen = [tree()];
        at("nodes").querySelectorAll("details")[1].open = true; seen.push(tree().map((row) => row[0]));
        at("unfold").click(); seen.push(tree().map((row) => row[0]));
        at("unfold").click(); seen.push(tree().map((row) => row[0]));
        key("ArrowRight"); seen.push(tree().map((row) => row[0]));
        return seen;
        """,
    )
    assert first == [
        ["➤ take 0", "7", "0.7", "0.07", "25%"],
        ["second", "4", "0.4", "0.04", "25%"],
        ["other second", "2", "0.2", "0.02", "25%"],
        ["go 0", "1", "0.1", "0.01", "25%"],
    ]
    assert opened == everything == ["➤ take 0", "second", "third", "other third", "other second", "go 0"]
    assert folded == ["➤ take 0", "go 0"] and after == ["➤ take 1", "second", "other second", "go 1"]


def test_page_steps_with_the_keyboard(page):
    places, end = see(
        page,
        """
        const places = [];
        for (const name of ["ArrowLeft", "ArrowRight", "ArrowRight", "End", "ArrowRight", "ArrowLeft", "Home", "x"]) {
            key(name); places.push(at("where").innerText);
        }
        key("End", { ctrlKey: true }); places.push(at("where").innerText);
        key("End");
        return [places, see()];
        """,
    )
    assert places == [
        *("step 1 of 4", "step 2 of 4", "step 3 of 4", "end", "end", "step 4 of 4", "step 1 of 4", "step 1 of 4"),
        "step 1 of 4",  # a shortcut of the browser
    ]
    assert (
        end["where"] == "end"
        and end["text"] == "> take 3\n\nTHE END"
        and end["values"] == "final score 4 of 7 return 4"
    )
    assert end["rows"] == end["predictions"] == [] and end["tree"] is end["prompt"] is None
    assert end["outcome"] == "End of the episode: limit of moves reached."


def test_page_draws_curves_that_can_be_clicked(page):
    drawn = see(
        page,
        """
        const svg = at("score-curve").querySelector("svg"), box = svg.getBoundingClientRect();
        const scale = box.width / svg.viewBox.baseVal.width;
        const place = (event, share, more = {}) => {
            const clientX = box.left + (40 + share * (svg.viewBox.baseVal.width - 48)) * scale; // the margins
            svg.dispatchEvent(new PointerEvent(event, { clientX, bubbles: true, ...more }));
            return at("where").innerText;
        };
        const caption = (id) => at(id).querySelector("figcaption").innerText.replace(/\\s+/g, " ");
        const words = () => ["score-curve", "value-curve"].map(caption);
        const lines = [...document.querySelectorAll(".curves polyline")].map((line) => line.points.length);
        return {
            lines, before: words(), middle: place("pointerdown", 0.5), after: words(), outside: place("pointerdown", 7),
            moved: place("pointermove", 0.25), dragged: place("pointermove", 0.25, { buttons: 1 }),
        };
        """,
        width=1280,
    )
    assert drawn == {
        "lines": [5, 4, 4, 4],
        "before": ["score 0", "predicted value 0.75 searched value 1.25 real value 1.88"],
        "middle": "step 3 of 4",
        "after": ["score 2", "predicted value 0.75 searched value 1.25 real value 1.5"],
        "outside": "end",
        "moved": "end",
        "dragged": "step 2 of 4",
    }


@pytest.mark.parametrize("width", [1280, 500])
def test_page_fits_the_window(page, width):
    seen = see(
        page,
        """
        at("unfold").click();
        const [left, right] = [...document.querySelector(".step").children].map((e) => e.getBoundingClientRect());
        return [document.documentElement.scrollWidth <= window.innerWidth, left.right < right.left];
        """,
        width=width,
    )
    assert seen == [True, width == 1280]  # two columns, or one


def test_page_of_a_training_episode_without_predictions_says_so(tmp_path):
    episode = {**make_episode("random"), "mode": TRAINING}
    del episode["discount_factor"]  # as an earlier version wrote it
    for step in episode["steps"]:
        del step["tree"], step["predicted_reward"]
        step["behaviour_prob"] = 0.25
    [path] = write_episodes([episode], tmp_path)
    seen = see(path, "return [see(), at('value-curve').hidden, document.body.innerText.includes('exploration noise')];")
    step, no_values, explained = seen
    assert step["rows"] == [["action"], ["go 0"], ["➤ take 0"], ["wait 0"]]
    assert step["predictions"] == [["", "real"], ["reward of the action", "1"]] and step["tree"] is None
    assert step["prompt"] is None and step["values"] == "score before the action 0 of 7 sampled with probability 25%"
    assert no_values and explained


def test_page_explains_only_the_columns_that_the_episode_has(tmp_path):
    explained = (
        "return [...document.querySelectorAll('b')].filter((b) => b.checkVisibility() && b.closest('[data-for]'))"
    )
    search = ["policy", "visits", "Q", "Predicted value", "Searched value", "Real value"]
    for mode, names in (
        ("prior", ["LLM prior", "Real value"]),
        ("world_model", search),
        ("world_model_with_prior", ["LLM prior", *search]),
    ):
        [path] = write_episodes([make_episode(mode)], tmp_path, stem=mode)
        assert see(path, f"{explained}.map((b) => b.innerText);") == names


def test_page_shows_a_long_text_as_high_as_the_window(tmp_path):
    [path] = write_episodes([make_episode(text="A line of the game.\n" * 200)], tmp_path)
    size = "const box = at('text'); return [box.clientHeight, parseFloat(getComputedStyle(box).fontSize)];"
    (low, font), (high, _) = (see(path, size, width=1280, height=height) for height in (400, 1400))
    assert 20 * font < low < 24 * font and 800 < high < 1100


def test_page_shows_hostile_text_as_text(tmp_path):
    hostile = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u2028&lt;"
    episode = make_episode(text=hostile, game=hostile, tree=True)
    episode["steps"][0]["valid_actions"][1] = episode["steps"][0]["tree"][1]["action"] = hostile
    episode["steps"][0]["prompt"] = hostile
    [path] = write_episodes([episode], tmp_path)
    assert re.fullmatch(r"[\w.+-]+\.html", path.name)
    title, step = see(path, "return [document.title, see()];")
    assert title.startswith(hostile) and step["text"].split() == hostile.split()
    assert (
        step["prompt"] == hostile
        and step["rows"][1][0].startswith("➤ </script><img")
        and step["tree"][0][0] == step["rows"][1][0]
    )


def long_episode(steps):
    """25 valid actions, 24 nodes in the tree, and prompts of 2500 characters in each step."""
    episode = make_episode(steps=0)
    for n in range(steps):
        step = make_step(n, text=f"{n} " + "You are in a maze of twisty little passages. " * 10, tree=True)
        step["valid_actions"] = [f"put the jewelled thing number {k} into the case" for k in range(25)]
        step["prior_probs"] = step["policy_probs"] = [0.123456 / (k + 1) for k in range(25)]
        step["visit_counts"] = [0, 25] + [0] * 23
        step["action_values"] = [None, 1.23456] + [None] * 23
        step["tree"] = step["tree"] * 4  # 24 nodes
        step["prompt"] = f"{n} " + "The prompt repeats what happened before. " * 60
        episode["steps"].append(step)
    return episode


def test_page_with_400_steps_is_small_and_loads_fast(tmp_path):
    def cpu_seconds(steps):
        [path] = write_episodes([long_episode(steps)], tmp_path, stem=f"{steps}")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        step = see(path, "key('End'); key('ArrowLeft'); return see();")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert step["where"] == f"step {steps} of {steps}" and step["text"].splitlines()[-1].startswith(
            f"{steps - 1} You"
        )
        return path.stat().st_size, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    _, small_s = cpu_seconds(1)
    size, large_s = cpu_seconds(400)
    assert 2_000_000 < size < 5_000_000
    assert large_s - small_s < 2  # processor time beyond that of the browser's own start


PROMPTS_LEFT_OUT = "The prompts are too long for this page."
TREES_LEFT_OUT = "The search trees are too long for this page."
BOTH_LEFT_OUT = "The prompts and the search trees are too long for this page."


def test_episode_data_leaves_prompts_and_trees_out_of_a_page_that_would_be_too_large():
    episode = long_episode(5)
    size = len(episode_data([episode])[0])
    found = [episode_data([episode], max_chars=limit) for limit in (size, size - 1, size // 2, 1000)]
    assert [notes for _, *notes in found] == [
        ["", ""],
        [PROMPTS_LEFT_OUT, ""],
        [BOTH_LEFT_OUT, ""],
        [BOTH_LEFT_OUT, LARGE],
    ]
    steps = [json.loads(data)["episodes"][0]["steps"][3] for data, *_ in found]
    kept = [(bool(step["prompt"]), bool(step["tree"])) for step in steps]
    assert kept == [(True, True), (False, True), (False, False), (False, False)]
    assert episode["steps"][3]["prompt"] and episode["steps"][3]["tree"]


def test_episode_data_names_only_what_the_episodes_have():
    without_llm, alone = make_episode("world_model", tree=True), make_episode("random")
    assert episode_data([without_llm], max_chars=1)[1:] == (TREES_LEFT_OUT, LARGE)
    assert episode_data([alone], max_chars=1)[1:] == ("", LARGE)
    assert episode_data([make_episode()], max_chars=1)[1:] == (PROMPTS_LEFT_OUT, LARGE)


def test_episode_data_measures_the_text_as_it_is_in_the_page(tmp_path):
    episode = make_episode()
    episode["steps"][0]["prompt"] = "<" * 1000  # six characters each in the page
    data, left_out, _ = episode_data([episode], max_chars=6000)
    assert left_out == PROMPTS_LEFT_OUT and len(data) < 6000
    [path] = write_episodes([episode], tmp_path)
    assert r"\u003c" * 1000 in path.read_text()


def test_pages_need_no_network(page):
    assert re.findall(r"""(?:https?:)?//[\w.]+|url\(|@import|\ssrc=""", page.read_text()) == []
