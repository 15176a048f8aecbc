import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcode import nodes

few = settings(derandomize=True, deadline=None, max_examples=40)
sizes = st.tuples(st.integers(2, 40), st.integers(0, 100)).map(lambda pair: (pair[0], sum(pair)))  # K, N >= K

LAYOUTS = {
    "first": (nodes.chebyshev_first, lambda n: np.cos((2 * np.arange(1, n + 1) - 1) * np.pi / (2 * n))),
    "second": (nodes.chebyshev_second, lambda n: np.cos((np.arange(1, n + 1) - 1) * np.pi / (n - 1))),
    "uniform": (nodes.uniform, lambda n: np.linspace(1, -1, n)),
}
each_layout = pytest.mark.parametrize(("layout", "definition"), LAYOUTS.values(), ids=LAYOUTS)


# ---- Chebyshev and uniform nodes ---------------------------------------------------------------------------


@each_layout
@few
@given(count=st.integers(2, 3000))
def test_nodes_are_their_definition(layout, definition, count):
    found = layout(count)
    assert found.dtype == np.float64
    assert found.shape == (count,)
    assert (np.diff(found) > 0).all()
    assert np.abs(found).max() <= 1
    np.testing.assert_allclose(found, definition(count)[::-1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("layout", [nodes.chebyshev_first, nodes.chebyshev_second])
@few
@given(count=st.integers(2, 3000))
def test_chebyshev_nodes_are_exactly_antisymmetric(layout, count):
    np.testing.assert_array_equal(layout(count), -layout(count)[::-1])


@few
@given(count=st.integers(2, 3000))
def test_second_kind_and_uniform_include_both_ends(count):
    for layout in (nodes.chebyshev_second, nodes.uniform):
        assert (layout(count)[0], layout(count)[-1]) == (-1, 1)
    assert np.abs(nodes.chebyshev_first(count)).max() < 1


def test_one_node_of_the_first_kind_is_the_middle():
    np.testing.assert_array_equal(nodes.chebyshev_first(1), [0.0])


def test_the_papers_pair():
    placed = nodes.chebyshev(5, 12)
    np.testing.assert_array_equal(placed.data, nodes.chebyshev_first(5))
    np.testing.assert_array_equal(placed.workers, nodes.chebyshev_second(12))


@pytest.mark.parametrize("layout", [nodes.systematic, nodes.repeated, lambda *sizes: nodes.mixed(*sizes, 2)])
def test_a_number_of_inputs_stands_for_chebyshev_nodes(unchecked, layout):
    for data in (5, np.int64(5), nodes.chebyshev_first(5)):
        placed = layout(data, 12)
        np.testing.assert_array_equal(placed.data, nodes.chebyshev_first(5))
        np.testing.assert_array_equal(placed.workers, layout(nodes.chebyshev_first(5), 12).workers)


def test_a_layout_keeps_float64_and_is_a_copy():
    """Lists, float32 and arrays that the caller changes later are stored in float64 of the layout's own."""
    mine = np.array([0.0, 0.5, 1.0])
    placed = nodes.Nodes(mine, np.array([0.0, 1.0], np.float32))
    mine[:] = 7
    np.testing.assert_array_equal(placed.data, [0.0, 0.5, 1.0])
    assert placed.data.dtype == placed.workers.dtype == np.float64


@pytest.mark.parametrize("kind", [int, np.int32, np.int64])
def test_counts_of_any_whole_type(unchecked, kind):
    np.testing.assert_array_equal(nodes.chebyshev_second(kind(4)), nodes.chebyshev_second(4))


# ---- systematic and repeated -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [nodes.chebyshev_first, nodes.chebyshev_second, nodes.uniform])
@few
@given(size=sizes)
def test_systematic_contains_the_data_and_is_distinct(layout, size):
    num_data, num_workers = size
    alpha = layout(num_data)
    beta = nodes.systematic(alpha, num_workers).workers
    assert beta.dtype == np.float64
    assert beta.shape == (num_workers,)
    assert np.isin(alpha, beta).all()
    assert (np.diff(beta) > 0).all()
    assert np.abs(beta).max() <= 1


@pytest.mark.parametrize(("num_data", "num_workers"), [(2, 2), (5, 12), (20, 30), (20, 400), (100, 101)])
def test_systematic_workers_are_spread_evenly(num_data, num_workers):
    """No gap in angle is much wider than it would be if all workers were dealt out evenly."""
    beta = nodes.systematic(nodes.chebyshev_first(num_data), num_workers).workers
    widest = np.diff(np.arcsin(beta)).max()
    assert widest <= np.pi / num_data * (1 + 1e-9)
    if num_workers >= 4 * num_data:
        assert widest <= 2 * np.pi / num_workers


def test_systematic_with_as_many_workers_is_the_data():
    alpha = nodes.chebyshev_first(7)
    np.testing.assert_array_equal(nodes.systematic(alpha, 7).workers, alpha)


@few
@given(size=sizes)
def test_repeated_deals_the_data_out(size):
    num_data, num_workers = size
    alpha = nodes.chebyshev_first(num_data)
    beta = nodes.repeated(alpha, num_workers).workers
    assert beta.dtype == np.float64
    found, counts = np.unique(beta, return_counts=True)
    np.testing.assert_array_equal(found, alpha)
    assert (np.diff(beta) >= 0).all()
    assert counts.sum() == num_workers
    assert set(counts) <= {num_workers // num_data, -(-num_workers // num_data)}


def test_repeated_nodes_may_lie_beyond_one():
    np.testing.assert_array_equal(nodes.repeated(np.array([-3.0, 3.0]), 3).workers, [-3, -3, 3])


@few
@given(size=sizes, share=st.floats(0, 1))
def test_mixed_nodes_are_data_nodes_copies_and_nodes_between(size, share):
    num_data, num_workers = size
    alpha = nodes.chebyshev_first(num_data)
    between = round(share * (num_workers - num_data))
    beta = nodes.mixed(alpha, num_workers, between).workers
    assert beta.shape == (num_workers,)
    assert (np.diff(beta) >= 0).all()
    counts = np.sum(beta[:, None] == alpha, axis=0)
    assert counts.sum() == num_workers - between
    assert set(counts) <= {counts.min(), counts.min() + 1}
    # Copies are spread: any stretch of inputs has as many as its length asks for, give or take one.
    first, last = num_data // 4, num_data // 2
    assert abs(counts[first:last].sum() - (last - first) * counts.mean()) <= 1
    np.testing.assert_array_equal(np.unique(beta), nodes.systematic(alpha, num_data + between).workers)


# ---- bad arguments -----------------------------------------------------------------------------------------

UP = np.array([-0.5, 0.0, 0.5])
REFUSED = {
    "too-many-between": (lambda: nodes.mixed(UP, 5, 3), "num_between is 3; expected at most .*, 2"),
    "no-nodes": (lambda: nodes.chebyshev_first(0), "count is 0; expected a whole number, at least 1"),
    "one-of-the-second-kind": (lambda: nodes.chebyshev_second(1), "count is 1; expected .* at least 2"),
    "one-uniform": (lambda: nodes.uniform(1), "count is 1"),
    "a-fraction": (lambda: nodes.uniform(2.0), r"count is 2\.0; expected a whole number"),
    "a-truth": (lambda: nodes.chebyshev_first(True), "count is True"),
    "a-word": (lambda: nodes.chebyshev_first("3"), "count is '3'"),
    "one-input": (lambda: nodes.chebyshev(1, 5), "num_data is 1"),
    "one-worker": (lambda: nodes.chebyshev(5, 1), "num_workers is 1"),
    "too-few-systematic": (lambda: nodes.systematic(UP, 2), "num_workers is 2; .* 3 data nodes"),
    "too-few-repeated": (lambda: nodes.repeated(UP, 2), "num_workers is 2; .* 3 data nodes"),
    "descending": (lambda: nodes.systematic(UP[::-1], 5), r"data_nodes\[0:2\] is \(0\.5, 0\.0\).*ascending"),
    "equal": (lambda: nodes.repeated(np.array([0.0, 0.0]), 5), "no two equal"),
    "beyond-one": (lambda: nodes.systematic(2 * UP * 2, 5), r"data_nodes reach from -2\.0 to 2\.0; .*\[-1, 1\]"),
    "not-a-number": (lambda: nodes.systematic(np.array([0.0, np.nan]), 5), "finite"),
    "layout-descending": (lambda: nodes.Nodes(UP[::-1], UP), r"data_nodes\[0:2\].*ascending"),
    "workers-descending": (lambda: nodes.Nodes(UP, UP[::-1]), r"worker_nodes\[0:2\].*ascending"),
    "inputs-half": (lambda: nodes.systematic(2.5, 5), r"num_data is 2\.5"),
    "a-matrix": (lambda: nodes.repeated(np.ones((2, 2)), 5), r"data_nodes has shape \(2, 2\)"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_refuses(unchecked, call):
    run, message = REFUSED[call]
    with pytest.raises(ValueError, match=message):
        run()
