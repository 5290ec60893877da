import pytest

from tests.many import many

seen = []


@pytest.mark.parametrize("other", ["a", "b"])
@many("case", (n for n in range(3)))
def test_every_case_is_run(case, other, tmp_path):
    assert tmp_path.is_dir()
    seen.append((other, case))


def test_each_of_them_once():
    assert sorted(seen) == [(other, case) for other in "ab" for case in range(3)]


def test_the_case_that_fails_is_named():
    @many("outer", (True, False))
    @many("inner", (1, 2, 3))
    def below(outer, inner):
        assert outer or inner < 2

    with pytest.raises(AssertionError) as caught:
        below()
    assert caught.value.__notes__ == ["with inner = 2", "with outer = False"]


def test_an_argument_that_there_is_not_and_no_cases_are_refused():
    for name, values in (("seed", range(3)), ("case", ())):
        with pytest.raises(AssertionError, match=f"below has no {name}"):

            @many(name, values)
            def below(case):
                pass
