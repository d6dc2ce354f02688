"""The oneDNN linear layer is the framework's."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from d2v2ds.model.cpu import linear
from d2v2ds.model.cpu.linear import Linear


@pytest.fixture(params=[True, False], ids=["oneDNN", "framework"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, whatever this processor would take."""
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of torch has no oneDNN linear operator")
    monkeypatch.setattr(linear, "_USES_ONEDNN", request.param)


def test_maker_of_the_processor_is_read_where_linux_says_it(tmp_path: Path) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text("vendor_id\t: GenuineIntel\n")
    assert linear._is_intel(facts)
    facts.write_text("vendor_id\t: AuthenticAMD\n")
    assert not linear._is_intel(facts)
    assert not linear._is_intel(tmp_path / "absent")


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(12,), (1, 12), (5, 12), (2, 7, 12), (3, 2, 1, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_the_frameworks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    expected = nn.Linear(12, 9).to(dtype)
    found = Linear(12, 9).to(dtype)
    found.load_state_dict(expected.state_dict())
    x = torch.randn(shape, dtype=dtype)[..., torch.randperm(12)]
    results = []
    for module in (expected, found):
        own = x.clone().requires_grad_()
        y = module(own)
        results.append([y, *torch.autograd.grad((y * torch.arange(9)).sum(), [own, *module.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_input_without_gradient_and_inference_work() -> None:
    module = Linear(4, 3)
    x = torch.randn(6, 4)
    module(x).sum().backward()
    assert x.grad is None
    assert module.weight.grad is not None
    with torch.inference_mode():
        assert module(x).shape == (6, 3)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("_threads", [2], indirect=True)
@pytest.mark.parametrize("needs_dx", [False, True])
def test_factors_of_a_gradient_are_read_where_they_lie(needs_dx: bool) -> None:
    """Strides that torch does not take for channels last cost a copy of both, and more time than is gained."""
    grad, x, weight = torch.randn(64, 32), torch.randn(64, 16), torch.randn(32, 16)
    with torch.profiler.profile() as profile:
        linear._gradients(grad, x, weight, needs_dx)
    names = {event.name for event in profile.events()}
    assert "aten::convolution_backward" in names
    assert not names & {"aten::copy_", "aten::contiguous", "aten::clone"}


def test_compilers_and_exporters_are_given_the_plain_product() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compile(Linear(4, 3), backend=keep, fullgraph=True)(torch.randn(6, 4)).sum().backward()
    exported = torch.export.export(Linear(4, 3), (torch.randn(6, 4),)).graph
    names = [str(node.target) for graph in (graphs[0].graph, exported) for node in graph.nodes]
    assert sum("linear" in name for name in names) == 2
    assert not any("mkldnn" in name or "autograd" in name for name in names)
