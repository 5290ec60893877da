import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.codec import parse_codec
from fleet.codec.names import BASES, CodecName
from fleet.errors import ConfigError


@pytest.mark.parametrize("base", BASES)
def test_a_name_is_taken_apart(base):
    assert parse_codec(base) == CodecName(base, 1.0, feedback=False)
    assert parse_codec(f"{base}+feedback") == CodecName(base, 1.0, feedback=True)
    assert parse_codec(f"topk:0.25+{base}") == CodecName(base, 0.25, feedback=True)
    assert not parse_codec(base).sparse
    assert parse_codec(f"topk:0.25+{base}").sparse


def test_topk_means_float32_and_has_feedback_anyway():
    meant = CodecName("float32", 0.01, feedback=True)
    names = ("topk:0.01", "topk:1e-2", "topk:0.01+float32", "topk:0.01+feedback")
    assert {parse_codec(name) for name in names} == {meant}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "zip",
        "+",
        "feedback",
        "+feedback",
        "int4+",
        "int4+int8",
        "int4+topk:0.1",
        "float32+feedback+feedback",
        "topk:0.1+zip",
        "topk:0.1+topk:0.1",
        " int8",
        "INT8",
        3,
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError) as error:
        parse_codec(name)
    assert str(error.value) == (
        f"unknown codec {name}; known: float32, float16, int8, int4, topk:SHARE alone or before "
        f"one of them (topk:0.01+int4); +feedback behind any"
    )


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "1.5", "nan", "inf", "", "x", "1e-999"])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ConfigError) as error:
        parse_codec(f"topk:{share}+int4")
    assert str(error.value) == (
        f"topk in codec topk:{share}+int4 must keep a share above 0 and below 1"
    )


@pytest.mark.parametrize("start", ["x", "topk:x", "topk:0.1+x"])
def test_a_name_as_long_as_a_message_is_cut_in_the_error(start):
    with pytest.raises(ConfigError) as error:
        parse_codec(start + "x" * 100_000)
    assert len(str(error.value)) < 250


PARTS = ("topk:", "0.1", "1e-", "nan", "+", "int8", "int4", "float", "32", "feedback", " ", "_")


@given(st.lists(st.sampled_from(PARTS), max_size=6).map("".join))
def test_no_name_raises_anything_else(name):
    try:
        parsed = parse_codec(name)
    except ConfigError:
        return
    assert parsed.base in BASES
    assert 0 < parsed.share <= 1
