"""oneDNN's products are PyTorch's, up to the order of sums, for matrices of all kinds and in whole updates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_contract import ALGORITHMS, batch, make
from torch import Tensor, nn

from lit_offrl.algorithms import OfflineAlgorithm
from lit_offrl.algorithms.loop import advance
from lit_offrl.cli import main
from lit_offrl.system import onednn
from lit_offrl.system.onednn import products_by_onednn

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
    for name in ("FEWEST_COLUMNS", "FEWEST_MULTIPLICATIONS"):
        monkeypatch.setattr(onednn, name, 0)
    torch.manual_seed(0)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of the products that oneDNN computes, in their order."""
    seen: list[int] = []
    product = onednn._product

    def noted(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(len(a))
        return product(a, b, bias)

    monkeypatch.setattr(onednn, "_product", noted)
    return seen


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
    with products_by_onednn():
        ours = results()
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)  # float32: sums of 24 in another order


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_other_types_are_left_to_pytorch(dtype: torch.dtype):
    a, b, c = (torch.randint(-4, 4, shape).to(dtype) for shape in ((5, 7), (7, 3), (3,)))
    expected = torch.mm(a, b), torch.addmm(c, a, b)
    with products_by_onednn():
        ours = torch.mm(a, b), torch.addmm(c, a, b)
    assert all(torch.equal(one, two) for one, two in zip(ours, expected, strict=True))


@pytest.mark.parametrize(("m", "k", "n"), [(0, 4, 3), (4, 0, 3), (4, 3, 0), (1, 1, 1)])
def test_small_and_empty_matrices(m: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onednn, "FEWEST_COLUMNS", 2)
    a, b, c = torch.randn(m, k), torch.randn(k, n), torch.randn(n)
    expected = torch.mm(a, b), torch.addmm(c, a, b)
    with products_by_onednn():
        ours = torch.mm(a, b), torch.addmm(c, a, b)
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_wrong_shapes_are_refused():
    with products_by_onednn(), pytest.raises(RuntimeError):
        torch.mm(torch.randn(4, 3), torch.randn(4, 3))


def test_products_are_pytorchs_again_afterwards(products: list[int]):
    a, b = torch.randn(64, 640), torch.randn(640, 64)
    before = a.mm(b)
    for _ in range(2):
        with products_by_onednn():
            assert not torch.equal(a.mm(b), before)  # the order of 640 terms is another
        assert torch.equal(a.mm(b), before)
    assert products == [64, 64]


def test_nothing_changes_where_onednn_is_not_faster(monkeypatch: pytest.MonkeyPatch, products: list[int]):
    monkeypatch.setattr(onednn, "is_faster", lambda: False)
    with products_by_onednn():
        torch.mm(torch.randn(64, 640), torch.randn(640, 64))
    assert products == []


def test_the_training_command_uses_onednn_and_leaves_nothing_behind(
    tiny: Callable[..., list[str]], products: list[int]
):
    assert main(tiny("--evaluation.enabled=false")) == 0
    assert 8 in products  # the rows of a minibatch
    products.clear()
    torch.mm(torch.randn(8, 8), torch.randn(8, 8))
    assert products == []


@pytest.mark.slow  # half a minute of the C++ compiler
def test_compiled_functions_use_onednn(products: list[int]):
    network = nn.Linear(24, 9)

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(network(x).square().sum(), tuple(network.parameters()))

    x = torch.randn(17, 24)
    expected = gradients(x)
    with products_by_onednn(), torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(gradients, fullgraph=True)
        compiled(x)
        products.clear()
        ours = compiled(x)
    assert len(products) == 2  # the output, and the gradient of the weight
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_updates_are_the_same(cls: type[OfflineAlgorithm], products: list[int]):
    """One update, in float32: gradients, and through Adam's first step whatever they are, agree to rounding."""

    def gradients() -> list[Tensor]:
        algorithm, seen = make(cls, width=64), []
        algorithm.optimizer_set.average = lambda each: seen.extend(g.clone() for g in each) or each
        advance(algorithm, batch(algorithm))
        return seen

    plain = gradients()
    assert products == []
    with products_by_onednn():
        ours = gradients()
    assert products
    assert len(plain) == len(ours) > 0
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    # The products of two small layers are the same.
    assert cls.__name__ == "BC" or not all(torch.equal(one, two) for one, two in zip(ours, plain, strict=True))
