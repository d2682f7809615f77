"""oneDNN's products are PyTorch's, up to the order of sums, for matrices of all kinds and in whole updates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_contract import ALGORITHMS, BATCH_SIZE, OBSERVATION_DIM, batch, make
from torch import Tensor, nn

from lit_offrl.algorithms import AEPO, OfflineAlgorithm
from lit_offrl.cli import main
from lit_offrl.networks import onednn

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of PyTorch comes without oneDNN"
)
LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "rows": lambda m, n: torch.randn(m, n),
    "columns": lambda m, n: torch.randn(n, m).t(),
    "part": lambda m, n: torch.randn(m, n + 3)[:, 3:],
    "every second": lambda m, n: torch.randn(m, 2 * n)[:, ::2],
    "one row": lambda m, n: torch.randn(n).expand(m, n),
    "one column": lambda m, n: torch.randn(m, 1).expand(m, n),
}


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor, and for products of all sizes."""
    monkeypatch.setattr(onednn, "is_faster", lambda: True)
    for name in ("FEWEST_ROWS", "FEWEST_COLUMNS", "FEWEST_MULTIPLICATIONS"):
        monkeypatch.setattr(onednn, name, 0)
    torch.manual_seed(0)


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_products_of_all_layouts(first: str, second: str):
    a, b, bias, c = LAYOUTS[first](17, 24), LAYOUTS[second](24, 9), torch.randn(9), torch.randn(17, 9)

    def results() -> list[Tensor]:
        return [
            torch.mm(a, b),
            torch.addmm(bias, a, b),
            torch.addmm(c, a, b),
            torch.addmm(bias, a, b, beta=0.5, alpha=-2),
            torch.addmm(torch.full((9,), torch.nan), a, b, beta=0),
            nn.functional.linear(a, b.t(), bias),
            torch.mm(a, b, out=torch.empty(17, 9)),
            torch.mm(a, b, out=torch.empty(0)),
            torch.addmm(bias, a, b, out=torch.empty(17, 9)),
        ]

    expected = results()
    onednn.use(rows=17)
    ours = results()
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)  # float32: sums of 24 in another order


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_types_are_left_to_pytorch(dtype: torch.dtype):
    a, b, c = (torch.randint(-4, 4, shape).to(dtype) for shape in ((5, 7), (7, 3), (3,)))
    expected = torch.mm(a, b), torch.addmm(c, a, b)
    onednn.use(rows=5)
    ours = torch.mm(a, b), torch.addmm(c, a, b)
    assert all(torch.equal(one, two) for one, two in zip(ours, expected, strict=True))


@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 3), (4, 0, 3), (4, 3, 0), (1, 1, 1)])
def test_small_and_empty_matrices(m: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn, "FEWEST_COLUMNS", 2)
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.randn(n)
    expected = torch.mm(a, b), torch.addmm(c, a, b)
    onednn.use(rows=m)
    ours = torch.mm(a, b), torch.addmm(c, a, b)
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_wrong_shapes_are_refused():
    onednn.use(rows=4)
    with pytest.raises(RuntimeError):
        torch.mm(torch.randn(4, 3), torch.randn(4, 3))


def test_products_are_pytorchs_again_when_few_rows_come(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn, "FEWEST_ROWS", 16)
    a, b = torch.randn(64, 640), torch.randn(640, 64)
    before = a.mm(b)
    for _ in range(2):
        onednn.use(rows=16)
        onednn.use(rows=64)
        assert not torch.equal(a.mm(b), before)  # the order of 640 terms is another
        onednn.use(rows=15)
        assert torch.equal(a.mm(b), before)


def test_acting_and_training_choose_by_their_rows(monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., list[str]]):
    chosen: list[int] = []
    monkeypatch.setattr(onednn, "use", lambda rows: chosen.append(rows))
    assert main(tiny("--evaluation.num_envs=2", "--model.init_args.candidates=5")) == 0
    assert chosen[-1] == 0
    assert {8, 5, 10} <= set(chosen)  # minibatches; one and two states with five candidates


def test_few_rows_take_one_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn, "FEWEST_ROWS", 16)
    algorithm, seen = make(AEPO), []
    monkeypatch.setattr(algorithm, "sample_each", lambda rows, *_: seen.append(torch.get_num_threads()) or rows[:, :3])
    torch.set_num_threads(2)
    try:
        for rows in (15, 16):
            algorithm.act(torch.zeros(rows, OBSERVATION_DIM))
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [1, 2]


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_updates_are_the_same(cls: type[OfflineAlgorithm]):
    """One update, in float32: gradients, and through Adam's first step whatever they are, agree to rounding."""

    def gradients(rows: int) -> list[Tensor]:
        algorithm, seen = make(cls), []
        algorithm.reduce_gradients = lambda each: seen.extend(g.clone() for g in each) or each
        onednn.use(rows)
        algorithm.advance(batch())
        return seen

    plain, ours = gradients(-1), gradients(BATCH_SIZE)
    assert len(plain) == len(ours) > 0
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert not all(torch.equal(one, two) for one, two in zip(ours, plain, strict=True))
