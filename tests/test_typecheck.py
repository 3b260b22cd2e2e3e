"""The checker of annotations remembers calls that passed, and still finds every one that does not."""

import functools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

import jaxtyping
import numpy as np
import pytest
import torch
import typecheck
from jaxtyping import Float
from torch import Tensor


def checked(fn):
    return typecheck.jaxtyped(fn, typechecker=typecheck.check)


@checked
def rows(x: Float[Tensor, "batch d"], y: Float[Tensor, " batch"], scale: float = 1.0) -> Tensor:
    return x * y[:, None] * scale


X, Y = torch.ones(3, 2), torch.ones(3)


def test_a_call_that_passed_is_not_checked_again():
    looked = []

    def looking(fn):
        def wrapper(*args, **how):
            looked.append(how)
            return fn(*args, **how)

        return wrapper

    @functools.partial(typecheck.jaxtyped, typechecker=looking)
    def same(x: Tensor) -> Tensor:
        return x

    same(X)
    once = len(looked)
    assert once == 2  # the arguments; the arguments with the result
    same(X + 1)
    assert len(looked) == once
    same(Y)
    assert len(looked) == 2 * once


@pytest.mark.parametrize(
    ("arguments", "how"),
    [
        ((X.double().long(), Y), {}),  # another dtype
        ((X[0], Y), {}),  # another rank
        ((X, Y[:2]), {}),  # two shapes that do not fit together
        ((X.numpy(), Y), {}),
        ((X, Y), {"scale": "1"}),
        ((X, Y, None), {}),
    ],
)
def test_a_call_of_another_kind_is_checked_after_many_that_passed(arguments, how):
    for _ in range(3):
        rows(X, Y), rows(X, Y, 2), rows(X, y=Y, scale=2.0)
    for _ in range(2):  # what failed once is never remembered
        with pytest.raises(jaxtyping.TypeCheckError, match="parameters"):
            rows(*arguments, **how)


def test_each_kind_of_result_is_checked():
    @checked
    def given(x: Float[Tensor, " n"], result: list) -> Float[Tensor, " n"]:
        return result.pop()

    for _ in range(2):
        assert given(Y, [Y]) is Y
        with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
            given(Y, [Y[:2]])
        assert given(Y, [Y]) is Y

    shown: Iterator = iter([1, 1, "one", 1, OrderedDict(), 1])

    @checked
    def next_one() -> int:
        return next(shown)

    assert next_one() == next_one() == 1
    for _ in range(2):
        with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
            next_one()
        assert next_one() == 1


def test_what_stands_in_a_container_is_part_of_the_kind():
    @checked
    def total(parts: list[float], names: dict[str, int]) -> float:
        return sum(parts)

    assert total([1.0, 2.0], {"a": 1}) == total([2.0, 1.0], {"a": 1}) == 3
    for parts, names in (([1.0, "2"], {"a": 1}), ([1.0, 2.0], {"a": "1"}), ([1.0, 2.0], {1: 1})):
        caught = 0
        for _ in range(60):  # beartype draws an entry of a list
            try:
                total(parts, names)
            except jaxtyping.TypeCheckError:
                caught += 1
            except TypeError:
                pass  # the sum itself
        assert caught
    for long in ([1.0] * 20, [1.0]):
        assert total(long, {}) == len(long)
    with pytest.raises(jaxtyping.TypeCheckError):
        total(["1"] * 20, {})


def test_a_container_of_containers_that_holds_itself_ends():
    @checked
    def size(parts: list) -> int:
        return len(parts)

    loop: list = [1]
    loop.append(loop)
    assert size(loop) == size(loop) == 2
    assert size([[[[[1]]]]]) == 1


def test_values_that_are_named_in_the_annotation_are_told_apart():
    @checked
    def chosen(which: Literal["raise", "lower"]) -> str:
        return which

    assert chosen("raise") == chosen("raise") == "raise"
    with pytest.raises(jaxtyping.TypeCheckError):
        chosen("both")


def test_switched_off_nothing_is_remembered(monkeypatch):
    cube = X[:, :, None]
    with monkeypatch.context() as off:
        off.setattr(jaxtyping.config, "jaxtyping_disable", True)
        assert rows(cube, torch.ones(2)).shape == (3, 2, 1)
    with pytest.raises(jaxtyping.TypeCheckError):
        rows(cube, torch.ones(2))


def test_a_function_made_anew_has_one_memory_and_its_own_values():
    def maker(n: int):
        @checked
        def add(x: int) -> int:
            return x + n

        return add

    assert [maker(n)(1) for n in range(4)] == [1, 2, 3, 4]
    with pytest.raises(jaxtyping.TypeCheckError):
        maker(1)("1")


def test_what_a_function_raises_comes_through():
    @checked
    def fails(x: np.ndarray) -> None:
        raise KeyError(x.ndim)

    for _ in range(2):
        with pytest.raises(KeyError, match="2"):
            fails(np.ones((2, 2)))
