"""Tests of the timeline: sums of overlapping spans and traces."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from priorzero.runtime.timeline import Span, Timeline, TimeUsage, time_usage


def test_time_usage_of_overlapping_spans():
    """
    0    1    2    3    4    5    6    7    8    9    10
         [prior----------]              [prior---]
                   [search----]
                   [search]
    """
    spans = [Span("prior", 1, 4), Span("search", 3, 5), Span("search", 3, 4), Span("prior", 7, 9)]
    got = time_usage(spans, start=0, end=10)
    assert got == TimeUsage(wall=10, busy={"prior": 5, "search": 2}, overlapped=1, idle=4)
    assert got.scalars() == {
        "time/iteration_s": 10,
        "time/prior_s": 5,
        "time/search_s": 2,
        "time/overlap_share": 0.1,
        "time/idle_share": 0.4,
    }
    assert got.describe() == "prior 50%, search 20%; overlap 10%, idle 40.0%"


def test_time_usage_clips_spans_to_the_interval():
    got = time_usage([Span("a", -5, 2), Span("a", 9, 20), Span("b", 30, 40)], start=0, end=10)
    assert got == TimeUsage(wall=10, busy={"a": 3}, overlapped=0, idle=7)
    assert time_usage([], start=0, end=4) == TimeUsage(wall=4, busy={}, overlapped=0, idle=4)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.integers(0, 30)), max_size=12))
def test_time_usage_agrees_with_counting_every_moment(drawn):
    spans = [Span(name, min(p, q), max(p, q)) for name, p, q in drawn]
    got = time_usage(spans, start=0, end=30)
    running = [{s.name for s in spans if s.start <= moment < s.end} for moment in range(30)]
    assert got.idle == sum(not names for names in running)
    assert got.overlapped == sum(len(names) > 1 for names in running)
    for name in "abc":
        assert got.busy.get(name, 0) == sum(name in names for names in running)


def test_timeline_measures_intervals_and_writes_a_trace(tmp_path):
    timeline = Timeline(keep=2)
    with timeline.span("long"):
        with timeline.span("short"):
            time.sleep(0.02)
        first = timeline.finish_interval()
        time.sleep(0.02)
    second = timeline.finish_interval()
    assert first.busy["short"] == pytest.approx(first.overlapped) and first.busy["long"] >= 0.02
    assert second.busy.keys() == {"long"} and second.busy["long"] >= 0.02
    assert timeline.total.wall == pytest.approx(first.wall + second.wall)
    assert timeline.total.busy["long"] == pytest.approx(first.busy["long"] + second.busy["long"])
    with timeline.span("discarded"):
        time.sleep(0.01)
    timeline.discard_interval()
    third = timeline.finish_interval()
    assert third.busy == {} and third.wall < 0.01

    timeline.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = {e["name"]: e for e in events if e["ph"] == "X"}
    # Only the last two intervals are kept, so the span "short" is not in the trace.
    assert spans.keys() == {"long"} and spans["long"]["dur"] >= 40_000
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == ["long"]
