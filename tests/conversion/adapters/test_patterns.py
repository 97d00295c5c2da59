"""Patterns of adapter configs: what could take for ever is told from what people write, before it is matched."""

import re
import time

import pytest

from modeling_deepseek_moe.conversion.adapters.patterns import problem_of_patterns, ways_of

SOUND = [
    "q_proj",
    r"^model\.layers\.(0|1|10|2)\.self_attn\.(q|k|v)_proj$",
    r".*\.layers\.\d+\.mlp\.experts",
    r"(?:.*\.)?layers\.(?:(?:0|1|2)\.(?:self_attn\.o_proj|mlp\.gate)|(?:3)\.(?:mlp\.gate))",
    r"model\.layers\.(?:[0-9]|1[0-9])\.mlp\.(?P<part>up|down)_proj",
    r"(?=.*experts).*down_proj",
    "[]a-z_]+_proj",
    "x{2,3}y",
    "{}",
]
ENDLESS = [
    r"(a+)+$",
    r"(a*)*b",
    r"(a|aa)+$",
    r"(\d|1)+x",
    r"(.*a){20}",
    "a?" * 30 + "a" * 30,
    "(a|a)" * 30,
    r"(.*)(.*)(.*)(.*)(.*)x",
    r"(\w+)\1x",
    r"((x{99}){99}){99}",
    r"(?:){2000000000}",
    r"((?:a{0,30}){0,30})",
]


@pytest.mark.parametrize("pattern", SOUND)
def test_what_people_write_is_read(pattern):
    assert problem_of_patterns([pattern]) == ""


@pytest.mark.parametrize("pattern", ENDLESS)
def test_what_could_take_for_ever_is_refused_at_once(pattern):
    begun = time.perf_counter()
    assert "too many ways" in problem_of_patterns([pattern])
    assert time.perf_counter() - begun < 5  # a match of these takes longer than the universe is old


def test_one_pattern_for_every_module_of_a_large_model_is_read():
    assert not problem_of_patterns(f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(61) for j in range(256))


@pytest.mark.parametrize(
    "pattern", [7, "(", "x" * 50_000, "(" * 3000 + ")" * 3000], ids=["number", "open", "long", "deep"]
)
def test_what_is_no_pattern_is_named(pattern):
    assert problem_of_patterns([pattern])


def test_alternatives_count_only_where_several_match_at_one_place():
    assert ways_of("0|1|2") == 1 and ways_of("1|10|100|2") == 3 and ways_of(r"\d|1") == 2
    assert re.fullmatch("1|10|100|2", "100")
